"""What moalign gives to every trainer of trl: one callback, and the order of rows, optimizer, schedule and settings.

Only public hooks are used here. A resumed run is a trainer over the remaining rows, with the optimizer as it was: the
result equals the uninterrupted run's, on a CPU bit for bit (:mod:`moalign.training.checkpoints`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from moalign.core import processes
from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import adapters
from moalign.lm.finite import FiniteCheck
from moalign.lm.trainers import checkpointed, checkpointing_option, own_precision, quiet_libraries, run_trainer
from moalign.training.checkpoints import modules, resume, save_checkpoint
from moalign.training.settings import SftConfig

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

_PATCHED = ("forward", "_original_forward")
"""What trl (a fused head) and accelerate (mixed precision) put on a model that they train, and leave there."""


def order(rows: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Return which row each place of each batch takes: reshuffled passes over all rows; int ``[steps * batch]``."""
    if not steps:
        return np.empty(0, dtype=np.intp)
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // rows)
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[: steps * batch]


def own_places(places: np.ndarray, batch: int) -> np.ndarray:
    """Return this process's places of each batch, every n-th one where there are n: of all lengths where these rise."""
    own: np.ndarray = places.reshape(-1, batch)[:, processes.rank() :: processes.count()].reshape(-1)
    return own


def parts_of(batch: int, accumulate: int, count: int) -> int:
    """Return in how many parts each of ``count`` processes reads its rows of a batch, all parts of one size.

    They are the fewest that are no larger than one process alone would read.

    >>> parts_of(16, 4, 1), parts_of(16, 4, 2), parts_of(16, 1, 4), parts_of(24, 3, 2)
    (4, 2, 1, 2)
    """
    own, largest = batch // count, batch // accumulate
    return next(parts for parts in range(1, own + 1) if own % parts == 0 and own // parts <= largest)


def train_rows(
    job: Job, lm: LanguageModel, config: SftConfig, phase: str, tokens: Sequence[int], make: Callable[..., Any]
) -> None:
    """Train the active adapter of ``lm`` by a trainer of trl; resumes from the phase's checkpoint.

    Args:
        phase: name of the stage in the run's record, metrics and checkpoints.
        tokens: length of the row at each place of each batch, ``[steps * batch]``.
        make: ``make(start, settings, **arguments)`` returns the trainer for the places from ``start`` on; what its
            ``mean_metrics()`` returns, if it has one, goes into each line of the log.

    Raises WorkError when training diverges: see :mod:`moalign.lm.finite`.
    """
    trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    checkpoint = resume(job, optimizer, phase)
    start = 0
    if checkpoint is not None:
        start = checkpoint.step
        adapters.set_tensors(lm, modules(checkpoint)["adapter"])
    if start >= config.steps:
        return
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(config.schedule, start + step, config.steps, config.warmup)
    )
    on = job.policy_spec.gradient_checkpointing
    if on is None:  # a prompt that is read once is kept in a cache, which checkpointing has none of
        on = lm.device.type != "cpu" and not getattr(config, "share_prompts", False)
    with quiet_libraries(), trainable(lm), checkpointed(lm.model, on):
        with own_precision(trained):
            trainer = make(
                start * config.batch,
                trainer_settings(job, lm, config, config.steps - start, phase),
                model=lm.model,
                processing_class=lm.tokenizer,
                optimizers=(optimizer, schedule),
            )
        metrics = getattr(trainer, "mean_metrics", dict)
        callback = RunCallback(job, lm, optimizer, config, phase, start, tokens, metrics)
        trainer.add_callback(callback)
        run_trainer(trainer, callback.check.number, lambda: processes.add_gradients(trained))
    callback.check.weights({"adapter": adapters.tensors(lm)})


def trainer_settings(job: Job, lm: LanguageModel, config: SftConfig, steps: int, phase: str) -> dict[str, Any]:
    """Return the arguments that all trainers share; ``steps`` are those left to do."""
    on_cpu = lm.device.type == "cpu"
    parts = parts_of(config.batch, config.accumulate, processes.count())
    return {
        "output_dir": str(job.run.path / "checkpoints"),
        "per_device_train_batch_size": config.batch // processes.count() // parts,
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "max_grad_norm": config.clip,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",  # the callback decides: the trainer counts from a resume, the run from its start
        "logging_nan_inf_filter": False,  # it would show a mean of earlier steps instead of a NaN
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        checkpointing_option(): False,  # trl's default is True; see train_rows
        "seed": derive(job.seed, phase) % 2**32,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
    }


class RunCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Seeds every step, counts tokens, writes the log, reports progress and saves checkpoints."""

    def __init__(
        self,
        job: Job,
        lm: LanguageModel,
        optimizer: torch.optim.Optimizer,
        config: SftConfig,
        phase: str,
        start: int,
        tokens: Sequence[int],
        metrics: Callable[[], dict[str, float]],
    ) -> None:
        """``tokens`` are the lengths of all rows in their order; ``metrics`` is called once for a line of the log."""
        self.job, self.lm, self.optimizer, self.config = job, lm, optimizer, config
        self.phase, self.start, self.tokens, self.metrics = phase, start, tokens, metrics
        self.check = FiniteCheck(job.run.record.method, phase, config.lr, config.clip)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seed dropout by the step of the run, whatever was drawn before; each process has masks of its own."""
        self.check.step = self.start + state.global_step + 1
        apart = () if processes.is_writer() else (processes.rank(),)
        torch.manual_seed(derive(self.job.seed, self.phase, self.start + state.global_step, *apart))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step's tokens, keep what is due of it and decide whether it is logged."""
        config, step = self.config, self.start + state.global_step
        self.job.meter.add_tokens_trained(sum(self.tokens[(step - 1) * config.batch : step * config.batch]))
        # At checkpoints, too: a line is a mean since the last one, and a resume must not need what came before it.
        control.should_log = step == config.steps or 0 in (step % config.log_every, step % config.checkpoint_every)
        self.job.advance(self.lm, self.phase, step, config.steps)
        if not control.should_log:
            self._save_checkpoint(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line of the run's log."""
        if logs and "loss" in logs:
            step = self.start + state.global_step
            own = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            own["loss"] = self.check.number("loss", sum(processes.gather(own["loss"])))
            self.job.run.log(step, self.phase, **own, **self.metrics(), **self.job.meter.cost())
            self._save_checkpoint(step)  # after its line: a kill between the two must not lose the line

    def _save_checkpoint(self, step: int) -> None:
        if step % self.config.checkpoint_every == 0 and step < self.config.steps:
            weights = self.check.weights({"adapter": adapters.tensors(self.lm)})
            save_checkpoint(self.job, weights, self.optimizer, self.phase, step)


@contextlib.contextmanager
def trainable(lm: LanguageModel) -> Iterator[None]:
    """Within the block trainers may patch the model's forward pass; afterwards it is what it was, and in eval mode."""
    models = [lm.model, *([lm.model.get_base_model()] if hasattr(lm.model, "get_base_model") else [])]
    before = [{name: vars(module)[name] for name in _PATCHED if name in vars(module)} for module in models]
    try:
        yield
    finally:
        for module, attributes in zip(models, before, strict=True):
            for name in _PATCHED:
                vars(module).pop(name, None)
            vars(module).update(attributes)
        lm.model.eval()

"""What every trainer of trl is given: our order of rows, books and checkpoints.

Only public hooks are used here. A resumed run is a trainer over the remaining rows, with the optimizer as it was;
checkpoints are safetensors, and the result equals the uninterrupted run's bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer
from moalign.lm.trainers import checkpointing_option
from moalign.training.settings import SftConfig

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

_PATCHED = ("forward", "_original_forward")
"""What trl (a fused head) and accelerate (mixed precision) put on a model that they train, and leave there."""


def order(rows: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Return which row each place of each batch takes: reshuffled passes over all rows; int ``[steps * batch]``."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // rows)
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[: steps * batch]


def make_optimizer(lm: LanguageModel, config: SftConfig) -> Any:
    """Return AdamW over the trainable weights of ``lm``."""
    import torch

    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def make_scheduler(optimizer: Any, config: SftConfig, start: int) -> Any:
    """Return the schedule of a run that goes on at step ``start``."""
    import torch

    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(config.schedule, start + step, config.steps, config.warmup)
    )


def resume(job: Job, lm: LanguageModel, optimizer: Any, phase: str) -> int:
    """Restore adapter, optimizer and meter from the phase's checkpoint; returns the steps already done."""
    from moalign.lm import adapters

    found = job.run.load_checkpoint(phase)
    job.run.truncate_metrics(phase, 0 if found is None else found.step)
    if found is None:
        return 0
    weights = {key[len("adapter.") :]: value for key, value in found.tensors.items() if key.startswith("adapter.")}
    adapters.set_tensors(lm, weights)
    unpack_optimizer(optimizer, found.tensors, found.state["optimizer"])
    job.meter.load(found.state["meter"])
    return found.step


def trainer_settings(job: Job, lm: LanguageModel, config: SftConfig, steps: int, phase: str) -> dict[str, Any]:
    """Return the arguments that the settings of all trainers share; ``steps`` are those left to do."""
    on_cpu = lm.device.type == "cpu"
    return {
        "output_dir": str(job.run.path / "checkpoints"),
        "per_device_train_batch_size": config.batch // config.accumulate,
        "gradient_accumulation_steps": config.accumulate,
        "max_steps": steps,
        "max_grad_norm": config.clip,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",  # the books say when: the trainer counts from a resume, the run from its start
        "disable_tqdm": True,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,
        checkpointing_option(): not on_cpu,
        "seed": derive(job.seed, phase) % 2**32,
        "dataloader_pin_memory": not on_cpu,
        "remove_unused_columns": False,
    }


def make_books(
    job: Job,
    lm: LanguageModel,
    optimizer: Any,
    config: SftConfig,
    phase: str,
    start: int,
    tokens: Sequence[int],
    more: Callable[[], dict[str, float]] = dict,
) -> Any:
    """Return the callback that seeds every step, counts tokens, logs, reports and saves checkpoints.

    Args:
        start: steps done before.
        tokens: what each row costs, in the order of training from ``start`` on, ``[steps left * batch]``.
        more: further metrics, asked for whenever a line is written.
    """
    import torch
    from transformers import TrainerCallback

    from moalign.lm import adapters

    class Books(TrainerCallback):
        """Keeps the run's books at every step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.manual_seed(derive(job.seed, phase, start + state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = start + state.global_step
            here = slice((state.global_step - 1) * config.batch, state.global_step * config.batch)
            job.meter.add_tokens_trained(sum(tokens[here]))
            # At checkpoints, too: a line is a mean since the last one, and what a resume cannot know must not be in it.
            control.should_log = done == config.steps or 0 in (done % config.log_every, done % config.checkpoint_every)
            job.say(phase, done, config.steps)
            if not control.should_log:
                self.keep(done)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                told = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
                job.run.log(start + state.global_step, phase, **told, **more(), **job.meter.cost())
                self.keep(start + state.global_step)  # after its line: a kill between the two must not lose the line

        def keep(self, step: int) -> None:
            if step % config.checkpoint_every or step >= config.steps:
                return
            kept, plain = pack_optimizer(optimizer)
            kept.update({f"adapter.{key}": value for key, value in adapters.tensors(lm).items()})
            job.run.save_checkpoint(phase, step, kept, {"optimizer": plain, "meter": job.meter.state()})

    return Books()


@contextlib.contextmanager
def trainable(lm: LanguageModel) -> Iterator[None]:
    """Within the block trainers may patch the model's forward pass; afterwards it is what it was, and in eval mode."""
    modules = [lm.model, *([lm.model.get_base_model()] if hasattr(lm.model, "get_base_model") else [])]
    before = [{name: vars(module)[name] for name in _PATCHED if name in vars(module)} for module in modules]
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            for name in _PATCHED:
                vars(module).pop(name, None)
            vars(module).update(kept)
        lm.model.eval()

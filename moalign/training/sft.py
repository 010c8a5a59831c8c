"""Supervised fine-tuning on rendered (prompt, response) rows, by trl's SFTTrainer.

Only public hooks of the trainer are used: the order of the rows, the optimizer, the schedule and the checkpoints
are given to it. A resumed run is a trainer over the remaining rows, with the optimizer as it was; checkpoints are
safetensors, and the result equals the uninterrupted run's bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.errors import RequestError
from moalign.training.schedule import factor
from moalign.training.seeds import derive
from moalign.training.settings import SftConfig
from moalign.training.state import pack_optimizer, unpack_optimizer

if TYPE_CHECKING:
    from moalign.methods.base import Job
    from moalign.policies.language_model import LanguageModel


def encode_rows(
    lm: LanguageModel, texts: Sequence[str], responses: Sequence[str], max_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenise rows; returns (input_ids, labels), where labels are -100 outside the response and its end token.

    Raises RequestError when a row would train on nothing: an empty response mask is silent otherwise.
    """
    answers = lm.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    inputs, labels = [], []
    for number, (head, answer) in enumerate(zip(lm.encode(texts), answers, strict=True)):
        if not answer:
            raise RequestError(f"training row {number}: the response has no tokens ({responses[number]!r})")
        tail = [*answer[: max_tokens - 2], lm.eos]
        kept = _cut_left(head, max_tokens - len(tail), lm.tokenizer.bos_token_id is not None)
        inputs.append(kept + tail)
        labels.append([-100] * len(kept) + tail)
    return inputs, labels


def _cut_left(head: list[int], room: int, begins: bool) -> list[int]:
    """Return the end of a prompt that fits, behind its begin token: what the sampler reads of a long prompt, too."""
    if len(head) <= room:
        return head
    first = head[:1] if begins and room > 1 else []
    return first + head[len(head) - (room - len(first)) :]


def order(rows: int, steps: int, batch: int, seed: int) -> np.ndarray:
    """Return which row each place of each batch takes: reshuffled passes over all rows; int ``[steps * batch]``."""
    rng = np.random.default_rng(seed)
    passes = -(-steps * batch // rows)
    return np.concatenate([rng.permutation(rows) for _ in range(passes)])[: steps * batch]


def train_sft(
    job: Job, lm: LanguageModel, texts: Sequence[str], responses: Sequence[str], config: SftConfig, phase: str
) -> None:
    """Train the active adapter of ``lm`` on rows; resumes from the phase's checkpoint.

    Args:
        texts: rendered prompts, ``[rows]``.
        responses: their responses, ``[rows]``.
        phase: name of the stage in the run's record, metrics and checkpoints.

    Raises:
        RequestError: no rows, or a row whose response is empty.
    """
    if not texts:
        raise RequestError(f"{job.task.card.name}: no rows to train on in stage {phase}")
    if config.steps == 0:
        return
    import torch

    inputs, labels = encode_rows(lm, texts, responses, config.max_tokens)
    places = order(len(inputs), config.steps, config.batch, derive(job.seed, phase, "order"))
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    start = _resume(job, lm, optimizer, phase)
    if start >= config.steps:
        return
    rows = places[start * config.batch :]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(config.schedule, start + step, config.steps, config.warmup)
    )
    keeper = _keeper(job, lm, optimizer, config, phase, start, [len(inputs[row]) for row in rows])
    with quiet_libraries():
        trainer = _trainer(lm, inputs, labels, rows, config, (optimizer, scheduler), keeper, derive(job.seed, phase))
        trainer.train()


def _resume(job: Job, lm: LanguageModel, optimizer: Any, phase: str) -> int:
    """Restore adapter, optimizer and meter from the phase's checkpoint; returns the steps already done."""
    from moalign.policies import adapters

    found = job.run.load_checkpoint(phase)
    job.run.truncate_metrics(phase, 0 if found is None else found.step)
    if found is None:
        return 0
    weights = {key[len("adapter.") :]: value for key, value in found.tensors.items() if key.startswith("adapter.")}
    adapters.set_tensors(lm, weights)
    unpack_optimizer(optimizer, found.tensors, found.state["optimizer"])
    job.meter.load(found.state["meter"])
    return found.step


def _trainer(
    lm: LanguageModel,
    inputs: list[list[int]],
    labels: list[list[int]],
    rows: np.ndarray,
    config: SftConfig,
    optimizers: Any,
    keeper: Any,
    seed: int,
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"input_ids": [inputs[row] for row in rows], "labels": [labels[row] for row in rows]})
    on_cpu = lm.device.type == "cpu"
    settings = SFTConfig(
        output_dir=str(keeper.job.run.path / "checkpoints"),
        per_device_train_batch_size=config.batch // config.accumulate,
        gradient_accumulation_steps=config.accumulate,
        max_steps=len(rows) // config.batch,
        max_grad_norm=config.clip,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",  # the keeper says when: the trainer counts from a resume, the run from its start
        disable_tqdm=True,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        activation_checkpointing=not on_cpu,
        seed=seed % 2**32,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
    )
    trainer = SFTTrainer(
        model=lm.model,
        args=settings,
        train_dataset=data,
        processing_class=lm.tokenizer,
        optimizers=optimizers,
        callbacks=[keeper],
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def _keeper(
    job: Job, lm: LanguageModel, optimizer: Any, config: SftConfig, phase: str, start: int, lengths: list[int]
) -> Any:
    """Return the callback that seeds every step, counts tokens, logs, reports and saves checkpoints."""
    import torch
    from transformers import TrainerCallback

    from moalign.policies import adapters

    class Keeper(TrainerCallback):
        """Keeps the run's books at every step."""

        def __init__(self) -> None:
            self.job = job

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.manual_seed(derive(job.seed, phase, start + state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            done = start + state.global_step
            here = slice((state.global_step - 1) * config.batch, state.global_step * config.batch)
            job.meter.add_tokens_trained(sum(lengths[here]))
            control.should_log = done % config.log_every == 0 or done == config.steps
            job.say(phase, done, config.steps)
            if not control.should_log:
                self.keep(done)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                told = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
                job.run.log(start + state.global_step, phase, **told, **job.meter.cost())
                self.keep(start + state.global_step)  # after its line: a kill between the two must not lose the line

        def keep(self, step: int) -> None:
            if step % config.checkpoint_every or step >= config.steps:
                return
            kept, plain = pack_optimizer(optimizer)
            kept.update({f"adapter.{key}": value for key, value in adapters.tensors(lm).items()})
            job.run.save_checkpoint(phase, step, kept, {"optimizer": plain, "meter": job.meter.state()})

    return Keeper()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and notices of libraries: moalign has its own."""
    import datasets
    import transformers

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    level = logging.getLogger("accelerate").level
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)
        logging.getLogger("accelerate").setLevel(level)

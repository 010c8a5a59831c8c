"""Checkpoints of whatever trains an adapter: after an interruption it continues bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moalign.lm import adapters
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.runs.checkpoint import Checkpoint
    from moalign.training.job import Job


def save_checkpoint(
    job: Job,
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    phase: str,
    step: int,
    modules: Mapping[str, Mapping[str, Tensor]] | None = None,
    **state: Any,
) -> None:
    """Save the adapter, the optimizer and the meter after ``step`` steps, with ``modules``' tensors and ``state``."""
    tensors, plain = pack_optimizer(optimizer)
    for prefix, named in {"adapter": adapters.tensors(lm), **(modules or {})}.items():
        tensors.update({f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in named.items()})
    job.run.save_checkpoint(phase, step, tensors, {"optimizer": plain, "meter": job.meter.state(), **state})


def resume(job: Job, lm: LanguageModel, optimizer: torch.optim.Optimizer, phase: str) -> Checkpoint | None:
    """Restore adapter, optimizer and meter from the phase's checkpoint, which is returned; None: there is none."""
    checkpoint = job.run.load_checkpoint(phase)
    job.run.truncate_metrics(phase, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is not None:
        adapters.set_tensors(lm, module(checkpoint, "adapter"))
        unpack_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
        job.meter.load(checkpoint.state["meter"])
    return checkpoint


def module(checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """Return the tensors that were saved as those of a module."""
    return {key[len(name) + 1 :]: value for key, value in checkpoint.tensors.items() if key.startswith(f"{name}.")}

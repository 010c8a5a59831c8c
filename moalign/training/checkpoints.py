"""Checkpoints of whatever is trained: after an interruption it continues, on a CPU bit for bit.

On a GPU all that is kept is the same, but some of CUDA's sums (a float ``cumsum``, which sampling needs, and
``index_add_``) do not add in one order; there it is not measured yet how close the result comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer

if TYPE_CHECKING:
    from moalign.runs.checkpoint import Checkpoint
    from moalign.training.job import Job


def save_checkpoint(
    job: Job,
    modules: Mapping[str, Mapping[str, Tensor]],
    optimizer: torch.optim.Optimizer,
    phase: str,
    step: int,
    **state: Any,
) -> None:
    """Save tensors by module and name, the optimizer and the meter after ``step`` steps, and ``state`` (plain)."""
    tensors, plain = pack_optimizer(optimizer)
    for prefix, named in modules.items():
        tensors.update({f"{prefix}.{key}": value.detach().cpu().contiguous() for key, value in named.items()})
    job.run.save_checkpoint(phase, step, tensors, {"optimizer": plain, "meter": job.meter.state(), **state})


def resume(job: Job, optimizer: torch.optim.Optimizer, phase: str) -> Checkpoint | None:
    """Restore optimizer and meter from the phase's checkpoint, which is returned; None: there is none."""
    checkpoint = job.run.load_checkpoint(phase)
    job.run.truncate_metrics(phase, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is not None:
        unpack_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
        job.meter.load(checkpoint.state["meter"])
    return checkpoint


def modules(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """Return the tensors by module and name; those of the optimizer are among them."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in checkpoint.tensors.items():
        module, _, name = key.partition(".")
        found.setdefault(module, {})[name] = value
    return found

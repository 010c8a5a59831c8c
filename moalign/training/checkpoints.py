"""Checkpoints of the online trainer: after an interruption it continues bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moalign.lm import adapters
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer
from moalign.training.rollout import REFERENCE

if TYPE_CHECKING:
    from moalign.training.online import OnlineTrainer


def save_checkpoint(trainer: OnlineTrainer, step: int) -> None:
    """Save all that an online trainer needs to continue after ``step`` steps."""
    tensors, plain = pack_optimizer(trainer.optimizer)
    modules = {"adapter": adapters.tensors(trainer.lm)}
    if trainer.own_reference:
        modules["reference"] = adapters.tensors(trainer.lm, REFERENCE)
    if trainer.value_heads is not None:
        heads = trainer.value_heads.state_dict()
        modules["values"] = {key: value.detach().cpu().contiguous() for key, value in heads.items()}
    for prefix, named in modules.items():
        tensors.update({f"{prefix}.{key}": value for key, value in named.items()})
    state = {
        "optimizer": plain,
        "meter": trainer.job.meter.state(),
        "counts": trainer.counts,
        "method": trainer.state,
    }
    trainer.job.run.save_checkpoint(trainer.phase, step, tensors, state)


def resume(trainer: OnlineTrainer) -> int:
    """Restore an online trainer from its phase's checkpoint; returns the number of steps already done."""
    checkpoint = trainer.job.run.load_checkpoint(trainer.phase)
    trainer.job.run.truncate_metrics(trainer.phase, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is None:
        return 0

    def named(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in checkpoint.tensors.items() if key.startswith(prefix)}

    adapters.set_tensors(trainer.lm, named("adapter."))
    if trainer.own_reference:
        adapters.set_tensors(trainer.lm, named("reference."), name=REFERENCE)
    if trainer.value_heads is not None:
        trainer.value_heads.load_state_dict(named("values."))
    unpack_optimizer(trainer.optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
    trainer.job.meter.load(checkpoint.state["meter"])
    trainer.counts.update(checkpoint.state["counts"])
    trainer.state.update(checkpoint.state["method"])
    return checkpoint.step

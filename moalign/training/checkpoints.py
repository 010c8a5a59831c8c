"""What an online trainer needs to go on after an interruption, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moalign.lm import adapters
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer
from moalign.training.rollout import REFERENCE

if TYPE_CHECKING:
    from moalign.training.online import OnlineTrainer


def save_checkpoint(trainer: OnlineTrainer, step: int) -> None:
    """Keep all that an online trainer needs to go on after ``step`` steps, bit for bit."""
    tensors, plain = pack_optimizer(trainer.optimizer)
    kept = {"adapter": adapters.tensors(trainer.lm)}
    if trainer.own_reference:
        kept["reference"] = adapters.tensors(trainer.lm, REFERENCE)
    if trainer.value_heads is not None:
        heads = trainer.value_heads.state_dict()
        kept["values"] = {key: value.detach().cpu().contiguous() for key, value in heads.items()}
    for prefix, named in kept.items():
        tensors.update({f"{prefix}.{key}": value for key, value in named.items()})
    state = {
        "optimizer": plain,
        "meter": trainer.job.meter.state(),
        "counts": trainer.counts,
        "method": trainer.state,
    }
    trainer.job.run.save_checkpoint(trainer.phase, step, tensors, state)


def resume(trainer: OnlineTrainer) -> int:
    """Bring an online trainer to where its phase's checkpoint left it; returns the steps already done."""
    found = trainer.job.run.load_checkpoint(trainer.phase)
    trainer.job.run.truncate_metrics(trainer.phase, 0 if found is None else found.step)
    if found is None:
        return 0

    def named(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in found.tensors.items() if key.startswith(prefix)}

    adapters.set_tensors(trainer.lm, named("adapter."))
    if trainer.own_reference:
        adapters.set_tensors(trainer.lm, named("reference."), name=REFERENCE)
    if trainer.value_heads is not None:
        trainer.value_heads.load_state_dict(named("values."))
    unpack_optimizer(trainer.optimizer, found.tensors, found.state["optimizer"])
    trainer.job.meter.load(found.state["meter"])
    trainer.counts.update(found.state["counts"])
    trainer.state.update(found.state["method"])
    return found.step

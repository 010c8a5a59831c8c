"""What a trainer needs to go on after an interruption, as safetensors and JSON, bit for bit, without pickle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moalign.training.online import OnlineTrainer


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, plain values) from which :func:`unpack_optimizer` restores the optimizer exactly."""
    told = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in told["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    return tensors, {"state": plain, "groups": told["param_groups"]}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
    """Restore what :func:`pack_optimizer` saved; other keys of ``tensors`` are left alone."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in told["state"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    groups = [{**group, "betas": tuple(group["betas"])} if "betas" in group else group for group in told["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_checkpoint(trainer: OnlineTrainer, step: int) -> None:
    """Keep all that an online trainer needs to go on after ``step`` steps, bit for bit."""
    from moalign.policies import adapters
    from moalign.training.rollout import REFERENCE

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
    from moalign.policies import adapters
    from moalign.training.rollout import REFERENCE

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

"""How many runs this machine trains at a time where nobody says it."""

from __future__ import annotations

import os

from moalign.core.errors import RequestError
from moalign.preflight import memory
from moalign.runs import environment
from moalign.tasks.task import Task

VARIABLE = "MOALIGN_JOBS"
"""Says it for every comparison that has no ``--jobs``."""


def asked() -> int | None:
    """Return what the environment asks for, None when it asks for nothing; RequestError when that is no number."""
    told = os.environ.get(VARIABLE, "")
    if not told:
        return None
    if not told.isdecimal() or int(told) < 1:
        raise RequestError(f"{VARIABLE}={told}: allowed: 1 or more")
    return int(told)


def slots(task: Task) -> int:
    """Return how many runs of a task are trained at a time: one for each CPU where models are tiny, else one.

    A tiny model is no faster with two threads than with one, so that the other CPUs would wait. A GPU is left to one
    run, whatever its size.
    """
    import torch

    from moalign.lm.language_model import TINY

    if torch.cuda.is_available():
        return 1
    models, unknown = memory.reward_models(task.card)
    policy = memory.sizes_of(task.base_source()[0])
    if unknown or policy is None:
        return 1
    tiny = policy.parameters + sum(sizes.parameters for _, sizes in models) < TINY
    return environment.usable_cpus() if tiny else 1

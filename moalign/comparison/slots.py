"""How many runs this machine trains at a time by default."""

from __future__ import annotations

import os

from moalign.core.errors import RequestError
from moalign.preflight import memory
from moalign.runs import environment
from moalign.tasks.task import Task

VARIABLE = "MOALIGN_JOBS"
"""Environment variable with the number of runs, for comparisons without ``--jobs``."""


def requested() -> int | None:
    """Return the value of :data:`VARIABLE`, None where it is not set; RequestError when it is not a positive number."""
    value = os.environ.get(VARIABLE, "")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise RequestError(f"{VARIABLE}={value}: allowed: 1 or more")
    return int(value)


def slots(task: Task) -> int:
    """Return how many runs of a task are trained at a time: one for each CPU where models are tiny, else one.

    A tiny model is no faster with two threads than with one, so the other CPUs would be idle. A GPU trains one run at a
    time, whatever its size.
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

"""Policies of methods that train one adapter for each preference: the bare prompt, answered by that adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moalign.core.errors import RequestError
from moalign.core.preferences import TOLERANCE, label
from moalign.lm import adapters
from moalign.lm.generator import LazyGenerator
from moalign.policies.policy import Policy

if TYPE_CHECKING:
    from moalign.training.job import RunContext


def index_of(context: RunContext, preference: Sequence[float]) -> int:
    """Return which of the run's trained preferences ``preference`` is.

    Raises RequestError naming those served and the nearest of them when it is none.
    """
    served = list(context.preferences)
    apart = [max(abs(a - b) for a, b in zip(preference, one, strict=True)) for one in served]
    nearest = min(range(len(served)), key=apart.__getitem__)
    if apart[nearest] > TOLERANCE:
        raise RequestError(
            f"preference {label(preference)}: run {context.run.record.run_id} ({context.run.record.method}) answers "
            f"only for the preferences it was trained on: {'; '.join(label(one) for one in served)}; "
            f"the nearest is {label(served[nearest])}"
        )
    return nearest


def trained_for(context: RunContext, preference: Sequence[float]) -> Policy:
    """Return the policy that was trained for ``preference``; its adapter is loaded when it is first asked.

    One adapter of the run is on the model at a time, however many preferences are evaluated. Raises RequestError for
    a vector that was not trained (see :func:`index_of`).
    """
    from moalign.training.grid import adapter_of

    index = index_of(context, preference)
    key = f"generator:{index}"
    if key not in context.cache:
        lm, folder = context.task.language_model, context.run.path / adapter_of(index)
        name = f"run_{context.run.record.run_id}_pref_{index}"
        context.cache[key] = LazyGenerator(lm, name, lambda: adapters.load(lm, folder, name), context.cache)
    return Policy(context.cache[key], context.task.renderer.plain)

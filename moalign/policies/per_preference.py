"""Policies of methods that train one adapter for each preference: the bare prompt, answered by that adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from moalign.core.errors import RequestError
from moalign.core.preferences import TOLERANCE, typed
from moalign.lm import adapters
from moalign.lm.generator import LazyGenerator
from moalign.policies.policy import Policy, adapter_name
from moalign.training.grid import adapter_of

if TYPE_CHECKING:
    from moalign.training.job import RunContext


def index_of(context: RunContext, preference: Sequence[float]) -> int:
    """Return which of the run's trained preferences this is; RequestError naming them and the nearest if none."""
    served = list(context.preferences)
    distances = [max(abs(a - b) for a, b in zip(preference, other, strict=True)) for other in served]
    nearest = min(range(len(served)), key=distances.__getitem__)
    if distances[nearest] > TOLERANCE:
        raise RequestError(
            f"preference {typed(preference)}: run {context.run.record.run_id} ({context.run.record.method}) answers "
            f"only for the preferences it was trained on: {'; '.join(map(typed, served))}; "
            f"the nearest is {typed(served[nearest])}"
        )
    return nearest


def trained_for(context: RunContext, preference: Sequence[float]) -> Policy:
    """Return the policy that was trained for ``preference``; RequestError for one that was not trained.

    One adapter of the run is on the model at a time, however many preferences are evaluated.
    """
    index = index_of(context, preference)
    lm, name = context.task.language_model, adapter_name(context, f"pref_{index}")
    load = partial(adapters.load, lm, context.adapter_folder(adapter_of(index)), name)
    return Policy(LazyGenerator(lm, name, load, context.cache), context.task.renderer.plain)

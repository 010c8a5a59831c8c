"""Policies that read their preference from the prompt: the base or one adapter, shared by every preference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from moalign.lm import adapters
from moalign.lm.generator import ModelGenerator
from moalign.policies.policy import Policy, adapter_name

if TYPE_CHECKING:
    from moalign.training.job import RunContext


def trained(context: RunContext) -> ModelGenerator:
    """Return the run's trained model; loaded once, so that all policies of a run share one generator."""
    if "trained" not in context.cache:
        lm, name = context.task.language_model, adapter_name(context, "adapter")
        adapters.load(lm, context.adapter_folder("adapter"), name)
        context.cache["trained"] = ModelGenerator(lm, name)
    generator: ModelGenerator = context.cache["trained"]
    return generator


def base(context: RunContext) -> ModelGenerator:
    """Return the bare base as a generator, one per run."""
    generator: ModelGenerator = context.cache.setdefault("base", ModelGenerator(context.task.language_model))
    return generator


def conditioned(
    context: RunContext, preference: Sequence[float], style: Literal["percent", "fraction"] = "percent"
) -> Policy:
    """Return the trained model asked with the preference written beside the prompt."""
    return Policy(trained(context), partial(context.task.renderer.preference, weights=tuple(preference), style=style))

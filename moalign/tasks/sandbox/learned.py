"""Reward models in place of the exact scorers: one trunk, one head per objective, trained on annotators' pairs.

They are ordinary reward-model runs (``moalign reward train --task sandbox``) in the results folder, trained at first
use. They are good and not perfect, as reward models are: what a method gains on them and not on the truth is reward
hacking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.config.objectives import ClassifierObjective
from moalign.core.progress import prefixed
from moalign.reward_models.settings import RewardSettings

if TYPE_CHECKING:
    from moalign.tasks.sandbox.task import SandboxTask

VERSION = "4"
"""Raise it when the settings below change: it is part of a card's hash with ``rewards: learned``."""

SETTINGS = RewardSettings(
    loss="multitask",
    heads="each",
    steps=300,
    batch=48,
    lr=2e-3,
    warmup=10,
    weight_decay=0.01,
    max_tokens=128,
    template="{prompt} {response}",
    reproducible=True,
)
"""Choice: 3.4 passes over 2,100 training pairs of each of two objectives; found by their held-out log loss."""

PAIRS = 3000
"""Labelled pairs of each group, over all splits, that SETTINGS are for."""


def settings_of(task: SandboxTask) -> RewardSettings:
    """Return how the task's reward model is trained: as many passes, however many pairs there are."""
    spec, steps = task.reward_model, SETTINGS.steps
    assert steps is not None
    steps = spec.steps or max(1, round(steps * task.annotators.pairs / PAIRS))
    return SETTINGS.model_copy(update={"splits": task.card.splits, "steps": steps, "members": spec.members})


def objectives(task: SandboxTask) -> list[ClassifierObjective]:
    """Return the task's objectives as heads of the trained reward model; it and the base are made where missing."""
    from moalign.reward_models import runs

    spec, settings, base = task.reward_model, settings_of(task), task.base_source()[0]
    seed = task.annotators.seed if spec.seed is None else spec.seed
    request = runs.make(task.card.name, settings, base, task.pair_sets(), seed=seed, results=task.results)
    run, _ = runs.obtain(request, prefixed(task.progress, "reward models"), wait=True)
    how = spec.model_dump(include={"pessimism", "aggregate"})
    return [runs.objective(run, name, head=name).model_copy(update=how) for name in task.names]

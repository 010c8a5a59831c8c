"""Reward models in place of the exact scorers: one trunk, one head per objective, trained on annotators' pairs.

They are ordinary reward-model runs (``moalign reward train --task sandbox``) in the results folder, trained at first
use. They are good and not perfect, as reward models are: what a method gains on them and not on the truth is reward
hacking.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moalign.config.objectives import ClassifierObjective
from moalign.reward_models.settings import RewardSettings

if TYPE_CHECKING:
    from moalign.core.progress import Progress
    from moalign.reward_models.runs import RewardRequest
    from moalign.tasks.sandbox.task import SandboxTask

VERSION = "2"
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
)
"""Choice: about five passes over 2,100 training pairs of each of two objectives; found by their held-out log loss."""


def request(task: SandboxTask) -> RewardRequest:
    """Return the reward models of a task as a request; the base is made first when it is not there yet."""
    from moalign.reward_models import runs

    settings = SETTINGS.model_copy(update={"splits": task.card.splits})
    name, pairs = task.card.name, task.pair_sets()
    return runs.make(name, settings, task.base_folder, pairs, seed=task.annotators.seed, results=task.results)


def objectives(task: SandboxTask, progress: Progress) -> list[ClassifierObjective]:
    """Return the task's objectives as heads of the trained reward model; it is trained when it is not there yet."""
    from moalign.reward_models import runs

    run, _ = runs.obtain(
        request(task), lambda what, done, total: progress(f"reward models: {what}", done, total), wait=True
    )
    return [runs.objective(run, name, head=name) for name in task.names]

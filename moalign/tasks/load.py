"""The task of a card."""

from __future__ import annotations

from pathlib import Path

from moalign.config.card import TaskCard
from moalign.config.recipe import PolicySpec, RewardsSpec
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.tasks.task import Task


def make_task(
    card: TaskCard,
    results: Path,
    progress: Progress = silent,
    policy: PolicySpec | None = None,
    rewards: RewardsSpec | None = None,
) -> Task:
    """Return the task of a card; everything is loaded and computed at first use.

    ``policy`` and ``rewards`` are a recipe's and say how models are held in memory; None: the defaults.
    """
    kind: type[Task]
    if card.kind == "sandbox":
        from moalign.tasks.sandbox.task import SandboxTask as kind
    else:
        from moalign.tasks.text import TextTask as kind
    task = kind(card, results, progress)
    task.attention = policy.attention if policy is not None else None
    task.offload = rewards is not None and rewards.offload
    return task


def require_base(task: Task, known: object, run: Path) -> None:
    """Raise RequestError where a run was trained on a base of other weights than this machine's; None: not known."""
    if known is None:
        return
    task.base_source()  # which trains it, where it is not there yet
    if task.base_sum not in (None, known):
        raise RequestError(
            f"{run}: it was trained on a base of other weights ({known}) than this machine's ({task.base_sum}): each "
            "machine trains the sandbox's base for itself, and other versions of torch may not make the same; train it "
            "here, in another results folder"
        )

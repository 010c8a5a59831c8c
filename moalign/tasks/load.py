"""The task of a card."""

from __future__ import annotations

from pathlib import Path

from moalign.config.card import TaskCard
from moalign.core.progress import Progress, silent
from moalign.tasks.task import Task


def make_task(card: TaskCard, results: Path, progress: Progress = silent) -> Task:
    """Return the task of a card; everything is loaded and computed at first use."""
    if card.kind == "sandbox":
        from moalign.tasks.sandbox.task import SandboxTask

        return SandboxTask(card, results, progress)
    from moalign.tasks.text import TextTask

    return TextTask(card, results, progress)

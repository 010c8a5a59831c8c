"""What one ``moalign train`` does: train a plan, or find it trained, then evaluate it in the same process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.evaluation import evaluate
from moalign.experiment.train import Plan, train
from moalign.runs.run import Run


@dataclass(frozen=True)
class Outcome:
    """A finished run and its evaluation."""

    run: Run
    found: bool
    """The run was finished before; nothing was trained."""
    evaluation: dict[str, Any] | None
    """The content of ``eval.json``; None when no evaluation was asked for and none is there."""


def complete(made: Plan, progress: Progress = silent, judge: bool = True) -> Outcome:
    """Train what a plan asks for and evaluate it on the task's grid (or the vectors that its method can serve).

    A run and an evaluation that are there already are read back: no model is loaded. The base is loaded once for
    both halves. Raises what :func:`~moalign.experiment.train.train` raises.
    """
    run, found = train(made, progress)
    told = stored(made, run)
    if told is None and judge:
        made.task.progress = progress
        told = evaluate.evaluate(made.method, made.context(run), None, progress).told
    return Outcome(run, found, told)


def stored(made: Plan, run: Run) -> dict[str, Any] | None:
    """Return the run's evaluation if it is there; nothing is loaded."""
    asked: list[Preference] = made.task.grid if made.method.capabilities.steerable else made.preferences
    path = run.path / f"{evaluate.names(made.task, asked)[0]}.json"
    if not path.is_file():
        return None
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told if told["card_hash"] == made.task.hash else None

"""What one ``moalign train`` does: train a plan, or find it trained, then evaluate it in the same process."""

from __future__ import annotations

from dataclasses import dataclass

from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.evaluation import evaluate
from moalign.evaluation.result import EvalResult
from moalign.experiment.train import Plan, train
from moalign.runs.run import Run


@dataclass(frozen=True)
class Outcome:
    """A finished run and its evaluation."""

    run: Run
    found: bool
    """The run was finished before; nothing was trained."""
    evaluation: EvalResult | None
    """None when no evaluation was asked for and none is there."""


def complete(made: Plan, progress: Progress = silent, judge: bool = True) -> Outcome:
    """Train what a plan asks for and evaluate it on the task's grid (or the vectors that its method can serve).

    A run and an evaluation that are there already are read back: no model is loaded. The base is loaded once for
    both halves. Raises what :func:`~moalign.experiment.train.train` raises.
    """
    run, found = train(made, progress)
    result = stored(made, run)
    if result is None and judge:
        made.task.progress = progress
        result = evaluate.evaluate(made.method, made.context(run), None, progress).result
    return Outcome(run, found, result)


def stored(made: Plan, run: Run) -> EvalResult | None:
    """Return the run's evaluation if it is there; nothing is loaded."""
    asked: list[Preference] = made.task.grid if made.method.capabilities.steerable else made.preferences
    path = run.path / f"{evaluate.names(made.task, asked)[0]}.json"
    if not path.is_file():
        return None
    result = EvalResult.load(path)
    return result if result.card_hash == made.task.hash else None

"""Several runs evaluated one after the other, each alone in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moalign.core import memory
from moalign.core.preferences import Preference
from moalign.core.progress import Progress
from moalign.evaluation import evaluate as evaluation
from moalign.evaluation.result import EvalResult
from moalign.experiment import arguments
from moalign.experiment.handle import RunHandle


class Request(NamedTuple):
    """A run, for which preferences it answers, and the reference point, where that is not the card's."""

    run: RunHandle
    preferences: Sequence[Preference]
    corner: tuple[float, ...] | None


def evaluate_runs(
    runs: Iterable[RunHandle],
    vectors: Sequence[str],
    grid: int | None,
    corner: str | None,
    samples: int | None,
    progress: Progress,
) -> list[EvalResult]:
    """Evaluate each run once, in order; raises RequestError before the first answer for what does not fit a run."""
    requests = [_checked(run, vectors, grid, corner) for run in {run.path.resolve(): run for run in runs}.values()]
    results = []
    for request in requests:
        results.append(_evaluated(request, samples, progress))
        memory.release()  # no local of this function holds the run's models
    return results


def _checked(run: RunHandle, vectors: Sequence[str], grid: int | None, corner: str | None) -> Request:
    method, context = run.open()
    wanted = arguments.requested(vectors, grid, context.task.card.objective_words)
    point = None if corner is None else arguments.reference_point(corner, context.task.names)
    return Request(run, evaluation.preferences_for(method, context, wanted), point)


def _evaluated(request: Request, samples: int | None, progress: Progress) -> EvalResult:
    method, context = request.run.open(progress)
    with contextlib.closing(context.task):
        made = evaluation.evaluate(method, context, request.preferences, progress, samples)
    return made.result if request.corner is None else evaluation.at_reference(made, context.task, request.corner)

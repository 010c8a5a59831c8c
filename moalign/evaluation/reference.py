"""The same evaluation seen from another reference point (``moalign eval RUN --ref``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moalign.evaluation.evaluate import Evaluation
from moalign.pareto import statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.tasks.task import Task


def at_reference(made: Evaluation, task: Task, ref: Sequence[float]) -> dict[str, Any]:
    """Return the evaluation's numbers with hypervolume, interval and optimal share from ``ref``.

    Args:
        made: an evaluation; its stored file stays as it is.
        task: gives the bootstrap's draws and seed, so that the interval is of the same resamples.
        ref: reference point in normalised units, ``[objectives]``.
    """
    spec = task.card.evaluation
    drawn = statistics.bootstrap_means(made.scores, spec.bootstrap, spec.seed)
    volumes = statistics.each_draw(drawn, lambda means: hypervolume(means, ref))
    told = {
        **made.told,
        "hypervolume": hypervolume(made.scores.mean(axis=0), ref),
        "hypervolume_ci": list(statistics.interval(volumes)),
        "ref": [float(number) for number in ref],
    }
    told.pop("generalisation", None)  # its hypervolumes are from the card's own reference point
    if told["optimal_share"] is not None:
        most = hypervolume(np.array(told["optimum"]["points"]), ref)
        # A reference point above the whole optimum leaves no volume to take a share of.
        told["optimal_share"] = told["hypervolume"] / most if most > 0 else None
        told["optimal_share_ci"] = [volume / most for volume in told["hypervolume_ci"]] if most > 0 else None
        told["optimum"] = {**told["optimum"], "hypervolume": most}
    return told

"""The same evaluation with another reference point (``moalign eval RUN --ref``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moalign.evaluation.evaluate import Evaluation
from moalign.pareto import statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.tasks.task import Task


def at_reference(evaluation: Evaluation, task: Task, ref: Sequence[float]) -> dict[str, Any]:
    """Return the evaluation's numbers with hypervolume, interval and optimal share from ``ref``.

    Args:
        evaluation: its stored file is not changed.
        task: gives the bootstrap's draws and seed, so that the interval is of the same resamples.
        ref: reference point in normalised units, ``[objectives]``.
    """
    spec = task.card.evaluation
    drawn = statistics.bootstrap_means(evaluation.scores, spec.bootstrap, spec.seed)
    volumes = statistics.each_draw(drawn, lambda means: hypervolume(means, ref))
    record = {
        **evaluation.told,
        "hypervolume": hypervolume(evaluation.scores.mean(axis=0), ref),
        "hypervolume_ci": list(statistics.interval(volumes)),
        "ref": [float(number) for number in ref],
    }
    record.pop("generalisation", None)  # its hypervolumes are from the card's own reference point
    if record["optimal_share"] is not None:
        most = hypervolume(np.array(record["optimum"]["points"]), ref)
        # A reference point above the whole optimum leaves no volume to take a share of.
        record["optimal_share"] = record["hypervolume"] / most if most > 0 else None
        record["optimal_share_ci"] = [volume / most for volume in record["hypervolume_ci"]] if most > 0 else None
        record["optimum"] = {**record["optimum"], "hypervolume": most}
    return record

"""What a run's answers are worth to the task's groups of users, and to the group that they are worst for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.evaluation.result import GroupUtilities
from moalign.pareto import statistics
from moalign.tasks.task import Task


def of_groups(task: Task, preferences: Sequence[Preference], scores: Matrix) -> GroupUtilities | None:
    """Return it for normalised scores ``[prompts, preferences, objectives]``; None: the task knows of no groups."""
    names = task.user_groups
    if names is None:
        return None
    lo, hi = np.array(task.judge_normaliser.lo), np.array(task.judge_normaliser.hi)
    each = task.group_utilities(lo + scores * (hi - lo))
    means, spec = each.mean(axis=0), task.card.evaluation
    low, high = statistics.interval(statistics.resample([each], spec.bootstrap, spec.seed).each(worst))
    best = int(means.min(axis=1).argmax())
    return GroupUtilities(
        names=tuple(names),
        utilities=tuple(map(tuple, means.tolist())),
        preference=preferences[best],
        group=names[int(means[best].argmin())],
        worst=worst(means),
        worst_interval=(float(low), float(high)),
    )


def worst(utilities: Matrix) -> float:
    """Return the utility of the worst-off group, ``[preferences, groups]``, at the preference where it is largest."""
    return float(utilities.min(axis=-1).max())

"""What a policy reaches of the best that is possible at its own KL to base.

A method that keeps close to the base earns less than one that moves far, whatever its quality. Where a task knows the
optimum at every KL (:class:`moalign.tasks.frontier.Frontier`), the two can be compared: with n the normalised rewards
of the judge,

    share = (w.n(policy) - w.n(base)) / (w.n(optimum at the policy's KL) - w.n(base)),

averaged over the preferences, and the KL-regularised regret is ``w.n(optimum at the policy's KL) - w.n(policy)``. The
optimum is that of w.z, as for the plain regret; z and n differ in each objective's unit, so that a share above 1 is
possible, but in practice it is noise.

A KL that is only bounded from above is not known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moalign.core.preferences import Preference
from moalign.evaluation.result import EvalResult, FrontierCurve, OptimumAtKl
from moalign.tasks.task import Task

LEAST = 0.01
"""Nats. The optimum of a policy that moved less gains about as little as noise does: such a policy has no share."""


def add(result: EvalResult, task: Task) -> None:
    """Fill in the optimum at each point's KL, the share of it, the regularised regret and the frontier, if known."""
    known = [point for point in result.points if point.kl is not None and not point.kl_bound]
    frontiers = task.frontier([point.preference for point in result.points]) if known else None
    if frontiers is None:
        return
    unit = task.judge_normaliser.unit
    shares, regrets = [], []
    for point, frontier in zip(result.points, frontiers, strict=True):
        if point.kl is None or point.kl_bound:
            continue
        base, best = (unit(frontier.at_kl(kl)[None])[0] for kl in (0.0, point.kl))
        w = np.array(point.preference)
        point.optimum_at_kl = OptimumAtKl(mean=best.tolist(), utility=float(w @ best))
        regrets.append(float(w @ best - w @ point.mean))
        if point.kl >= LEAST:
            shares.append(float((w @ point.mean - w @ base) / (w @ best - w @ base)))
    if len(known) == len(result.points):
        result.indicators.regularised_regret = float(np.mean(regrets))
    if len(shares) == len(result.points):
        result.share_at_kl = float(np.mean(shares))
    curves = []
    for k in drawn([point.preference for point in result.points]):
        kls, raw = frontiers[k].curve()
        curves.append(
            FrontierCurve(
                preference=result.points[k].preference, kl=kls.round(4).tolist(), mean=unit(raw).round(5).tolist()
            )
        )
    result.frontier = tuple(curves)


def drawn(preferences: Sequence[Preference]) -> list[int]:
    """Return which preferences the frontier is kept for: the corners, and the one closest to equal weights."""
    middle = max(range(len(preferences)), key=lambda k: (min(preferences[k]), -max(preferences[k])))
    return [k for k, w in enumerate(preferences) if k == middle or max(w) == 1.0]

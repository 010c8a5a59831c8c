"""Indicators beside the hypervolume: how well the policies obey, how useful and how even the front is.

Shapes throughout: k preferences, m objectives. Row i of ``means`` is the mean (normalised) reward vector of the policy
conditioned on row i of ``preferences``. Larger is better.
"""

from __future__ import annotations

import math
from typing import TypedDict

import moocore  # type: ignore[import-untyped,unused-ignore]
import numpy as np
from numpy.typing import ArrayLike

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto.front import check_points, nondominated, refuse_unless_finite

_ROUNDING = 1e-12
"""Means that differ by less than this, relative to the largest of the objective, are tied."""


class Controllability(TypedDict):
    """Kendall's tau-b between requested weight and achieved mean: averaged, and per objective ``[m]``."""

    tau: float
    per_objective: list[float]


def kendall_tau(x: ArrayLike, y: ArrayLike, tolerance: float = 0.0) -> float:
    """Return Kendall's tau-b of two equally long sequences ``[n]``; 0.0 when either is all ties.

    tau-b = sum over pairs of sign(dx) sign(dy) / sqrt(untied pairs of x * untied pairs of y)
    (Kendall 1945). Values of ``y`` that differ by at most ``tolerance`` are tied.
    """
    # scipy.stats.kendalltau agrees (tests hold it), but knows no tolerance, and half a second goes into its import.
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    for values, name in ((first, "x"), (second, "y")):
        if values.ndim != 1 or not values.size:
            raise RequestError(f"Kendall's tau: {name} has shape {values.shape}; a plain list of numbers is needed")
        refuse_unless_finite(values, f"Kendall's tau: {name}")
    if len(first) != len(second):
        raise RequestError(
            f"Kendall's tau: x has {len(first)} values and y has {len(second)}; as many of each are needed"
        )
    agreement = untied_x = untied_y = 0
    for at_x, at_y in zip(first, second, strict=True):  # in rows: the matrix of all pairs need not fit into memory
        sign_x = (at_x > first).astype(np.int64) - (at_x < first)
        sign_y = (at_y > second + tolerance).astype(np.int64) - (second > at_y + tolerance)
        agreement += int(sign_x @ sign_y)
        untied_x += int(np.count_nonzero(sign_x))
        untied_y += int(np.count_nonzero(sign_y))
    if not untied_x or not untied_y:
        return 0.0
    return max(-1.0, min(1.0, agreement / math.sqrt(untied_x * untied_y)))


def controllability(preferences: ArrayLike, means: ArrayLike) -> Controllability:
    """Return Kendall's tau-b between w_i and mean n_i over the grid (both ``[k, m]``), per objective and averaged.

    Differences within floating-point rounding count as ties, so that a policy that ignores its preference scores 0.
    """
    weights, achieved = _paired(preferences, means)
    taus = [
        kendall_tau(weights[:, i], achieved[:, i], tolerance=_ROUNDING * float(np.abs(achieved[:, i]).max()))
        for i in range(weights.shape[1])
    ]
    return {"tau": math.fsum(taus) / len(taus), "per_objective": taus}


def inner_product(preferences: ArrayLike, means: ArrayLike) -> float:
    """Return MIP: the mean over preferences ``[k, m]`` of w.n of the policy conditioned on w (``means`` ``[k, m]``)."""
    weights, achieved = _paired(preferences, means)
    return float((weights * achieved).sum(axis=1).mean())


def expected_utility(preferences: ArrayLike, means: ArrayLike) -> float:
    """Return EUM: the mean over preferences ``[k, m]`` of the best w.n over all points ``[n, m]``.

    Never below :func:`inner_product` of the same arguments: here each preference picks its point.
    """
    weights, achieved = check_points(preferences, what="preferences"), check_points(means, what="means")
    _same_objectives(weights, achieved, "preferences", "means")
    return float((weights @ achieved.T).max(axis=1).mean())


def regret(preferences: ArrayLike, means: ArrayLike, optimum_means: ArrayLike) -> Matrix:
    """Return, per preference ``[k]``, w.(optimum - achieved); all three arguments are ``[k, m]``.

    Row i of ``optimum_means`` is the best mean reward vector for preference i. Sampling noise can
    make a regret slightly negative; it is not clipped.
    """
    weights, achieved = _paired(preferences, means)
    best = check_points(optimum_means, what="optimum_means")
    if best.shape != weights.shape:
        raise RequestError(f"optimum_means: found shape {best.shape}; needed: {weights.shape}, that of the preferences")
    return np.asarray((weights * (best - achieved)).sum(axis=1), dtype=np.float64)


def igd_plus(points: ArrayLike, reference_front: ArrayLike) -> float:
    """Return IGD+: the mean over the reference front ``[r, m]`` of the distance still missing to reach it.

    Distance from reference z to point a: ``|max(z - a, 0)|`` (Ishibuchi et al. 2015); the nearest of
    ``points`` ``[n, m]`` counts. 0 when every reference point is weakly dominated.
    """
    table, front = check_points(points), check_points(reference_front, what="reference front")
    _same_objectives(table, front, "points", "the reference front")
    return float(moocore.igd_plus(table, ref=front, maximise=True))


def spacing(points: ArrayLike) -> float:
    """Return Schott's spacing of the non-dominated points: the sd (n - 1) of the L1 distances to the nearest one.

    0 means evenly spread. With fewer than two non-dominated points it is 0 and says nothing, so
    show it only beside hypervolume and the size of the front.
    """
    front = check_points(points)[nondominated(points)]
    if len(front) < 2:
        return 0.0
    gaps = np.abs(front[:, None, :] - front[None, :, :]).sum(axis=2)
    np.fill_diagonal(gaps, np.inf)
    return float(gaps.min(axis=1).std(ddof=1))


def sparsity(points: ArrayLike) -> float:
    """Return the sparsity of the n non-dominated points: squared gaps of neighbours, over all objectives, / (n - 1).

    Xu et al. 2020 (PGMORL). Lower is denser; a single point scores 0, so show it only beside hypervolume.
    """
    front = check_points(points)[nondominated(points)]
    if len(front) < 2:
        return 0.0
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / (len(front) - 1))


def _paired(preferences: ArrayLike, means: ArrayLike) -> tuple[Matrix, Matrix]:
    weights, achieved = check_points(preferences, what="preferences"), check_points(means, what="means")
    if weights.shape != achieved.shape:
        raise RequestError(
            f"found preferences of shape {weights.shape} and means of shape {achieved.shape}; "
            "needed: the same, one row of means per preference"
        )
    return weights, achieved


def _same_objectives(first: Matrix, second: Matrix, first_name: str, second_name: str) -> None:
    if first.shape[1] != second.shape[1]:
        counts = f"{first_name} have {first.shape[1]} objectives and {second_name} {second.shape[1]}"
        raise RequestError(f"{counts}; needed: the same number")

"""Hypervolume for maximisation: the one place where moocore's sign is decided.

The hypervolume is the volume of the union of the boxes [ref, point]. It rewards both distance and spread; the reference
point belongs to the task card, because it can flip a ranking.
"""

from __future__ import annotations

import math

import moocore  # type: ignore[import-untyped,unused-ignore]
import numpy as np
from numpy.typing import ArrayLike

from moalign.core.errors import RequestError
from moalign.pareto.front import check_points, check_ref

EXACT_UP_TO = 1000
"""Points up to which the last digit is independent of their order; beyond, 1.1 times moocore's own time counts more."""


def hypervolume(points: ArrayLike, ref: ArrayLike) -> float:
    """Return the volume of the union of the boxes [ref, point], of points ``[n, m]`` and ref ``[m]``.

    A point that is not strictly above ``ref`` in every objective adds nothing. For up to :data:`EXACT_UP_TO` points
    (every front of a grid of preferences) the result is the same to the last digit when points are permuted or
    dominated points are added; for more, up to rounding.

    Raises RequestError for NaN, infinity, wrong shapes, or a volume beyond the range of a float.

    >>> hypervolume([[1, 3], [2, 2], [3, 1]], ref=[0, 0])
    6.0
    """
    table = check_points(points)
    corner = check_ref(ref, table.shape[1])
    if len(table) <= EXACT_UP_TO:
        table = table[(table > corner).all(axis=1)]
        # moocore's order of summation follows the input's where coordinates tie; a fixed order of mutually
        # non-dominated points makes the last digits independent of it.
        table = table[np.lexsort(table.T)]
        if len(table):
            table = table[np.asarray(moocore.is_nondominated(table, maximise=True))]
    # moocore minimises: negated here, once, which is also quicker than its own ``maximise``.
    volume = float(moocore.hypervolume(-table, ref=-corner)) if len(table) else 0.0
    if not math.isfinite(volume):
        raise RequestError("hypervolume: the volume exceeds the range of a float; normalise the objectives first")
    return volume


def adds_nothing(points: ArrayLike, ref: ArrayLike) -> int:
    """Count the points ``[n, m]`` that are not strictly above ``ref`` ``[m]`` in every objective."""
    table = check_points(points)
    return int((~(table > check_ref(ref, table.shape[1])).all(axis=1)).sum())


def optimal_share(points: ArrayLike, optimum: ArrayLike, ref: ArrayLike) -> float:
    """Return the hypervolume of ``points`` divided by that of ``optimum`` (both ``[*, m]``), same ``ref``.

    Raises RequestError when the optimum has no volume above ``ref``.
    """
    best = hypervolume(optimum, ref)
    if best <= 0:
        raise RequestError(
            "optimal share: the optimum has no hypervolume above the reference point; lower the reference"
        )
    return hypervolume(points, ref) / best

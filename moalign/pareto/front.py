"""Checked points, the non-dominated set, and layers. Larger is better in every objective.

moocore minimises by default and accepts NaN silently (a NaN row is ranked 0), so every function of this package checks
its points here first.
"""

from __future__ import annotations

import moocore  # type: ignore[import-untyped,unused-ignore]
import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.preferences import MOST_OBJECTIVES


def check_points(points: ArrayLike, what: str = "points") -> Matrix:
    """Return a copy of ``points`` ``[n, m]``, n >= 1 and m >= 1, all finite; ``what`` is how a message calls them.

    Raises RequestError for what is no such table of numbers; NaN and infinity with their row, counted from 1.
    """
    table = _numbers(points, what)
    if table.ndim != 2:
        shape = "x".join(str(size) for size in table.shape) or "a single number"
        raise RequestError(f"{what}: found {table.ndim} dimensions ({shape}); needed: 2, one row per point")
    if table.size == 0:
        raise RequestError(
            f"{what}: empty ({table.shape[0]} rows, {table.shape[1]} columns); at least one of each is needed"
        )
    if table.shape[1] > MOST_OBJECTIVES:
        raise RequestError(f"{what}: found {table.shape[1]} objectives; at most {MOST_OBJECTIVES} are possible")
    refuse_unless_finite(table, what)
    return table


def check_ref(ref: ArrayLike, objectives: int, where: str = "the reference point") -> Matrix:
    """Return a copy of the reference point ``[objectives]``, or raise RequestError naming ``where``."""
    numbers = _numbers(ref, where)
    if numbers.shape != (objectives,):
        shown = f"{numbers.size} number{'s' if numbers.size != 1 else ''}" if numbers.ndim == 1 else "no plain list"
        raise RequestError(f"{where}: found {shown}; needed: {objectives}, one per objective")
    if not np.isfinite(numbers).all():
        raise RequestError(f"{where}: found {_row_text(numbers)}; only finite numbers are allowed")
    return numbers


def refuse_unless_finite(table: Matrix, what: str) -> None:
    """Raise RequestError naming the first row (from 1) of ``table`` ``[n, ...]`` with NaN or infinity."""
    if np.isfinite(table).all():  # at once: row by row only to name the first bad one
        return
    bad = np.flatnonzero(~np.isfinite(table.reshape(len(table), -1)).all(axis=1))
    row = int(bad[0])
    more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
    shown = f"row {row + 1} of {len(table)} is {_row_text(table[row].ravel())}{more}"
    raise RequestError(f"{what}: {shown}; only finite numbers are allowed")


def nondominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask ``[n]`` of points that no other point dominates; of equal points only the first counts.

    A point dominates another when it is at least as large in every objective and larger in one.
    """
    return np.asarray(moocore.is_nondominated(check_points(points), maximise=True), dtype=np.bool_)


def layers(points: ArrayLike) -> NDArray[np.int64]:
    """Return the layer ``[n]`` of each point: 0 for the first front, 1 for the front once 0 is gone, and so on.

    Equal points share a layer.
    """
    # pymoo's NonDominatedSorting is this call, with the points of each front listed one by one after it.
    return np.asarray(moocore.pareto_rank(check_points(points), maximise=True), dtype=np.int64)


def _numbers(values: ArrayLike, what: str) -> Matrix:
    try:
        array = np.asarray(values)
    except ValueError:
        raise RequestError(f"{what}: rows of different lengths; every row needs one number per objective") from None
    if array.size and array.dtype.kind not in "biuf":
        raise RequestError(f"{what}: found values of type {array.dtype}; needed: numbers")
    return np.array(array, dtype=np.float64)


def _row_text(row: Matrix) -> str:
    shown = ", ".join(f"{value:g}" for value in row[:6])
    return f"({shown}{', ...' if len(row) > 6 else ''})"

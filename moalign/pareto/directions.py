"""Points near the direction that a preference names: ParetoHqD's selection (arXiv 2504.16628), as pure numpy.

A preference w is the ray that starts at the ideal point r_max and goes through the compromise point
``W = r_min + w * (r_max - r_min)``. Points are first put into the unit square (cube, ...) of their bounds, where the
ideal point is (1, ..., 1) and W is w itself.

Choices of ours (the paper gives none): the bounds are the 0.1 % and 99.9 % quantiles, and a point beyond one counts as
on it, so that no outlier moves the ideal point or is far from the ray for being too good; of equal distances the point
nearer to the ideal one goes first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto.front import check_points, layers

Rows = NDArray[np.intp]

BOUND_QUANTILES = (0.001, 0.999)
"""What counts as componentwise worst and best."""


def unit_box(points: ArrayLike, names: Sequence[str] | None = None, what: str = "points") -> Matrix:
    """Return ``points`` ``[n, m]`` with their bounds at 0 and 1 in every objective, clipped to them.

    Raises RequestError for bad points, or naming an objective (``names``, else its number) that does not vary between
    its bounds: it gives no direction.
    """
    table = check_points(points, what=what)
    low, high = np.quantile(table, BOUND_QUANTILES, axis=0)
    for column in range(table.shape[1]):
        spread = high[column] - low[column]
        # A constant such as 0.1 can differ from itself by rounding in an interpolated quantile.
        if not spread > 1e-12 * max(1.0, abs(float(high[column])), abs(float(low[column]))):
            name = f"objective {names[column]!r}" if names is not None else f"objective {column + 1}"
            raise RequestError(
                f"{what}: {name} is constant: its {BOUND_QUANTILES[0]:.1%} and {BOUND_QUANTILES[1]:.1%} quantiles over "
                f"{len(table)} points are both {high[column]:g}; no direction can be drawn along it, so remove it "
                "from the task or change its scorer"
            )
    return np.asarray(np.clip((table - low) / (high - low), 0.0, 1.0))


def direction(preference: Sequence[float]) -> Matrix:
    """Return the unit vector ``[m]`` from the ideal point to the compromise point, in the unit box.

    With a single objective the two coincide and the vector is 0: distances are then those to the ideal point.
    """
    towards = np.asarray(preference, dtype=np.float64) - 1.0
    length = float(np.linalg.norm(towards))
    return towards / length if length > 0 else towards


def ray_distances(unit: ArrayLike, preference: Sequence[float]) -> tuple[Matrix, Matrix]:
    """Return each point's distance to the preference's ray, and how far along the ray its nearest point lies.

    ``v = r - r_max``, ``t = max(0, v . u)``, ``d = ||v - t u||``; returns ``(d, t)``, each ``[n]``, of the points
    ``unit`` ``[n, m]`` in the unit box. Raises RequestError when the preference has another length than the points.
    """
    points = check_points(unit)
    if points.shape[1] != len(preference):
        raise RequestError(f"a preference of {len(preference)} weights for points of {points.shape[1]} objectives")
    towards = direction(preference)
    away = points - 1.0
    along = np.maximum(0.0, away @ towards)
    return np.linalg.norm(away - along[:, None] * towards, axis=1), along


@dataclass(frozen=True)
class Pool:
    """The first non-dominated layers of scored responses."""

    rows: Rows
    """Which of the given points are in the pool, ``[pool]``."""
    unit: Matrix
    """The pool's points in the unit box of all given points, ``[pool, objectives]``."""
    groups: Rows
    """Index of the prompt that each point answers, ``[pool]``."""
    layers: int
    """How many layers the pool holds."""

    @classmethod
    def of(
        cls,
        points: ArrayLike,
        prompts: Sequence[Hashable],
        k: int,
        at_least: int,
        names: Sequence[str] | None = None,
        what: str = "points",
    ) -> Pool:
        """Take whole layers until they hold ``at_least`` points (or all there are) of at least k prompts.

        One layer is far too few: a dozen of 100,000 random points. ``points`` ``[n, m]`` answer ``prompts`` ``[n]``;
        ``names`` of objectives and ``what`` are for messages.

        Raises RequestError for points that are no table of finite numbers, fewer than k prompts, or a constant
        objective.
        """
        table = check_points(points, what=what)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        groups = np.array([numbers[prompt] for prompt in prompts], dtype=np.intp)
        if len(groups) != len(table):
            raise ValueError(f"{len(groups)} prompts for {len(table)} points")
        if len(numbers) < k:
            raise RequestError(
                f"{what}: k = {k} points of different prompts are asked for, and there are {len(numbers)} prompts "
                f"({len(table)} points); allowed: k <= {len(numbers)}"
            )
        unit = unit_box(table, names, what)
        layer = layers(table)
        # The layer in which the pool is full, and the one in which the k-th prompt first appears.
        full = np.sort(layer)[min(at_least, len(table)) - 1]
        first_seen = np.full(len(numbers), np.iinfo(np.int64).max)
        np.minimum.at(first_seen, groups, layer)
        last = max(int(full), int(np.sort(first_seen)[k - 1]))
        rows = np.flatnonzero(layer <= last)
        return cls(rows, unit[rows], groups[rows], last + 1)


def nearest(pool: Pool, preference: Sequence[float], k: int) -> tuple[Rows, Matrix]:
    """Return the k points nearest to the preference's ray, at most one of each prompt, nearest first.

    They are row numbers into the points that the pool was made of, ``[k]``; with their distances ``[k]``. Raises
    RequestError when the pool has fewer than k prompts.
    """
    apart, along = ray_distances(pool.unit, preference)
    order = np.lexsort((along, apart))
    # The first place at which each prompt appears in the order is its nearest response.
    firsts = np.sort(np.unique(pool.groups[order], return_index=True)[1])
    if len(firsts) < k:
        raise RequestError(f"{k} points of different prompts are asked for; the pool has {len(firsts)} prompts")
    chosen = order[firsts[:k]]
    return pool.rows[chosen], apart[chosen]


def representatives(grid: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the m + 1 preferences of ``grid`` that stand for it: the nearest to each corner, and the
    nearest to equal weights; each once, in increasing order. Of equally near ones the first counts.
    """
    vectors = check_points(grid, what="preferences")
    m = vectors.shape[1]
    targets = np.vstack([np.eye(m), np.full((1, m), 1.0 / m)])
    apart = np.linalg.norm(vectors[None] - targets[:, None], axis=2).round(12)
    return sorted({int(row.argmin()) for row in apart})

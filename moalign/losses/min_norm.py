"""The point of a simplex of vectors that is nearest to the origin, from their Gram matrix.

``min_norm(Q Q^T)`` solves ``argmin_c || sum_i c_i q_i ||^2`` over the simplex. Two vectors have a closed form. For
more, Frank-Wolfe steps choose which vector enters, and after each the weights of the vectors in use are set to their
exact optimum (Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11, 1976): plain Frank-Wolfe
crawls when the point lies on a face, this ends after a few rounds at machine precision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from moalign.core.arrays import Matrix
from moalign.core.errors import WorkError

GAP = 1e-12
"""Largest duality gap left, relative to the largest squared length."""

TRIVIAL = 1e-14
"""Weights below this are zero."""


def min_norm(gram: ArrayLike) -> Matrix:
    """Return the weights ``[m]`` of the min-norm point, non-negative, summing to 1.

    ``gram`` ``[m, m]`` holds the inner products of the vectors, of any scale. A zero vector gets all the weight, since
    it is the nearest point; when all are zero, or two are the same, the weights are even.

    Raises WorkError when an entry is NaN or infinite (training diverged, or a reward is not finite), ValueError for
    what is no Gram matrix.
    """
    g = _checked(np.asarray(gram, dtype=np.float64))
    size, scale = len(g), float(np.diag(g).max())
    if scale == 0 or size == 1:
        return np.full(size, 1 / size)
    g = g / scale
    return _two(g) if size == 2 else _many(g)


def _checked(g: Matrix) -> Matrix:
    if g.ndim != 2 or g.shape[0] != g.shape[1] or len(g) == 0:
        raise ValueError(f"a Gram matrix is square and not empty; found the shape {g.shape}")
    if not np.isfinite(g).all():
        # The diagonal is the vector's own: an entry off it may be the fault of either.
        own = np.flatnonzero(~np.isfinite(np.diag(g)))
        row = int(own[0]) if len(own) else int(np.argwhere(~np.isfinite(g))[0, 0])
        worst = g[row][~np.isfinite(g[row])][0]
        raise WorkError(
            f"min-norm: vector {row + 1} of {len(g)} has an inner product of {worst}; finite numbers are needed "
            "(a reward or a log-probability is not finite, or training has diverged: lower the learning rate)"
        )
    if (np.diag(g) < 0).any():
        raise ValueError("a Gram matrix has no negative number on its diagonal")
    if not np.allclose(g, g.T, rtol=1e-6, atol=1e-9 * float(np.abs(g).max())):
        raise ValueError("a Gram matrix is symmetric")
    return (g + g.T) / 2


def _two(g: Matrix) -> Matrix:
    """``c_1 = clip(<q2, q2 - q1> / ||q1 - q2||^2, 0, 1)``."""
    apart = g[0, 0] + g[1, 1] - 2 * g[0, 1]
    first = 0.5 if apart <= 0 else float(np.clip((g[1, 1] - g[0, 1]) / apart, 0.0, 1.0))
    return np.array([first, 1 - first])


def _many(g: Matrix) -> Matrix:
    size = len(g)
    c = np.zeros(size)
    c[int(np.argmin(np.diag(g)))] = 1.0
    for _ in range(20 * size):
        slope = g @ c
        enters = int(np.argmin(slope))
        if c @ slope - slope[enters] <= GAP:
            break
        before = float(c @ slope)
        c = _optimum_in_use(g, c, enters)
        if c @ g @ c >= before:  # no progress is left in double precision
            break
    return np.asarray(c / c.sum())


def _optimum_in_use(g: Matrix, c: Matrix, enters: int) -> Matrix:
    """Return the min-norm weights over the vectors in use and ``enters``, by dropping those that would be negative."""
    used = sorted({*np.flatnonzero(c > 0).tolist(), enters})
    while True:
        optimum = np.zeros(len(g))
        optimum[used] = _affine(g[np.ix_(used, used)])
        if (optimum[used] > TRIVIAL).all():
            return optimum
        # Go from c towards the wanted weights as far as the simplex reaches; the vector met there leaves.
        leaving = [i for i in used if optimum[i] <= TRIVIAL]
        reach = {i: c[i] / (c[i] - optimum[i]) if c[i] > optimum[i] else 0.0 for i in leaving}
        out = min(reach, key=reach.__getitem__)
        c = np.maximum(c + reach[out] * (optimum - c), 0.0)
        c[out] = 0.0
        used.remove(out)
        if len(used) == 1:
            alone = np.zeros(len(g))
            alone[used] = 1.0
            return alone


def _affine(part: Matrix) -> Matrix:
    """Return weights that sum to 1 and make all slopes equal: the min-norm point of the plane through some vectors."""
    size = len(part)
    kkt = np.ones((size + 1, size + 1))
    kkt[:size, :size] = part
    kkt[size, size] = 0.0
    right = np.zeros(size + 1)
    right[size] = 1.0
    # Least squares also answers when vectors coincide or lie on one line.
    solution = np.linalg.lstsq(kkt, right, rcond=None)[0]
    return np.asarray(solution[:size], dtype=np.float64)

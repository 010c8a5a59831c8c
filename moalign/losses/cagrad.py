"""Conflict-averse gradient descent with clipped weights, from the gradients' Gram matrix.

Source: RACO, arXiv 2602.02495, algorithm 1 (CAGrad-Clip); CAGrad, arXiv 2110.14048. For gradients g_k, weights w and
``g_0 = sum_k w_k g_k``, with ``g_p = sum_k p_k g_k``:

    p* = argmin over the simplex of  phi(p) = g_p . g_0 + c |g_0| |g_p|
    q_k = min(p*_k, w_k)                     not made to sum to 1 again
    step = g_0 + c |g_0| g_q / |g_q|         g_0 where g_q = 0

p* is exact, by enumeration of the simplex's faces: phi is convex, so one of them has its minimum inside. With the Gram
matrix H of a face's gradients, ``b_k = g_k . g_0`` and ``s = c |g_0|``, inside it ``H p = (|g_p| / s) (nu 1 - b)``, nu
the larger root of ``(nu 1 - b)' H^-1 (nu 1 - b) = s^2``: a closed form. On a face of linearly dependent gradients phi
does not change along some line, which leads to a smaller face, unless the gradients cancel there: that is the min-norm
point (:mod:`moalign.losses.min_norm`), where phi = 0.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from moalign.core.arrays import Matrix
from moalign.losses.min_norm import min_norm

SINGULAR = 1e-10
"""Smallest eigenvalue, of the largest, at which gradients are taken for linearly independent."""
ZERO = 1e-20
"""A squared length below this, of the largest, is that of nothing but rounding."""


def step_weights(gram: ArrayLike, weights: ArrayLike, c: float) -> tuple[Matrix, Matrix]:
    """Return ``(a, q)``, ``[m]`` each: the step is ``sum_k a_k g_k``, and q are the clipped weights in it.

    Args:
        gram: inner products of the gradients, ``[m, m]``, finite.
        weights: the preference, ``[m]``.
        c: how far the step may be from g_0, in lengths of g_0; 0: a = w.
    """
    h, w = np.asarray(gram, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    q = np.minimum(conflict_averse(h, w, c), w)
    length, mixed, scale = float(w @ h @ w), float(q @ h @ q), float(np.diag(h).max())
    if mixed <= ZERO * scale:
        return w, q
    return w + c * np.sqrt(max(length, 0.0) / mixed) * q, q


def conflict_averse(gram: ArrayLike, weights: ArrayLike, c: float) -> Matrix:
    """Return p*, ``[m]``; w itself where ``g_0 = 0``, as all points of the simplex are alike there."""
    h, w = np.asarray(gram, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    h = h / max(float(np.diag(h).max()), np.finfo(float).tiny)
    squared = float(w @ h @ w)
    if squared <= ZERO:
        return w
    b, s = h @ w, c * np.sqrt(squared)
    points = [min_norm(h)]
    for size in range(1, len(h) + 1):
        for face in map(list, combinations(range(len(h)), size)):
            inside = _stationary(h[np.ix_(face, face)], b[face], s)
            if inside is not None:
                points.append(np.zeros(len(h)))
                points[-1][face] = inside
    return min(points, key=lambda p: float(b @ p + s * np.sqrt(max(float(p @ h @ p), 0.0))))


def _stationary(h: Matrix, b: Matrix, s: float) -> Matrix | None:
    """Return the point inside a face where phi is stationary; None: there is none, or the gradients are dependent."""
    if len(h) == 1:
        return np.ones(1)
    values = np.linalg.eigvalsh(h)
    if values[0] <= SINGULAR * values[-1]:
        return None
    ones, slopes = np.linalg.solve(h, np.ones(len(h))), np.linalg.solve(h, b)
    first, second, third = ones.sum(), slopes.sum(), b @ slopes
    root = second**2 - first * (third - s**2)
    if root <= 0:
        return None
    p = (second + np.sqrt(root)) / first * ones - slopes
    p = p / np.sqrt(root)
    return None if (p < 0).any() else np.asarray(p)

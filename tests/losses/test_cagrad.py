"""Conflict-averse steps: by hand, by the paper's quadratic, by a grid, and what a step of them does to each loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from moalign.losses.cagrad import conflict_averse, step_weights
from moalign.losses.min_norm import min_norm

Matrix = NDArray[np.float64]


def phi(g: Matrix, w: Matrix, c: float, p: Matrix) -> float:
    """The dual problem from the gradients themselves, ``[m, parameters]``."""
    g0, gp = w @ g, p @ g
    return float(gp @ g0 + c * np.linalg.norm(g0) * np.linalg.norm(gp))


def by_the_quadratic(g: Matrix, w: Matrix, c: float) -> Matrix:
    """The paper's closed form for two objectives, appendix: roots of h'(x) = 0 in [0, 1], and both ends."""
    g0 = w @ g
    slope, s = float((g[0] - g[1]) @ g0), c * np.linalg.norm(g0)
    q = np.array([(g[0] - g[1]) @ (g[0] - g[1]), 2 * (g[0] @ g[1] - g[1] @ g[1]), g[1] @ g[1]])
    roots = np.roots(
        [
            slope**2 * q[0] - s**2 * q[0] ** 2,
            slope**2 * q[1] - s**2 * q[1] * q[0],
            slope**2 * q[2] - s**2 * q[1] ** 2 / 4,
        ]
    )
    candidates = [0.0, 1.0, *(float(x.real) for x in roots if abs(x.imag) < 1e-12 and 0 <= x.real <= 1)]
    return min((np.array([x, 1 - x]) for x in candidates), key=lambda p: phi(g, w, c, p))


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_two_gradients_that_conflict_by_hand() -> None:
    """h(x) = .6 - 1.2 x + .3 sqrt(29 x^2 - 14 x + 2): 377 x^2 - 182 x + 17 = 0, x = (182 + sqrt(7488)) / 754 = .35615.

    Clipped to (.2, .64386); g_0 = (-.6, 0), g_q = (-.44386, -.15615) of length .47052; c |g_0| / |g_q| = .63760.
    """
    g, w = np.array([[1.0, -4.0], [-1.0, 1.0]]), np.array([0.2, 0.8])
    assert conflict_averse(g @ g.T, w, 0.5) == pytest.approx([0.356145, 0.643855], abs=1e-6)
    a, q = step_weights(g @ g.T, w, 0.5)
    assert q == pytest.approx([0.2, 0.643855], abs=1e-6)
    assert a == pytest.approx([0.2 + 0.127519, 0.8 + 0.410519], abs=1e-5)
    step, g0 = a @ g, w @ g
    assert np.linalg.norm(step - g0) == pytest.approx(0.5 * 0.6)  # as far from g_0 as c lets it


def test_gradients_at_right_angles_by_hand() -> None:
    """Equal weights: equal shares, a step 1 + c times as long. At (.8, .2) phi is .8 + s and .2 + s at the ends, s =
    .4 sqrt(.68) = .32985, and nowhere stationary between: p* = (0, 1), clipped to (0, .2)."""
    assert step_weights(np.eye(2), [0.5, 0.5], 0.4)[0] == pytest.approx([0.7, 0.7])
    a, q = step_weights(np.eye(2), [0.8, 0.2], 0.4)
    assert q.tolist() == [0.0, 0.2]
    assert a == pytest.approx([0.8, 0.2 + 0.329848], abs=1e-6)


def test_opposite_gradients_shorten_the_step_and_keep_its_direction() -> None:
    """Rewards of constant sum: g_2 = -g_1. g_0 = .4 g_1 at (.7, .3), p* = (0, 1), so .4 g_1 (1 - c); 0 at (.5, .5)."""
    gram = np.array([[4.0, -4.0], [-4.0, 4.0]])
    a, _ = step_weights(gram, [0.7, 0.3], 0.4)
    assert a[0] - a[1] == pytest.approx(0.4 * 0.6)
    a, _ = step_weights(gram, [0.5, 0.5], 0.4)
    assert a.tolist() == [0.5, 0.5]


def test_three_gradients_at_right_angles_by_hand() -> None:
    """Equal weights 1/3 and lengths 1: by symmetry p* = w, the step 1 + c times g_0."""
    w = np.full(3, 1 / 3)
    assert conflict_averse(np.eye(3), w, 0.4) == pytest.approx(w)
    assert step_weights(np.eye(3), w, 0.4)[0] == pytest.approx(1.4 * w)


@pytest.mark.parametrize("gram", [np.eye(2), np.array([[17.0, -5.0], [-5.0, 2.0]]), np.zeros((2, 2))])
def test_c_0_is_the_weighted_step(gram: Matrix) -> None:
    assert step_weights(gram, [0.3, 0.7], 0.0)[0].tolist() == [0.3, 0.7]


def test_one_objective_is_its_own_step() -> None:
    assert step_weights([[4.0]], [1.0], 0.4)[0] == pytest.approx([1.4])
    assert step_weights([[0.0]], [1.0], 0.4)[0].tolist() == [1.0]


# -- by other ways ---------------------------------------------------------------------------------------------------

CASES = [(seed, size, c) for seed in range(12) for size in (2, 3) for c in (0.1, 0.4, 0.95)]


def drawn(seed: int, size: int, dimensions: int = 5) -> tuple[Matrix, Matrix]:
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(size=(size, 1)))
    common = rng.normal(size=dimensions) * rng.choice([0.0, -2.0, 2.0])
    return lengths * (rng.normal(size=(size, dimensions)) + common), rng.dirichlet(np.ones(size))


@pytest.mark.parametrize(("seed", "size", "c"), CASES)
def test_it_is_the_minimum(seed: int, size: int, c: float) -> None:
    """Two: the paper's quadratic. Any: SLSQP from several starts finds nothing lower, a grid of the simplex neither."""
    g, w = drawn(seed, size)
    p = conflict_averse(g @ g.T, w, c)
    assert (p >= 0).all()
    assert p.sum() == pytest.approx(1)
    scale = float((g * g).sum(axis=1).max())
    if size == 2:
        assert p == pytest.approx(by_the_quadratic(g, w, c), abs=1e-6)
    steps = 40
    grid = [np.array(ks) / steps for ks in np.ndindex(*(steps + 1,) * size) if sum(ks) == steps]
    lowest = min(phi(g, w, c, point) for point in grid)
    for start in (np.full(size, 1 / size), *np.eye(size) * 0.9 + 0.1 / size):
        found = minimize(
            lambda x: phi(g, w, c, x) / scale,
            start,
            bounds=[(0, 1)] * size,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-12},
        )
        x = found.x.clip(0)
        lowest = min(lowest, phi(g, w, c, x / x.sum()))
    assert phi(g, w, c, p) <= lowest + 1e-7 * scale


@pytest.mark.parametrize("seed", range(6))
def test_dependent_gradients(seed: int) -> None:
    """Three vectors of a plane, with the origin inside or outside their triangle, and one that is there twice."""
    rng = np.random.default_rng(seed)
    plane = rng.normal(size=(3, 2))
    for g in (plane, np.vstack([plane[:2], plane[:1]]), np.vstack([plane[:2], -plane[:1]])):
        w = rng.dirichlet(np.ones(3))
        p = conflict_averse(g @ g.T, w, 0.4)
        grid = [np.array(ks) / 60 for ks in np.ndindex(61, 61, 61) if sum(ks) == 60]
        assert phi(g, w, 0.4, p) <= min(phi(g, w, 0.4, point) for point in grid) + 1e-9


def test_the_larger_c_the_nearer_to_the_min_norm_point() -> None:
    g, w = drawn(3, 3)
    gram = g @ g.T
    assert conflict_averse(gram, w, 1e9) == pytest.approx(min_norm(gram), abs=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_it_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    g, w = drawn(5, 3)
    for found, wanted in zip(step_weights(scale * g @ g.T, w, 0.4), step_weights(g @ g.T, w, 0.4), strict=True):
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_without_clipping_no_direction_so_near_gains_more_for_the_worst_off(seed: int) -> None:
    """What p* is for: g_0 + c |g_0| g_p / |g_p| has the largest ``min_k <g_k, d>`` of all d within c |g_0| of g_0."""
    g, w = drawn(seed, 3)
    p, g0 = conflict_averse(g @ g.T, w, 0.4), w @ g
    radius = 0.4 * np.linalg.norm(g0)
    worst = float((g @ (g0 + radius * (p @ g) / np.linalg.norm(p @ g))).min())
    away = np.random.default_rng(seed).normal(size=(20_000, 5))
    away = radius * away / np.linalg.norm(away, axis=1, keepdims=True)
    others = ((g0 + away) @ g.T).min(axis=1)
    assert others.max() <= worst + 1e-9
    assert others.max() > worst - 0.2 * abs(worst)  # the search comes near: the bound is no empty one


# -- where it comes to rest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "chances", "beta"), [((0.7, 0.3), (0.9, 0.2), 0.2), ((0.5, 0.5), (0.8, 0.6), 0.4)])
def test_a_policy_that_is_a_table_comes_to_rest_where_the_weighted_loss_does(w: Any, chances: Any, beta: float) -> None:
    """Two answers, equally likely to the reference; objective k prefers the first with chance p_k. The weighted loss is
    least where ``sigma(beta d) = sum_k w_k p_k``, d the difference of log-probabilities: there g_0 = 0, whatever c."""
    weights, p = np.array(w), np.array(chances)
    rest = np.log(weights @ p / (1 - weights @ p)) / beta
    d = 0.0
    for _ in range(2000):
        g = beta * (1 / (1 + np.exp(-beta * d)) - p)[:, None]  # of -p log sigma(beta d) - (1 - p) log sigma(-beta d)
        a, _ = step_weights(g @ g.T, weights, 0.4)
        d -= 2.0 / beta * float((a @ g)[0])
    assert d == pytest.approx(rest, abs=1e-6)

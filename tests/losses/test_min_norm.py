"""The min-norm point of a simplex of vectors: closed form, hard cases, and two other ways to find it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from moalign.core.errors import WorkError
from moalign.losses.min_norm import min_norm

Matrix = NDArray[np.float64]


def gram(*vectors: Any) -> Matrix:
    rows = np.array(vectors, dtype=np.float64)
    return rows @ rows.T


def value(g: Matrix, c: Matrix) -> float:
    return float(c @ g @ c)


def by_enumeration(g: Matrix) -> tuple[float, Matrix]:
    """The least value over every face: where it is a face's own stationary point, that lies inside the face."""
    size = len(g)
    best, where = np.inf, np.zeros(size)
    for count in range(1, size + 1):
        for face in itertools.combinations(range(size), count):
            part = g[np.ix_(face, face)]
            kkt = np.block([[part, np.ones((count, 1))], [np.ones((1, count)), np.zeros((1, 1))]])
            weights = np.linalg.lstsq(kkt, np.eye(count + 1)[-1], rcond=None)[0][:count]
            if (weights < -1e-9).any() or abs(weights.sum() - 1) > 1e-9:
                continue
            c = np.zeros(size)
            c[list(face)] = weights.clip(0)
            c /= c.sum()
            if value(g, c) < best:
                best, where = value(g, c), c
    return best, where


def by_slsqp(g: Matrix) -> float:
    size = len(g)
    scale = float(np.diag(g).max())
    found = minimize(
        lambda c: value(g, c) / scale,
        np.full(size, 1 / size),
        jac=lambda c: 2 * g @ c / scale,
        bounds=[(0, 1)] * size,
        constraints={"type": "eq", "fun": lambda c: c.sum() - 1, "jac": lambda c: np.ones(size)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    c = found.x.clip(0)
    return value(g, c / c.sum())


def assert_optimal(g: Matrix, c: Matrix) -> None:
    """On the simplex, and no vector of it is nearer to the origin than the tangent plane at the point (KKT)."""
    scale = max(float(np.abs(np.diag(g)).max()), np.finfo(float).tiny)
    assert c.shape == (len(g),)
    assert (c >= 0).all()
    assert c.sum() == pytest.approx(1, abs=1e-12)
    assert value(g, c) - float((g @ c).min()) <= 1e-9 * scale


# -- two vectors, by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ((1, 0), (0, 1), 0.5),
        ((2, 0), (0, 1), 0.2),  # <q2, q2 - q1> / ||q1 - q2||^2 = 1 / 5
        ((1, 0), (-1, 0), 0.5),  # opposite: the origin lies between them
        ((3, 0), (-1, 0), 0.25),
        ((1, 0), (2, 0), 1.0),  # the shorter of two that point the same way
        ((1, 0), (1, 1), 1.0),  # clipped: <q2, q2 - q1> = 1 over 1
        ((4, 1), (1, 0), 0.0),
        ((1, 2), (3, 1), 1.0),  # (3, 1).(2, -1) = 5 over ||(2, -1)||^2 = 5: q1 is just the nearest
        ((2, 2), (3, -1), 0.6),  # (3, -1).(1, -3) = 6 over 10
    ],
)
def test_two_vectors_by_hand(first: Any, second: Any, wanted: float) -> None:
    c = min_norm(gram(first, second))
    assert c.tolist() == pytest.approx([wanted, 1 - wanted])


def test_three_vectors_by_hand() -> None:
    """Orthogonal vectors of lengths 1, 2, 3: weights as 1 : 1/4 : 1/9."""
    c = min_norm(gram((1, 0, 0), (0, 2, 0), (0, 0, 3)))
    assert c.tolist() == pytest.approx([36 / 49, 9 / 49, 4 / 49])


def test_a_dominated_vector_gets_no_weight() -> None:
    c = min_norm(gram((1, 0), (0, 1), (5, 5)))
    assert c.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_one_vector_has_all_the_weight() -> None:
    assert min_norm(np.array([[7.0]])).tolist() == [1.0]


# -- hard cases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_when_all_are_zero_none_is_preferred(size: int) -> None:
    assert min_norm(np.zeros((size, size))).tolist() == pytest.approx([1 / size] * size)


@pytest.mark.parametrize("others", [((1, 2), (3, 4)), ((1, 2),), ((1e-3, 0), (0, 1e5), (1, 1))])
def test_a_zero_vector_is_the_nearest_point(others: Any) -> None:
    c = min_norm(gram((0, 0), *others))
    assert c[0] == pytest.approx(1)
    assert_optimal(gram((0, 0), *others), c)


@pytest.mark.parametrize(
    "rows",
    [
        ((1, 2), (1, 2)),
        ((1, 2), (1, 2), (1, 2)),
        ((1, 0), (1, 0), (0, 1)),
        ((1, 0), (0, 1), (1, 0), (0, 1), (1, 0)),
        ((0, 0), (0, 0), (1, 1)),
    ],
)
def test_duplicates(rows: Any) -> None:
    g = gram(*rows)
    c = min_norm(g)
    assert_optimal(g, c)
    assert value(g, c) == pytest.approx(by_enumeration(g)[0], abs=1e-12)


def test_two_duplicates_share() -> None:
    assert min_norm(gram((1, 2), (1, 2))).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12])
def test_nearly_parallel_vectors(apart: float) -> None:
    for rows in (((1, 0), (1, apart)), ((1, 0, 0), (1, apart, 0), (1, 0, apart)), ((1, apart), (1, -apart), (2, 0))):
        assert_optimal(gram(*rows), min_norm(gram(*rows)))


def test_the_origin_inside_the_simplex() -> None:
    g = gram((1, 0), (-0.5, np.sqrt(0.75)), (-0.5, -np.sqrt(0.75)))
    c = min_norm(g)
    assert c.tolist() == pytest.approx([1 / 3] * 3)
    assert value(g, c) == pytest.approx(0, abs=1e-12)


def test_more_vectors_than_dimensions() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        g = gram(*(rng.normal(size=(8, 2)) + rng.normal(size=2) * 2))
        assert_optimal(g, min_norm(g))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_scale_of_the_vectors_does_not_matter(scale: float, size: int) -> None:
    rows = np.random.default_rng(size).normal(size=(size, 4))
    assert min_norm(gram(*rows * scale)) == pytest.approx(min_norm(gram(*rows)), abs=1e-9)


def test_very_different_lengths() -> None:
    g = gram((1e6, 0, 0), (0, 1, 0), (0, 0, 1e-3), (1, 1, 1))
    assert_optimal(g, min_norm(g))


def test_the_given_matrix_stays_as_it_is() -> None:
    g = gram((1, 0), (0, 2), (1, 1))
    before = g.copy()
    min_norm(g)
    assert np.array_equal(g, before)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [2, 3])
def test_what_is_not_finite_is_refused_by_name(bad: float, size: int) -> None:
    g = np.eye(size)
    g[1, 1] = bad
    with pytest.raises(WorkError, match=r"vector 2 of .*(nan|inf)"):
        min_norm(g)


def test_the_vector_that_is_named_is_the_one_whose_own_length_is_not_finite() -> None:
    """Products with it are bad, too, in the rows of the others; without one the first row is named."""
    g = np.eye(3)
    g[2, :] = g[:, 2] = np.nan
    with pytest.raises(WorkError, match=r"vector 3 of 3 has an inner product of nan"):
        min_norm(g)
    g = np.eye(3)
    g[1, 2] = g[2, 1] = np.inf
    with pytest.raises(WorkError, match=r"vector 2 of 3 has an inner product of inf"):
        min_norm(g)


def test_what_is_no_gram_matrix_is_refused() -> None:
    for wrong in (np.ones(3), np.ones((2, 3)), np.zeros((0, 0)), np.array([[1.0, 2.0], [0.0, 1.0]])):
        with pytest.raises(ValueError, match="Gram matrix"):
            min_norm(wrong)
    with pytest.raises(ValueError, match="negative"):
        min_norm(np.diag([1.0, -1.0]))


def test_rounding_of_products_near_zero_is_no_asymmetry() -> None:
    g = np.eye(2)
    g[0, 1], g[1, 0] = 1e-10, -1e-10
    assert min_norm(g).tolist() == [0.5, 0.5]


# -- against other ways ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in range(1, 10))])
def test_it_agrees_with_two_other_solvers_on_a_thousand_random_cases(block: int) -> None:
    """Values within 1e-6 of the largest squared length, and weights too where they are unique."""
    rng = np.random.default_rng([20, block])
    for case in range(100):
        size = int(rng.integers(2, 9))
        width = int(rng.integers(size, 13))
        lengths = np.exp(rng.normal(size=(size, 1)))
        shared = rng.normal(size=width) * rng.choice([0.0, 1.0, 3.0])
        g = gram(*(rng.normal(size=(size, width)) + shared) * lengths)
        scale = float(np.diag(g).max())
        c = min_norm(g)
        best, weights = by_enumeration(g)
        assert_optimal(g, c)
        assert abs(value(g, c) - best) <= 1e-10 * scale, (block, case)
        assert abs(value(g, c) - by_slsqp(g)) <= 1e-6 * scale, (block, case)
        if np.linalg.cond(g) < 1e6:
            assert np.abs(c - weights).max() <= 1e-6, (block, case)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=150)
def test_it_is_optimal_on_small_integers(size: int, width: int, seed: int) -> None:
    """Where duplicates, zero vectors and vectors on one line are common."""
    rows = np.random.default_rng(seed).integers(-2, 3, size=(size, width)).astype(float)
    assert_optimal(gram(*rows), min_norm(gram(*rows)))

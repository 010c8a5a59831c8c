"""Hypervolume against a sweep (2-D), inclusion-exclusion (to 5-D), hand-worked numbers and invariances."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moalign.core.errors import RequestError
from moalign.pareto.hypervolume import adds_nothing, hypervolume, optimal_share

coarse = st.integers(-2, 4).map(lambda v: v / 2)
tenths = st.integers(-3, 9).map(lambda v: v / 10)
fine = st.floats(-1, 3, allow_nan=False, width=32)


def fronts(max_rows: int, low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, max_rows), st.integers(low, high))
    return shapes.flatmap(lambda s: st.one_of(arrays(np.float64, s, elements=kind) for kind in (coarse, tenths, fine)))


def inclusion_exclusion(points: np.ndarray, ref: np.ndarray) -> float:
    """Volume of a union of boxes as the alternating sum over all intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in combinations(points, size):
            shared = np.min(chosen, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(shared - ref, 0.0)))
    return total


def sweep(points: np.ndarray, ref: np.ndarray) -> float:
    """Area in 2-D: walk from the largest first coordinate down, add what rises above the best so far."""
    area, height = 0.0, float(ref[1])
    for x, y in sorted(map(tuple, points), reverse=True):
        if x > ref[0] and y > height:
            area += (x - ref[0]) * (y - height)
            height = y
    return area


@settings(deadline=None)
@given(fronts(40, 2, 2), coarse, coarse)
def test_two_objectives_agree_with_a_sweep(points: np.ndarray, a: float, b: float) -> None:
    ref = np.array([a, b])
    assert hypervolume(points, ref) == pytest.approx(sweep(points, ref), rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=200)
@given(fronts(7, 1, 5), st.data())
def test_one_to_five_objectives_agree_with_inclusion_exclusion(points: np.ndarray, data: st.DataObject) -> None:
    ref = data.draw(arrays(np.float64, points.shape[1], elements=coarse))
    assert hypervolume(points, ref) == pytest.approx(inclusion_exclusion(points, ref), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_random_concave_fronts(objectives: int) -> None:
    rng = np.random.default_rng(objectives)
    for _ in range(5):
        points = np.abs(rng.normal(size=(10, objectives)))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        ref = np.full(objectives, -0.1)
        assert hypervolume(points, ref) == pytest.approx(inclusion_exclusion(points, ref), rel=1e-9)


@settings(deadline=None)
@given(fronts(10, 2, 5), st.data())
def test_a_dominated_or_repeated_point_changes_no_digit(points: np.ndarray, data: st.DataObject) -> None:
    ref = np.full(points.shape[1], -1.0)
    below = points[data.draw(st.integers(0, len(points) - 1))] - data.draw(
        arrays(np.float64, points.shape[1], elements=st.sampled_from([0.0, 0.25, 1.0]))
    )
    place = data.draw(st.integers(0, len(points)))
    assert hypervolume(np.insert(points, place, below, axis=0), ref) == hypervolume(points, ref)


@settings(deadline=None)
@given(fronts(10, 2, 5), st.data())
def test_permuting_points_changes_no_digit_and_objectives_nothing(points: np.ndarray, data: st.DataObject) -> None:
    ref = data.draw(arrays(np.float64, points.shape[1], elements=coarse))
    order = data.draw(st.permutations(range(len(points))))
    columns = data.draw(st.permutations(range(points.shape[1])))
    value = hypervolume(points, ref)
    assert hypervolume(points[order], ref) == value
    assert hypervolume(points[:, columns], ref[columns]) == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("objectives", [2, 3, 4, 5])
def test_ties_in_single_objectives_do_not_let_the_order_into_the_digits(objectives: int) -> None:
    # moocore alone fails this: with tied coordinates its order of summation follows the input.
    rng = np.random.default_rng(objectives)
    ref = np.full(objectives, -0.1)
    for _ in range(20):
        points = np.abs(rng.normal(size=(40, objectives)))
        points = (points / np.linalg.norm(points, axis=1, keepdims=True)).round(1)
        worse = points[:5] - 0.1 * rng.integers(2, size=(5, objectives))
        assert hypervolume(rng.permutation(points), ref) == hypervolume(points, ref)
        assert hypervolume(np.vstack([worse, points]), ref) == hypervolume(points, ref)


@settings(deadline=None)
@given(fronts(8, 2, 4), st.floats(0.125, 8), st.floats(-5, 5))
def test_shifts_change_nothing_and_scales_factor_out(points: np.ndarray, scale: float, shift: float) -> None:
    ref = np.zeros(points.shape[1])
    value = hypervolume(points, ref)
    assert hypervolume(points + shift, ref + shift) == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert hypervolume(points * scale, ref) == pytest.approx(value * scale ** points.shape[1], rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(fronts(8, 1, 4))
def test_inputs_are_not_mutated(points: np.ndarray) -> None:
    ref = np.zeros(points.shape[1])
    before = points.copy()
    points.flags.writeable = ref.flags.writeable = False
    hypervolume(points, ref)
    adds_nothing(points, ref)
    assert np.array_equal(points, before)
    assert not ref.any()


def test_examples_of_the_metrics_document() -> None:
    staircase = [[1, 3], [2, 2], [3, 1]]
    assert hypervolume(staircase, [0, 0]) == 6.0
    assert hypervolume(staircase, [1, 1]) == 1.0
    assert hypervolume([*staircase, [1.5, 1.5]], [0, 0]) == 6.0
    assert hypervolume([[-1, -1]], [0, 0]) == 0.0


def test_the_reference_point_can_flip_a_ranking() -> None:
    wide, middle = [[0.9, 0.2], [0.2, 0.9]], [[0.6, 0.6]]
    assert hypervolume(wide, [0, 0]) == pytest.approx(0.32)
    assert hypervolume(middle, [0, 0]) == pytest.approx(0.36)
    assert hypervolume(wide, [-0.5, -0.5]) == pytest.approx(1.47)
    assert hypervolume(middle, [-0.5, -0.5]) == pytest.approx(1.21)


def test_a_point_that_only_touches_the_reference_adds_nothing() -> None:
    assert hypervolume([[5, 0], [1, 1]], [0, 0]) == 1.0
    assert adds_nothing([[5, 0], [1, 1], [-1, 7]], [0, 0]) == 2


def test_points_that_add_nothing_are_counted() -> None:
    assert adds_nothing([[0, 1], [0, 2], [0, 3], [1, 1]], [0, 0]) == 3
    assert adds_nothing([[1, 1], [2, 2]], [0, 0]) == 0


def test_optimal_share() -> None:
    assert optimal_share([[0.5, 0.5]], [[0.5, 1.0]], [0, 0]) == 0.5
    assert optimal_share([[1, 1]], [[2, 2]], [0, 0]) == 0.25
    assert optimal_share([[-1, 1]], [[2, 2]], [0, 0]) == 0.0
    with pytest.raises(RequestError, match="optimum"):
        optimal_share([[1, 1]], [[0, 2]], [0, 0])


@pytest.mark.parametrize(
    ("points", "ref", "words"),
    [
        ([[1, float("nan")]], [0, 0], "row 1"),
        ([[1, float("inf")]], [0, 0], "row 1"),
        ([[1, 2]], [0], "reference point"),
        ([[1, 2]], [0, float("nan")], "reference point"),
        ([1, 2], [0, 0], "dimensions"),
        ([[1e200, 1e200]], [0, 0], "range of a float"),
    ],
)
def test_bad_input_is_refused(points: object, ref: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        hypervolume(points, ref)  # type: ignore[arg-type]

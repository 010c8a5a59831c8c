"""Dominance against a definition written out in loops; checks of what comes in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moalign.core.errors import RequestError
from moalign.pareto.front import check_points, check_ref, layers, nondominated


def tables(max_rows: int = 12, values: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[np.ndarray]:
    """Small tables; few different values, so that ties and duplicates are common."""
    few = st.integers(-2, 3).map(float) if values is None else values
    shapes = st.tuples(st.integers(1, max_rows), st.integers(1, 5))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=few))


finite = st.floats(-1e6, 1e6, allow_nan=False)


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def brute_mask(points: np.ndarray) -> list[bool]:
    mask = []
    for i, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points)
        seen = any(list(earlier) == list(point) for earlier in points[:i])
        mask.append(not beaten and not seen)
    return mask


def brute_layers(points: np.ndarray) -> list[int]:
    layer = [-1] * len(points)
    depth = 0
    while -1 in layer:
        left = [i for i in range(len(points)) if layer[i] == -1]
        top = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        for i in top:
            layer[i] = depth
        depth += 1
    return layer


@settings(deadline=None)
@given(tables() | tables(values=finite))
def test_mask_is_the_definition_of_dominance(points: np.ndarray) -> None:
    assert nondominated(points).tolist() == brute_mask(points)


@settings(deadline=None)
@given(tables() | tables(values=finite))
def test_layers_are_fronts_peeled_one_by_one(points: np.ndarray) -> None:
    assert layers(points).tolist() == brute_layers(points)


@settings(deadline=None)
@given(tables(), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order_of_points(points: np.ndarray, random: object) -> None:
    order = np.arange(len(points))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = points[order]
    assert sorted(map(tuple, shuffled[nondominated(shuffled)])) == sorted(map(tuple, points[nondominated(points)]))
    assert layers(shuffled).tolist() == layers(points)[order].tolist()


@settings(deadline=None)
@given(tables())
def test_inputs_are_not_mutated(points: np.ndarray) -> None:
    before = points.copy()
    nondominated(points)
    layers(points)
    check_points(points)[:] = 99.0
    assert np.array_equal(points, before)


def test_of_equal_points_the_first_counts_and_they_share_a_layer() -> None:
    points = [[1, 2], [2, 1], [1, 2], [0, 0], [0, 0]]
    assert nondominated(points).tolist() == [True, True, False, False, False]
    assert layers(points).tolist() == [0, 0, 0, 1, 1]


def test_larger_is_better() -> None:
    assert nondominated([[0.1, 0.1], [0.9, 0.9]]).tolist() == [False, True]
    assert layers([[0.0], [2.0], [1.0]]).tolist() == [2, 0, 1]


@pytest.mark.parametrize("kind", [list, lambda p: np.array(p, dtype=np.float32), lambda p: np.array(p, dtype=int)])
def test_lists_integers_and_float32_become_float64(kind: object) -> None:
    table = check_points(kind([[1, 2], [3, 4]]))  # type: ignore[operator]
    assert table.dtype == np.float64
    assert table.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([[0, 1], [float("nan"), 1]], ["row 2 of 2", "nan"]),
        ([[0, 1], [float("nan"), 1], [0, 2]], ["points: row 2 of 3 is (nan, 1); only"]),
        ([[0, float("inf")], [0, 1], [-float("inf"), 1]], ["row 1 of 3", "inf", "1 more"]),
        ([[0] * 5 + [float("inf")]], ["is (0, 0, 0, 0, 0, inf);"]),
        ([[0] * 6 + [float("inf")]], ["is (0, 0, 0, 0, 0, 0, ...);"]),
        ([1.0, 2.0], ["1 dimensions (2)"]),
        (np.zeros((2, 3, 4)), ["3 dimensions (2x3x4)"]),
        (3.0, ["0 dimensions (a single number)"]),
        ([], ["dimensions"]),
        (np.empty((0, 2)), ["empty", "0 rows"]),
        (np.empty((2, 0)), ["empty", "0 columns"]),
        ([[1, 2], [3]], ["different lengths"]),
        ([["a", "b"]], ["numbers"]),
        ([[1j, 2]], ["complex"]),
        ([[None, 1.0]], ["numbers"]),
    ],
)
def test_bad_points_are_refused_and_named(points: object, words: list[str]) -> None:
    for function in (check_points, nondominated, layers):
        with pytest.raises(RequestError) as caught:
            function(points)  # type: ignore[operator]
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize(
    ("ref", "words"),
    [([0.0], ["1 number;", "2"]), ([0, 0, 0], ["3 numbers", "2"]), ([0, float("nan")], ["nan"]), (0.0, ["2"])],
)
def test_a_bad_reference_point_is_refused(ref: object, words: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        check_ref(ref, 2)  # type: ignore[arg-type]
    for word in ["reference point", *words]:
        assert word in str(caught.value)
    with pytest.raises(RequestError, match="--ref 1"):
        check_ref([1.0], 2, "--ref 1")

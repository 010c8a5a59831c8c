"""Indicators against scipy, brute force and numbers worked by hand."""

from __future__ import annotations

import itertools
import math
import re
import statistics as plain_statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import kendalltau

from moalign.core.errors import RequestError
from moalign.core.preferences import grid
from moalign.pareto.indicators import (
    controllability,
    expected_utility,
    igd_plus,
    inner_product,
    kendall_tau,
    regret,
    spacing,
    sparsity,
)

values = st.integers(-3, 3).map(float) | st.floats(-1e300, 1e300)
small = st.integers(-3, 3).map(float) | st.floats(-3, 3)


def pairs_of_lists() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    return st.integers(1, 30).flatmap(
        lambda n: st.tuples(arrays(np.float64, n, elements=values), arrays(np.float64, n, elements=values))
    )


def tables(columns: int, rows: int = 8) -> st.SearchStrategy[np.ndarray]:
    return st.integers(1, rows).flatmap(lambda n: arrays(np.float64, (n, columns), elements=small))


@settings(deadline=None)
@given(pairs_of_lists())
def test_tau_is_scipys_tau_b_and_zero_where_that_is_undefined(lists: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = lists
    expected = kendalltau(x, y).statistic if len(x) > 1 else math.nan
    assert kendall_tau(x, y) == pytest.approx(0.0 if math.isnan(expected) else expected, abs=1e-12)
    assert kendall_tau(y, x) == pytest.approx(kendall_tau(x, y), abs=1e-12)
    assert kendall_tau(x, -y) == pytest.approx(-kendall_tau(x, y), abs=1e-12)


def test_tau_of_many_values_is_scipys() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=1101), rng.integers(5, size=1101)
    assert kendall_tau(x, y) == pytest.approx(kendalltau(x, y).statistic)


def test_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    # Pairs: 5 agree, 0 disagree, one tie in y: 5 / sqrt(6 * 5).
    assert kendall_tau([1, 2, 3, 4], [1, 2, 2, 3]) == pytest.approx(5 / math.sqrt(30))
    assert kendall_tau([1, 1, 1], [1, 2, 3]) == 0.0
    assert kendall_tau([1], [1]) == 0.0
    assert kendall_tau([1, 2], [1.0, 1.05], tolerance=0.1) == 0.0


def test_controllability_per_objective_and_averaged() -> None:
    preferences = grid(2, 4)
    obeyed = [[w, 1 - w] for w, _ in preferences]
    assert controllability(preferences, obeyed) == {"tau": 1.0, "per_objective": [1.0, 1.0]}
    half = [[w, 0.5] for w, _ in preferences]
    assert controllability(preferences, half) == {"tau": 0.5, "per_objective": [1.0, 0.0]}


def test_a_policy_that_ignores_its_preference_scores_zero_despite_rounding() -> None:
    preferences = np.array(grid(2, 10))
    means = np.full((11, 2), 0.3) + np.linspace(0, 2e-16, 11)[:, None]
    assert len(np.unique(means[:, 0])) > 1
    assert controllability(preferences, means)["per_objective"] == [0.0, 0.0]


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(2, 4), st.data())
def test_controllability_does_not_depend_on_order_or_positive_scale(objectives: int, data: st.DataObject) -> None:
    preferences = np.array(grid(objectives, 3))
    means = data.draw(arrays(np.float64, preferences.shape, elements=st.integers(-4, 4).map(float)))
    order = data.draw(st.permutations(range(len(preferences))))
    value = controllability(preferences, means)
    assert controllability(preferences[order], means[order]) == value
    assert controllability(preferences, 8 * means - 3) == value


def test_inner_product_and_expected_utility_by_hand() -> None:
    preferences = [[1, 0], [0.5, 0.5], [0, 1]]
    means = [[2, 0], [0, 0], [1, 4]]
    # Asked: 2, 0, 4. Best of all points: 2, 2.5 (the third), 4.
    assert inner_product(preferences, means) == pytest.approx(2.0)
    assert expected_utility(preferences, means) == pytest.approx(8.5 / 3)


@settings(deadline=None)
@given(st.data())
def test_expected_utility_is_a_loop_of_maxima_and_never_below_the_inner_product(data: st.DataObject) -> None:
    preferences = np.array(grid(3, 2))
    means = data.draw(arrays(np.float64, preferences.shape, elements=small))
    loops = sum(max(float(np.dot(w, n)) for n in means) for w in preferences) / len(preferences)
    assert expected_utility(preferences, means) == pytest.approx(loops, abs=1e-9)
    asked = sum(float(np.dot(w, n)) for w, n in zip(preferences, means, strict=True)) / len(preferences)
    assert inner_product(preferences, means) == pytest.approx(asked, abs=1e-9)
    assert expected_utility(preferences, means) >= inner_product(preferences, means) - 1e-9


def test_expected_utility_takes_any_number_of_points() -> None:
    assert expected_utility([[0.5, 0.5]], [[0, 0], [1, 1], [3, 0]]) == 1.5


@settings(deadline=None)
@given(tables(3), tables(3))
def test_igd_plus_is_the_mean_missing_distance(points: np.ndarray, front: np.ndarray) -> None:
    brute = float(np.mean([min(np.linalg.norm(np.maximum(z - a, 0)) for a in points) for z in front]))
    assert igd_plus(points, front) == pytest.approx(brute, rel=1e-9, abs=1e-12)


@pytest.mark.slow
@settings(deadline=None)
@given(st.integers(2, 5), st.data())
def test_every_indicator_agrees_with_loops_in_two_to_five_objectives(objectives: int, data: st.DataObject) -> None:
    points, front = (np.round(4 * data.draw(tables(objectives))) / 4 for _ in range(2))
    w = np.random.default_rng(data.draw(st.integers(0, 99))).dirichlet(np.ones(objectives), len(points))
    n, rows = len(points), range(len(points))
    dot = [[sum(a * b for a, b in zip(x, y, strict=True)) for y in points] for x in w]
    assert inner_product(w, points) == pytest.approx(sum(dot[i][i] for i in rows) / n, abs=1e-9)
    assert expected_utility(w, points) == pytest.approx(sum(max(row) for row in dot) / n, abs=1e-9)
    best = points + 1
    lost = [sum(w[i][j] * (best[i][j] - points[i][j]) for j in range(objectives)) for i in rows]
    assert regret(w, points, best) == pytest.approx(np.array(lost), abs=1e-9)
    missing = [min(math.dist(np.maximum(z, p), p) for p in points) for z in front]
    assert igd_plus(points, front) == pytest.approx(sum(missing) / len(front), rel=1e-9, abs=1e-12)
    taus = [kendalltau(w[:, j], points[:, j]).statistic if n > 1 else math.nan for j in range(objectives)]
    told = controllability(w, points)
    assert told["per_objective"] == pytest.approx([0.0 if math.isnan(t) else t for t in taus], abs=1e-12)
    assert told["tau"] == pytest.approx(sum(told["per_objective"]) / objectives)


@settings(deadline=None)
@given(st.integers(2, 5).flatmap(tables))
def test_spread_agrees_with_loops_in_two_to_five_objectives(points: np.ndarray) -> None:
    kept: list[list[float]] = []
    for point in points.tolist():  # the front, by definition
        beaten = any(all(b >= a for a, b in zip(point, o, strict=True)) and o != point for o in points.tolist())
        if not beaten and point not in kept:
            kept.append(point)
    if len(kept) < 2:
        assert spacing(points) == sparsity(points) == 0.0
        return
    near = [
        min(sum(abs(a - b) for a, b in zip(p, q, strict=True)) for j, q in enumerate(kept) if j != i)
        for i, p in enumerate(kept)
    ]
    assert spacing(points) == pytest.approx(plain_statistics.stdev(near), rel=1e-9, abs=1e-9)
    gaps = 0.0
    for column in zip(*kept, strict=True):
        line = sorted(column)
        gaps += sum((b - a) ** 2 for a, b in itertools.pairwise(line))
    assert sparsity(points) == pytest.approx(gaps / (len(kept) - 1), rel=1e-9, abs=1e-9)


def test_igd_plus_by_hand() -> None:
    assert igd_plus([[1, 1]], [[1, 1], [0, 0]]) == 0.0
    assert igd_plus([[0, 0]], [[3, 4]]) == 5.0
    assert igd_plus([[9, 0]], [[3, 4]]) == 4.0


def test_spacing_by_hand() -> None:
    assert spacing([[0, 3], [1, 2], [2, 1], [3, 0]]) == 0.0
    # Nearest L1 distances 2, 2, 4 on the front (0,4),(1,3),(3,1): mean 8/3, variance (4/9 + 4/9 + 16/9) / 2.
    assert spacing([[0, 4], [1, 3], [3, 1], [0, 0]]) == pytest.approx(math.sqrt(4 / 3))
    assert spacing([[1, 1]]) == 0.0


def test_sparsity_by_hand() -> None:
    # Front (0,4),(1,3),(3,1): gaps 1 and 2 in both objectives: (1 + 4 + 1 + 4) / 2.
    assert sparsity([[3, 1], [0, 4], [1, 3], [0, 0]]) == 5.0
    assert sparsity([[1, 1], [0, 0]]) == 0.0


@settings(deadline=None)
@given(tables(2), st.data())
def test_spread_ignores_dominated_points_and_order(points: np.ndarray, data: st.DataObject) -> None:
    worse = np.vstack([points, points.min(axis=0) - 1])
    order = data.draw(st.permutations(range(len(worse))))
    for measure in (spacing, sparsity):
        assert measure(worse[order]) == pytest.approx(measure(points), rel=1e-9, abs=1e-12)


def test_regret_by_hand() -> None:
    found = regret([[1, 0], [0.5, 0.5]], [[1, 9], [2, 2]], [[3, 0], [2, 4]])
    assert found.tolist() == [2.0, 1.0]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_indicator_mutates_its_inputs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    preferences, means, other = rng.random((5, 2)), rng.random((5, 2)), rng.random((5, 2))
    for table in (preferences, means, other):
        table.flags.writeable = False
    controllability(preferences, means)
    inner_product(preferences, means)
    expected_utility(preferences, means)
    regret(preferences, means, other)
    igd_plus(means, other)
    spacing(means)
    sparsity(means)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: kendall_tau([1, 2], [1]), "2 values and y has 1"),
        (lambda: kendall_tau([1, math.nan], [1, 2]), "x"),
        (lambda: kendall_tau([], []), "shape"),
        (lambda: kendall_tau([[1, 2]], [[1, 2]]), "shape"),
        (lambda: controllability([[1, 0]], [[1, 2], [3, 4]]), "one row of means per preference"),
        (lambda: controllability([[1, 0]], [[1, math.nan]]), "means: row 1"),
        (lambda: inner_product([[1, 0]], [[1, 2, 3]]), "shape"),
        (lambda: expected_utility([[1, 0]], [[1, 2, 3]]), "the same number"),
        (lambda: igd_plus([[1, 0]], [[1, 2, 3]]), "the same number"),
        (lambda: igd_plus([[1, 0]], [[1, math.inf]]), "reference front: row 1"),
        (lambda: regret([[1, 0]], [[1, 2]], [[1, 2], [3, 4]]), "optimum_means"),
        (lambda: spacing([[math.nan, 0]]), "row 1"),
        (lambda: sparsity([]), "dimensions"),
    ],
)
def test_bad_input_is_refused(call: object, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        call()  # type: ignore[operator]

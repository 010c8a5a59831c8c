"""ParetoHqD's selection: worked distances, a slow second implementation, and what a set must never hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moalign.core.errors import RequestError
from moalign.core.preferences import grid
from moalign.pareto.directions import Pool, direction, nearest, ray_distances, representatives, unit_box
from moalign.pareto.front import layers

# -- directions and distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "point", "distance"),
    [
        ((0.5, 0.5), (1.0, 1.0), 0.0),
        ((0.5, 0.5), (0.9, 0.3), 0.4243),
        ((1.0, 0.0), (0.9, 0.3), 0.1),
        ((1.0, 0.0), (1.0, 0.2), 0.0),
        # Not a preference (it sums to .6), but easy: u = (-.6, -.8), v = (-.5, -.5), t = .7, v - tu = (-.08, .06).
        ((0.4, 0.2), (0.5, 0.5), 0.1),
        ((0.0, 1.0), (0.2, 1.0), 0.0),
        # Three objectives, w = (1/3, 1/3, 1/3): the diagonal; (1, 1, .4) projects to -.2 (1, 1, 1).
        ((1 / 3, 1 / 3, 1 / 3), (1.0, 1.0, 0.4), np.sqrt(0.2**2 + 0.2**2 + 0.4**2)),
        # w = (1, 0, 0): u = (0, -1, -1) / sqrt 2.
        ((1.0, 0.0, 0.0), (0.7, 0.5, 0.5), 0.3),
    ],
)
def test_distances_by_hand(preference: tuple[float, ...], point: tuple[float, ...], distance: float) -> None:
    found, _ = ray_distances([point], preference)
    assert found[0] == pytest.approx(distance, abs=5e-5)


def test_the_ray_starts_at_the_ideal_point_and_passes_the_compromise_point() -> None:
    for w in grid(3, 4):
        towards = direction(w)
        assert np.linalg.norm(towards) == pytest.approx(1.0)
        on_the_ray = 1.0 + np.array([0.0, 0.3, np.linalg.norm(np.array(w) - 1.0)])[:, None] * towards
        assert on_the_ray[-1] == pytest.approx(w)
        apart, along = ray_distances(on_the_ray, w)
        assert apart == pytest.approx([0, 0, 0], abs=1e-12)
        assert along[:2] == pytest.approx([0.0, 0.3])


def test_behind_the_ideal_point_the_distance_is_to_it() -> None:
    apart, along = ray_distances([[1.3, 1.4]], (0.5, 0.5))
    assert (apart[0], along[0]) == (pytest.approx(0.5), 0.0)


def test_of_a_single_objective_the_distance_is_what_is_missing() -> None:
    assert ray_distances([[0.25], [1.0]], (1.0,))[0].tolist() == [0.75, 0.0]


@settings(deadline=None)
@given(
    arrays(np.float64, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(0, 1)),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
def test_distance_is_the_least_over_the_ray(points: np.ndarray, weights: list[float]) -> None:
    w = np.array(weights) / sum(weights)
    apart, along = ray_distances(points, w.tolist())
    far = np.sqrt(3.0)
    ts = np.linspace(0, far, 2001)
    ray = 1.0 + ts[:, None] * direction(w.tolist())
    slow = np.linalg.norm(points[:, None] - ray[None], axis=2)
    assert (apart <= slow.min(axis=1) + 1e-9).all()
    assert apart == pytest.approx(slow.min(axis=1), abs=far / 2000)
    assert ((along >= 0) & (along <= far)).all()


def test_a_preference_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(RequestError, match="2 weights for points of 3 objectives"):
        ray_distances([[0.0, 0.0, 0.0]], (0.5, 0.5))


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_bounds_are_quantiles_and_points_beyond_count_as_on_them() -> None:
    points = np.stack([np.arange(1001.0), np.arange(1001.0)[::-1] * 10 - 5], axis=1)
    unit = unit_box(points)
    assert unit[1].tolist() == [0.0, 1.0]  # the 0.1 % quantile of 0..1000 is 1
    assert unit[999].tolist() == [1.0, 0.0]
    assert unit[0].tolist() == [0.0, 1.0]
    assert unit[500] == pytest.approx([0.5, 0.5])


def test_one_outlier_does_not_move_the_ideal_point() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((5000, 2))
    spoiled = points.copy()
    spoiled[7] = 1e6
    assert np.abs(unit_box(points) - unit_box(spoiled))[np.arange(5000) != 7].max() < 0.01


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3e9])
def test_a_constant_objective_is_refused_by_name(value: float) -> None:
    points = np.random.default_rng(0).random((300, 3))
    points[:, 1] = value
    with pytest.raises(RequestError, match="the data: objective 'two' is constant: .* over 300 points .* remove it"):
        unit_box(points, ["one", "two", "three"], "the data")
    with pytest.raises(RequestError, match="objective 2 is constant"):
        unit_box(points)


def test_a_nan_is_refused_with_its_row() -> None:
    with pytest.raises(RequestError, match="the data: row 2 of 2"):
        Pool.of([[0.0, 1.0], [float("nan"), 1.0]], ["a", "b"], 1, 1, what="the data")


# -- layers ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.integers(2, 4), st.integers(0, 10_000), st.sampled_from([0, 1, 12]))
def test_layers_agree_with_pymoos_sorting(rows: int, objectives: int, seed: int, decimals: int) -> None:
    """Rounded points are full of ties and duplicates."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    points = np.random.default_rng(seed).normal(size=(rows, objectives)).round(decimals)
    fronts = NonDominatedSorting().do(-points)  # pymoo minimises
    expected = np.empty(rows, dtype=int)
    for number, front in enumerate(fronts):
        expected[front] = number
    assert layers(points).tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_a_hundred_thousand_points_of_three_objectives_are_sorted(correlation: float) -> None:
    """Each point of a sample is dominated from the layer above, and from no point of its own or a later layer."""
    rng = np.random.default_rng(0)
    points = np.sqrt(correlation) * rng.normal(size=(100_000, 1))
    points = points + np.sqrt(1 - correlation) * rng.normal(size=(100_000, 3))
    found = layers(points)
    assert np.bincount(found).min() > 0
    for row in rng.integers(len(points), size=60):
        above = found[(points >= points[row]).all(axis=1) & (points > points[row]).any(axis=1)]
        assert found[row] == (above.max() + 1 if len(above) else 0)


# -- pools -------------------------------------------------------------------------------------------------------------


def cloud(rows: int = 600, prompts: int = 100, objectives: int = 2, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, objectives)), [f"prompt {n}" for n in rng.integers(prompts, size=rows)]


@pytest.mark.parametrize("at_least", [1, 30, 200, 600, 10_000])
def test_a_pool_is_whole_first_layers_and_no_more_than_needed(at_least: int) -> None:
    points, prompts = cloud()
    pool = Pool.of(points, prompts, 5, at_least)
    layer = layers(points)
    assert pool.rows.tolist() == np.flatnonzero(layer < pool.layers).tolist()
    enough = len(pool.rows) >= min(at_least, len(points)) and len(set(pool.groups)) >= 5
    fewer = np.flatnonzero(layer < pool.layers - 1)
    assert enough
    assert len(fewer) < at_least or len({prompts[row] for row in fewer}) < 5
    assert np.array_equal(pool.unit, unit_box(points)[pool.rows])


def test_layers_are_added_until_k_prompts_are_there() -> None:
    # The first three layers answer one prompt only.
    points = [[9.0, 1.0], [8.0, 0.9], [7.0, 0.8], [0.0, 0.0], [-1.0, -1.0]]
    pool = Pool.of(points, ["a", "a", "a", "b", "c"], 2, 1)
    assert (pool.layers, pool.rows.tolist()) == (4, [0, 1, 2, 3])


def test_all_points_on_one_front_make_one_layer() -> None:
    at = np.linspace(0, 1, 50)
    points, prompts = np.stack([at, 1 - at], axis=1), [str(n) for n in range(50)]
    pool = Pool.of(points, prompts, 10, 20)
    assert (pool.layers, len(pool.rows)) == (1, 50)
    middle, _ = nearest(pool, (0.5, 0.5), 2)
    assert sorted(middle.tolist()) == [24, 25]
    best, apart = nearest(pool, (1.0, 0.0), 10)
    assert sorted(best.tolist()) == list(range(40, 50))
    assert apart.tolist() == sorted(apart.tolist())


@pytest.mark.parametrize(("k", "prompts"), [(4, ["a", "b", "c"] * 5), (16, [str(n) for n in range(15)])])
def test_fewer_prompts_than_k_are_refused_with_what_is_allowed(k: int, prompts: list[str]) -> None:
    points = np.random.default_rng(0).random((15, 2))
    allowed = len(set(prompts))
    with pytest.raises(RequestError, match=f"the data: k = {k} .* {allowed} prompts .* allowed: k <= {allowed}"):
        Pool.of(points, prompts, k, 10, what="the data")
    assert len(nearest(Pool.of(points, prompts, allowed, 10), (0.5, 0.5), allowed)[0]) == allowed


def test_prompts_and_points_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts for 3 points"):
        Pool.of([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], ["a", "b"], 1, 1)


# -- sets --------------------------------------------------------------------------------------------------------------


def slow_nearest(pool: Pool, w: Any, k: int) -> list[int]:
    """Take one by one the nearest point of a prompt that is not in the set yet."""
    apart, along = ray_distances(pool.unit, w)
    chosen: list[int] = []
    while len(chosen) < k:
        taken = {pool.groups[place] for place in chosen}
        left = [place for place in range(len(apart)) if pool.groups[place] not in taken]
        chosen.append(min(left, key=lambda place: (apart[place], along[place], place)))
    return [int(pool.rows[place]) for place in chosen]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 3), st.integers(0, 10_000), st.integers(1, 12), st.sampled_from([0, 1, 12]))
def test_a_set_is_the_nearest_of_each_prompt(objectives: int, seed: int, k: int, decimals: int) -> None:
    points, prompts = cloud(120, 40, objectives, seed)
    pool = Pool.of(points.round(decimals), prompts, k, 60)
    for w in grid(objectives, 3):
        rows, apart = nearest(pool, w, k)
        assert rows.tolist() == slow_nearest(pool, w, k)
        assert len({prompts[row] for row in rows}) == k  # no prompt twice
        assert set(rows) <= set(pool.rows)
        assert (np.diff(apart) >= 0).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 100), st.floats(-50, 50))
def test_sets_do_not_depend_on_an_objectives_scale_or_on_the_order_of_points(
    seed: int, scale: float, shift: float
) -> None:
    points, prompts = cloud(200, 60, 2, seed)
    w = (0.3, 0.7)
    rows = set(nearest(Pool.of(points, prompts, 10, 80), w, 10)[0].tolist())
    other = points * [scale, 1.0] + [shift, 0.0]
    assert set(nearest(Pool.of(other, prompts, 10, 80), w, 10)[0].tolist()) == rows
    order = np.random.default_rng(seed).permutation(200)
    again = nearest(Pool.of(points[order], [prompts[i] for i in order], 10, 80), w, 10)[0]
    assert set(order[again].tolist()) == rows


@pytest.mark.parametrize("objectives", [2, 3])
def test_neighbouring_preferences_take_different_sets(objectives: int) -> None:
    points, prompts = cloud(4000, 500, objectives, 3)
    pool = Pool.of(points, prompts, 30, 400)
    vectors = grid(objectives, 10 if objectives == 2 else 4)
    chosen = [frozenset(nearest(pool, w, 30)[0].tolist()) for w in vectors]
    assert len(set(chosen)) == len(vectors)
    means = np.array([points[list(rows)].mean(axis=0) for rows in chosen])
    weights = np.array(vectors)
    for objective in range(objectives):  # the mean reward of a set follows the weight
        order = np.argsort(weights[:, objective], kind="stable")
        least, most = weights[:, objective].min(), weights[:, objective].max()
        at = {value: means[weights[:, objective] == value, objective].mean() for value in (least, 0.5, most)}
        assert at[least] < at[0.5] < at[most]
        assert np.corrcoef(weights[order, objective], means[order, objective])[0, 1] > 0.9


def test_inputs_are_not_mutated() -> None:
    points, prompts = cloud()
    before = points.copy()
    nearest(Pool.of(points, prompts, 5, 50), (0.2, 0.8), 5)
    assert np.array_equal(points, before)


# -- representatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (grid(2, 10), [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]),
        (grid(2, 3), [(0.0, 1.0), (1 / 3, 2 / 3), (1.0, 0.0)]),  # equally near the middle: the first
        (grid(3, 4), [(0, 0, 1), (0, 1, 0), (0.25, 0.25, 0.5), (1, 0, 0)]),
        (grid(3, 3), [(0, 0, 1), (0, 1, 0), (1 / 3, 1 / 3, 1 / 3), (1, 0, 0)]),
        ([(0.3, 0.7)], [(0.3, 0.7)]),
        ([(0.3, 0.7), (0.6, 0.4)], [(0.3, 0.7), (0.6, 0.4)]),
        ([(0.2, 0.8), (0.4, 0.6), (0.45, 0.55), (0.9, 0.1)], [(0.2, 0.8), (0.45, 0.55), (0.9, 0.1)]),
    ],
)
def test_representatives_are_the_corners_and_the_middle(vectors: list[Any], expected: list[Any]) -> None:
    assert [tuple(vectors[index]) for index in representatives(vectors)] == [pytest.approx(w) for w in expected]

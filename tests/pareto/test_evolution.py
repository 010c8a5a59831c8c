"""NSGA-II through its door: which way is better, where it begins, and that it goes on as if it had never stopped."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moalign.core.errors import RequestError, WorkError
from moalign.pareto.evolution import Search, lattice_and_random
from moalign.pareto.front import nondominated

Matrix = NDArray[np.float64]
GOALS = np.array([[0.2, 0.2], [0.7, 0.2]])


def near(x: Matrix) -> Matrix:
    """The nearer to a goal the better: the best compromises lie on the line between both."""
    return -((x[:, None, :] - GOALS) ** 2).sum(axis=-1)


def run(search: Search, generations: int) -> tuple[Matrix, Matrix]:
    points, values = [], []
    for _ in range(generations):
        points.append(search.ask())
        values.append(near(points[-1]))
        search.tell(values[-1])
    return np.concatenate(points), np.concatenate(values)


def made(seed: int = 3, population: int = 12) -> Search:
    start = np.random.default_rng(1).uniform(0.5, 1, size=(population, 2))
    return Search(start, 0.0, 1.0, 2, seed)


def test_larger_is_better_and_the_front_is_found() -> None:
    points, values = run(made(), 40)
    assert points.shape == (480, 2) and (points >= 0).all() and (points <= 1).all()
    front = points[nondominated(values)]
    assert np.abs(front[:, 1] - 0.2).max() < 0.1 and np.median(np.abs(front[:, 1] - 0.2)) < 0.02
    assert front[:, 0].min() < 0.23 and front[:, 0].max() > 0.67
    assert np.abs(points[:12, 1] - 0.2).min() > 0.3, "it did not begin there"


def test_it_begins_with_what_it_was_given() -> None:
    start = np.random.default_rng(1).uniform(0.5, 1, size=(12, 2))
    assert np.array_equal(made().ask(), start)


def test_it_draws_from_a_generator_of_its_own() -> None:
    np.random.seed(0)
    first, after = run(made(), 5)[0], np.random.random()
    np.random.seed(0)
    assert np.random.random() == after, "the search has drawn from numpy's own"
    assert np.array_equal(first, run(made(), 5)[0])
    assert not np.array_equal(first, run(made(seed=4), 5)[0])


@pytest.mark.parametrize("stopped", [1, 3, 6])
def test_it_goes_on_from_evaluations_as_if_it_had_not_stopped(stopped: int) -> None:
    points, values = run(made(), 7)
    search, done = made(), stopped * 12
    search.replay(points[:done], values[:done])
    assert np.array_equal(run(search, 7 - stopped)[0], points[done:])


def test_evaluations_of_another_search_are_refused() -> None:
    points, values = run(made(seed=4), 3)
    with pytest.raises(WorkError, match="from number 13 on"):
        made().replay(points, values)
    search = made()
    search.ask()
    with pytest.raises(RequestError, match="values of a generation: row 2 of 12"):
        search.tell(np.where(np.arange(12)[:, None] == 1, np.nan, near(points[:12])))


def test_a_start_is_an_even_grid_alike_in_all_groups_and_uniform_draws() -> None:
    start = lattice_and_random(8, 2, 3, -0.5, 1.5, seed=0)
    third = 1 / 3
    assert start[:4] == pytest.approx(
        np.array([[0, 1] * 3, [third, 2 * third] * 3, [2 * third, third] * 3, [1, 0] * 3])
    )
    assert start.shape == (8, 6) and start[4:].min() >= -0.5 and start[4:].max() <= 1.5
    assert len(np.unique(start[4:])) == 24 and start[4:].min() < 0 and start[4:].max() > 1
    assert not np.array_equal(start, lattice_and_random(8, 2, 3, -0.5, 1.5, seed=1))


def test_of_many_experts_the_corners_are_there_as_far_as_they_fit() -> None:
    three = lattice_and_random(16, 3, 1, 0, 1, seed=0)
    assert sorted(map(tuple, three[:6].round(6).tolist())) == [
        (0, 0, 1), (0, 0.5, 0.5), (0, 1, 0), (0.5, 0, 0.5), (0.5, 0.5, 0), (1, 0, 0),
    ]  # fmt: skip
    assert three.shape == (16, 3)
    assert lattice_and_random(4, 6, 1, 0, 1, seed=0).shape == (4, 6)
    assert lattice_and_random(4, 1, 2, 0, 1, seed=0)[0].tolist() == [1, 1]

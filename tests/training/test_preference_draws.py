"""How the preferences of a rollout are drawn: one per prompt, or some for equal parts of it."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.training.preference_draws import grouped, independent

# -- one per prompt --------------------------------------------------------------------------------------------------


def test_given_preferences_are_the_only_ones_drawn() -> None:
    given = [(0.25, 0.75), (1.0, 0.0)]
    drawn = independent(given, 2, 1.0)(np.random.default_rng(0), 200)
    assert drawn.shape == (200, 2)
    assert {tuple(row) for row in drawn.tolist()} == set(given)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_without_them_they_are_dirichlet(alpha: float) -> None:
    drawn = independent(None, 3, alpha)(np.random.default_rng(0), 20_000)
    assert np.allclose(drawn.sum(axis=1), 1)
    assert np.allclose(drawn.mean(axis=0), 1 / 3, atol=0.01)
    # Var w_i = (1/m)(1 - 1/m) / (m alpha + 1)
    assert np.allclose(drawn.var(axis=0), (2 / 9) / (3 * alpha + 1), rtol=0.05)


def test_draws_of_a_resolution_are_round_numbers_and_corners() -> None:
    drawn = independent(None, 3, 0.5, resolution=20)(np.random.default_rng(0), 10_000)
    assert np.allclose(drawn * 20, np.rint(drawn * 20)) and np.allclose(drawn.sum(axis=1), 1)
    free = independent(None, 3, 0.5)(np.random.default_rng(0), 10_000)
    assert np.abs(drawn - free).max() < 1 / 20  # the same draws, moved
    corners = (drawn == 1).any(axis=1)
    assert corners.mean() > 0.03 and not (free == 1).any()
    assert drawn[corners].mean(axis=0) == pytest.approx(np.full(3, 1 / 3), abs=0.1)


# -- some for equal parts of a rollout -------------------------------------------------------------------------------


def test_a_rollout_has_as_many_different_preferences_as_asked_for() -> None:
    vectors = [(k / 10, 1 - k / 10) for k in range(11)]
    rng = np.random.default_rng(0)
    seen: dict[tuple[float, ...], int] = {}
    for _ in range(200):
        drawn = grouped(vectors, 4)(rng, 10)
        assert drawn.shape == (10, 2)
        rows, counts = np.unique(drawn, axis=0, return_counts=True)
        assert sorted(counts.tolist()) == [2, 2, 3, 3]
        for row in rows.tolist():
            seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert set(seen) == set(vectors)  # the corners as often as the others
    assert min(seen.values()) > 40


def test_fewer_vectors_or_rows_than_groups() -> None:
    rng = np.random.default_rng(0)
    assert len(np.unique(grouped([(0.5, 0.5)], 8)(rng, 6), axis=0)) == 1
    assert len(np.unique(grouped([(0, 1), (1, 0)], 8)(rng, 6), axis=0)) == 2
    assert len(grouped([(k / 10, 1 - k / 10) for k in range(11)], 8)(rng, 3)) == 3

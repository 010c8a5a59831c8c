"""Scalarisations, by hand and on fronts of every shape."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.pareto.scalarisation import RHO, RISK_AVERSION, SMOOTHING, UTOPIA, scores

Z = np.array([[1.0, 0.0], [0.0, 2.0]])


def test_by_hand() -> None:
    """w = (.25, .75): w.z is .25 and 1.5; short of (3, 3) by (.5, 2.25) and (.75, .75), by weight."""
    w = np.array([0.25, 0.75])
    assert (UTOPIA, RHO, SMOOTHING) == (3.0, 0.05, 0.1)
    assert scores(Z, w).tolist() == pytest.approx([0.25, 1.5])
    assert scores(Z, w, "tchebycheff").tolist() == pytest.approx([0.05 * 0.25 - 2.25, 0.05 * 1.5 - 0.75])
    both = 0.1 * np.log(2.0)  # .75 twice
    assert scores(Z, w, "smooth").tolist() == pytest.approx(
        [0.0125 - 2.25 - 0.1 * np.log1p(np.exp(-17.5)), 0.075 - 0.75 - both]
    )


def test_each_row_at_its_own_preference() -> None:
    """``[rows, n, objectives]`` with ``[rows, 1, objectives]``, as the distillation asks."""
    z, w = np.stack([Z, Z]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert scores(z, w).tolist() == [[1.0, 0.0], [0.0, 2.0]]
    assert scores(z, w, "tchebycheff").argmax(axis=1).tolist() == [0, 1]


def test_an_inward_front_is_reached_by_tchebycheff_and_not_by_a_linear_score() -> None:
    """On z = 3 (t^2, (1 - t)^2) a linear score has its maximum at an end; Tchebycheff goes along the front."""
    t = np.linspace(0, 1, 401)
    front = 3 * np.stack([t**2, (1 - t) ** 2], axis=1)
    grid = [(k / 10, 1 - k / 10) for k in range(11)]
    linear = {int(scores(front, np.array(w)).argmax()) for w in grid}
    assert linear <= {0, 400}
    tchebycheff = [int(scores(front, np.array(w), "tchebycheff").argmax()) for w in grid]
    assert tchebycheff == sorted(tchebycheff)
    assert len(set(tchebycheff)) > 5


def test_smooth_is_below_tchebycheff_and_tends_to_it() -> None:
    """log-sum-exp is between the maximum and the maximum + mu log m."""
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(200, 3)), rng.dirichlet(np.ones(3), size=200)
    apart = scores(z, w, "tchebycheff") - scores(z, w, "smooth")
    assert (apart >= -1e-12).all()
    assert (apart <= SMOOTHING * np.log(3) + 1e-12).all()


def test_exponential_utility_by_hand() -> None:
    """At a = 1/4: (1 - exp(-z/4)) / (1/4) is .8848 at 1, 1.5739 at 2, -1.1361 at -1; below 4 however large z is."""
    assert RISK_AVERSION == 0.25
    z = np.array([[1.0, 2.0], [-1.0, 0.0], [1e9, -1.0]])
    found = scores(z, np.array([0.25, 0.75]), "exponential")
    assert found.tolist() == pytest.approx(
        [0.25 * 0.884797 + 0.75 * 1.573877, 0.25 * -1.136102, 0.25 * 4 + 0.75 * -1.136102], abs=1e-5
    )


def test_exponential_utility_is_the_linear_score_near_the_mean() -> None:
    """(1 - exp(-a z)) / a = z - a z^2 / 2 + ..."""
    rng = np.random.default_rng(0)
    z, w = 1e-3 * rng.normal(size=(50, 3)), rng.dirichlet(np.ones(3), size=50)
    assert scores(z, w, "exponential") == pytest.approx(scores(z, w) - 0.125 * (w * z**2).sum(axis=1), abs=1e-9)

"""Hard EM over rewards: by hand, by another optimiser, and users whose groups are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import minimize

from moalign.reward_models.hard_em import agreement, assigned, fitted, hard_em, log_likelihood

Matrix = NDArray[np.float64]


def test_users_go_where_their_labels_are_likeliest_by_hand() -> None:
    """log sigma(1) = -.31326, log sigma(-1) = -1.31326, log sigma(2) = -.12693, log sigma(-2) = -2.12693.

    User 0, pairs (1, 0) and (2, 0): theta_0 = (1, 0) gives -.44019, theta_1 = (0, 1) gives 2 log .5 = -1.38629.
    User 1, pairs (1, 0) and (-2, 1): theta_0 -.31326 - 2.12693 = -2.44019, theta_1 log .5 + log sigma(1) = -1.00641.
    User 2, pair (1, 1): both give log sigma(1), and the first of equal ones is taken.
    """
    rewards = np.eye(2)
    users = [np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 0.0], [-2.0, 1.0]]), np.array([[1.0, 1.0]])]
    found = np.array([log_likelihood(pairs, rewards) for pairs in users])
    wanted = [[-0.440190, -1.386294], [-2.440190, -1.006409], [-0.313262, -0.313262]]
    assert found == pytest.approx(np.array(wanted), abs=1e-6)
    assert assigned(users, rewards).tolist() == [0, 1, 0]


def test_a_fit_by_hand() -> None:
    """One feature, three labels for it and one against, no ridge to speak of: sigma(theta) = 3 / 4, theta = log 3.

    A pair whose answers do not differ says nothing; nothing at all is worth 0, with a ridge.
    """
    pairs = np.array([[1.0], [1.0], [1.0], [-1.0], [0.0]])
    assert fitted(pairs, 1e-12, np.zeros(1)) == pytest.approx([np.log(3)], abs=1e-6)
    assert fitted(pairs[:0], 1.0, np.array([2.0])) == pytest.approx([0.0], abs=1e-6)


def test_a_fit_agrees_with_another_optimiser_wherever_it_begins() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(size=(60, 4)) + 0.3

    def loss(theta: Matrix) -> float:
        return float(np.logaddexp(0, -pairs @ theta).sum() + 0.35 * theta @ theta)

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    for start in (np.zeros(4), np.full(4, 30.0)):
        assert fitted(pairs, 0.7, start) == pytest.approx(best, abs=1e-5)


def people(rng: np.random.Generator, tastes: Matrix, each: int, pairs: int) -> tuple[list[Matrix], list[str]]:
    """Return users of every taste, who label by Bradley-Terry, in random order, and whose taste they have."""
    users, truth = [], []
    for at in rng.permutation(len(tastes) * each):
        x = rng.normal(size=(pairs, tastes.shape[1]))
        chance = 1 / (1 + np.exp(-x @ tastes[at % len(tastes)]))
        users.append(np.where((rng.random(pairs) < chance)[:, None], x, -x))
        truth.append(f"taste {at % len(tastes)}")
    return users, truth


@pytest.mark.parametrize("seed", range(5))
def test_no_round_makes_the_labels_less_likely(seed: int) -> None:
    """From starts of two to five groups on users who label at random as well as by three tastes."""
    rng = np.random.default_rng(seed)
    users, _ = people(rng, rng.normal(size=(3, 4)), each=8, pairs=int(rng.integers(2, 12)))
    users += people(rng, np.zeros((1, 4)), each=6, pairs=5)[0]
    found = hard_em(users, int(rng.integers(2, 6)), rng, ridge=1.0, starts=1)
    assert np.all(np.diff(found.likelihoods) >= -1e-9)
    own = sum(log_likelihood(pairs, found.weights)[k] for pairs, k in zip(users, found.of_user, strict=True))
    assert found.likelihoods[-1] == pytest.approx(own - 0.5 * (found.weights**2).sum())
    assert (assigned(users, found.weights) == found.of_user).all()  # it has come to rest


def test_it_finds_the_groups_of_users_who_differ() -> None:
    """Three tastes of length 3 at right angles, 20 users each with 15 pairs; with one group all are together."""
    rng = np.random.default_rng(1)
    users, truth = people(rng, 3 * np.eye(3), each=20, pairs=15)
    found = hard_em(users, 3, rng, ridge=0.1, starts=5)
    assert agreement(found.of_user.tolist(), truth) >= 0.95
    alone = hard_em(users, 1, rng, ridge=0.1, starts=1)
    assert alone.weights[0] == pytest.approx(fitted(np.concatenate(users), 0.1, np.zeros(3)), abs=1e-6)
    assert agreement(alone.of_user.tolist(), truth) == pytest.approx(1 / 3)
    assert found.likelihoods[-1] > alone.likelihoods[-1]


def test_as_many_groups_as_users_and_a_group_that_nobody_is_in() -> None:
    users = [np.array([[1.0, 0.0]] * 4), np.array([[-1.0, 0.0]] * 4)]
    assert sorted(hard_em(users, 2, np.random.default_rng(0), ridge=0.1, starts=1).of_user.tolist()) == [0, 1]
    twins = hard_em([users[0], users[0].copy()], 2, np.random.default_rng(0), ridge=0.1, starts=1)
    assert twins.of_user.tolist() == [0, 0]
    assert twins.weights[1] == pytest.approx([0, 0], abs=1e-6)


def test_agreement_matches_groups_as_well_as_can_be() -> None:
    """By hand: a is 2, b is 0, c has no group of its own: 3 + 2 + 0 of 6."""
    assert agreement([2, 2, 0, 0, 0, 2], list("aabbca")) == pytest.approx(5 / 6)
    assert agreement([7, 7, 7], list("xxx")) == 1
    assert agreement([0, 1, 2], list("xxx")) == pytest.approx(1 / 3)

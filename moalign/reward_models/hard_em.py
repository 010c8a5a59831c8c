"""Groups of users by hard expectation maximisation over K Bradley-Terry models.

Source: MaxMin-RLHF, arXiv 2402.08925, algorithm 2. Nobody says which group a user belongs to; every user labels several
pairs. In turns, until nothing changes:

    E: every user goes to the reward that makes its labels likeliest,  k(u) = argmax_k sum_i log sigma(theta_k . x_ui)
    M: every reward is fitted to its users,  theta_k = argmax sum_{u: k(u) = k} sum_i log sigma(theta . x_ui) - ridge/2
       |theta|^2

x_ui are the features of the chosen answer less those of the rejected one. Rewards are linear in them (choice), so that
an M-step is a convex problem solved to its end: no step can lower the penalised likelihood, and as there are finitely
many partitions it ends. It ends in a local optimum. The paper begins with random groups, whose rewards are all alike
where groups are large; here a start takes K users, and fits a reward to each alone. Of several starts the likeliest end
is taken (choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moalign.core.arrays import Matrix

NEWTON, TOLERANCE = 100, 1e-9
"""Most Newton steps of a fit, and the gain in nats that a step promises below which it is the last."""
ROUNDS = 200
"""Most rounds of a start; they end long before."""


@dataclass(frozen=True)
class Groups:
    """What was found."""

    weights: Matrix
    """theta of every group's reward, ``[K, features]``; 0 of a group without users."""
    of_user: NDArray[np.intp]
    """The group of each user, ``[users]``."""
    likelihoods: tuple[float, ...]
    """Penalised log-likelihood after every M-step, in nats; the last is that of the result."""


def log_likelihood(differences: Matrix, weights: Matrix) -> Matrix:
    """Return ``sum_i log sigma(theta_k . x_i)``, ``[K]``, of pairs ``[pairs, features]`` for ``[K, features]``."""
    return np.asarray(-np.logaddexp(0.0, -(differences @ weights.T)).sum(axis=0))


def fitted(differences: Matrix, ridge: float, start: Matrix) -> Matrix:
    """Return the theta of largest penalised likelihood, ``[features]``: Newton steps, halved where they overshoot."""

    def value(theta: Matrix) -> float:
        return float(log_likelihood(differences, theta[None])[0] - ridge / 2 * theta @ theta)

    theta, best = start, value(start)
    for _ in range(NEWTON):
        wrong = 1 / (1 + np.exp(np.clip(differences @ theta, -500, 500)))
        slope = differences.T @ wrong - ridge * theta
        bend = (differences * (wrong * (1 - wrong))[:, None]).T @ differences + ridge * np.eye(len(theta))
        step = np.linalg.solve(bend, slope)
        while (after := value(theta + step)) < best and slope @ step > TOLERANCE:
            step = step / 2
        if after < best:
            break
        theta, best = theta + step, after
        if slope @ step < TOLERANCE:
            break
    return theta


def hard_em(users: Sequence[Matrix], count: int, rng: np.random.Generator, ridge: float, starts: int) -> Groups:
    """Return ``count`` groups of users, each given by its differences ``[pairs, features]``.

    The best of so many ``starts``; ``rng`` draws the users that they begin with. Needs at least ``count`` users.
    """
    found = [_from(users, rng.choice(len(users), size=count, replace=False), ridge) for _ in range(starts)]
    return max(found, key=lambda groups: groups.likelihoods[-1])


def _from(users: Sequence[Matrix], first: NDArray[np.intp], ridge: float) -> Groups:
    """Return where EM ends that begins with the rewards of some users alone."""
    none = users[0][:0]
    weights = np.array([fitted(users[user], ridge, np.zeros(none.shape[1])) for user in first.tolist()])
    of_user, likelihoods = assigned(users, weights), list[float]()
    for _ in range(ROUNDS):
        weights = np.array(
            [
                fitted(np.concatenate([none, *(users[u] for u in np.flatnonzero(of_user == k).tolist())]), ridge, old)
                for k, old in enumerate(weights)
            ]
        )
        own = sum(float(log_likelihood(pairs, weights)[k]) for pairs, k in zip(users, of_user, strict=True))
        likelihoods.append(own - ridge / 2 * float((weights**2).sum()))
        before, of_user = of_user, assigned(users, weights)
        if (before == of_user).all():
            break
    return Groups(weights, of_user, tuple(likelihoods))


def assigned(users: Sequence[Matrix], weights: Matrix) -> NDArray[np.intp]:
    """Return the reward that makes each user's labels likeliest, ``[users]``; the first of equal ones."""
    return np.array([int(log_likelihood(pairs, weights).argmax()) for pairs in users], dtype=np.intp)


def agreement(found: Sequence[int], truth: Sequence[str]) -> float:
    """Return the share of users in the group that stands for their true one, groups matched as well as can be.

    A found group stands for at most one true group, and the other way round.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

    _, rows = np.unique(np.asarray(found), return_inverse=True)
    _, columns = np.unique(np.asarray(truth), return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    matched = linear_sum_assignment(table, maximize=True)
    return float(table[matched].sum() / len(rows))

"""REBEL: reinforcement learning as regression to relative rewards (arXiv 2404.16767, equation 1).

Two responses to one prompt; what the policy's log-ratio says of them, divided by eta, is regressed to the difference of
their rewards. Where the regression is exact the policy is ``pi_k exp(eta r) / Z``: one step of mirror descent.
"""

from __future__ import annotations

from torch import Tensor


def rebel_loss(logps: Tensor, old_logps: Tensor, rewards: Tensor, eta: float) -> Tensor:
    """Return the squared error of each pair, ``[pairs]``; responses ``2i`` and ``2i + 1`` belong to pair ``i``.

    ``( (1/eta) [(ln pi(y) - ln pi_k(y)) - (ln pi(y') - ln pi_k(y'))] - [r(y) - r(y')] )^2``

    Args:
        logps: log-probability of each token under the policy, with gradient, ``[2 * pairs, T]``; 0 outside responses.
        old_logps: the same under the policy that sampled.
        rewards: ``[2 * pairs]``.
        eta: the step: how far a difference of rewards of 1 moves the log-ratio, in nats. Above 0.
    """
    ratio = (logps - old_logps).sum(-1)
    return ((ratio[0::2] - ratio[1::2]) / eta - (rewards[0::2] - rewards[1::2])) ** 2

"""REBEL: hand-worked values, its gradient, and where it leads on a case that can be enumerated."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moalign.lm.mixture import mixture_logps
from moalign.losses.rebel import rebel_loss


def test_a_pair_worked_by_hand() -> None:
    """Log-ratios .3 and -.1 at eta .5 say .8; the rewards differ by .6: (.8 - .6)^2 = .04."""
    logps = torch.tensor([[-1.0, -0.5], [-2.0, 0.0]])
    old = torch.tensor([[-1.2, -0.6], [-1.9, 0.0]])
    found = rebel_loss(logps, old, torch.tensor([0.9, 0.3]), eta=0.5)
    torch.testing.assert_close(found, torch.tensor([0.04]))


def test_it_is_zero_for_the_step_of_mirror_descent_and_only_there() -> None:
    """pi = pi_k exp(eta r) / Z: whatever Z, the differences of log-ratios are eta times those of rewards."""
    rewards = torch.tensor([0.2, 1.0, -0.7, 0.4])
    old = torch.tensor([[-1.0], [-2.0], [-0.3], [-1.1]])
    exact = old + (2.0 * rewards - 5.0).unsqueeze(-1)
    torch.testing.assert_close(rebel_loss(exact, old, rewards, eta=2.0), torch.zeros(2), atol=1e-10, rtol=0)
    assert bool((rebel_loss(old, old, rewards, eta=2.0) > 0.1).all())


def test_gradients_reach_the_weights_and_not_the_experts() -> None:
    """ln pi = ln sum_i a_i q_i, so d ln pi / d a_i = q_i / sum_j a_j q_j."""
    q = torch.tensor([[[0.5, 0.1]], [[0.2, 0.4]]])
    head = torch.zeros(2, 1, 2, requires_grad=True)
    logps = mixture_logps(q.log(), head.log_softmax(-1))
    torch.testing.assert_close(logps.exp(), torch.tensor([[0.3], [0.3]]))
    rebel_loss(logps, logps.detach(), torch.tensor([1.0, 0.0]), eta=1.0).sum().backward()
    # d loss / d ln pi(y) = -2, of ln pi(y'): +2; d ln pi / d logit_1 = a_1 (q_1 / pi - 1) = 1/3 and -1/6.
    torch.testing.assert_close(head.grad, torch.tensor([[[-2 / 3, 2 / 3]], [[-1 / 3, 1 / 3]]]))


TOKENS, LENGTH = 3, 2
ANSWERS = list(itertools.product(range(TOKENS), repeat=LENGTH))
EXPERTS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]])
"""Next-token probabilities of each expert, the same at every position."""


def expected(weights: Tensor, rewards: Tensor) -> float:
    """The expected reward of answers drawn with ``weights`` ``[positions, experts]``, summed over all answers."""
    probabilities = weights @ EXPERTS
    of_answer = torch.stack([probabilities[0, a] * probabilities[1, b] for a, b in ANSWERS])
    return float(of_answer @ rewards)


def learned(rewards: Tensor, positions: int) -> Tensor:
    """REBEL over all pairs of answers, each as often as the policy draws it; weights ``[LENGTH, experts]``."""
    q = torch.stack([torch.stack([EXPERTS[:, token] for token in answer]) for answer in ANSWERS]).log()
    head = torch.zeros(positions, 2, requires_grad=True)
    optimizer = torch.optim.SGD([head], lr=0.5)
    pairs = torch.tensor(list(itertools.product(range(len(ANSWERS)), repeat=2))).reshape(-1)
    for _ in range(300):
        with torch.no_grad():
            old = mixture_logps(q, head.log_softmax(-1).expand(LENGTH, 2))
        drawn = old.sum(-1).exp()[pairs].view(-1, 2).prod(-1)
        for _ in range(2):
            logps = mixture_logps(q, head.log_softmax(-1).expand(LENGTH, 2))
            loss = (drawn * rebel_loss(logps[pairs], old[pairs], rewards[pairs], eta=1.0)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.detach().softmax(-1).expand(LENGTH, 2)


def test_static_weights_converge_to_the_best_static_mixture() -> None:
    """A product of what both positions say, so that the best weights lie inside the simplex."""
    rewards = torch.tensor([float({a, b} == {0, 2}) for a, b in ANSWERS])
    grid = [torch.tensor([[share, 1 - share]]).expand(LENGTH, 2) for share in torch.linspace(0, 1, 201).tolist()]
    best = max(grid, key=lambda weights: expected(weights, rewards))
    assert 0.2 < float(best[0, 0]) < 0.8
    found = learned(rewards, positions=1)
    assert float(found[0, 0]) == pytest.approx(float(best[0, 0]), abs=0.01)
    assert expected(found, rewards) == pytest.approx(expected(best, rewards), abs=1e-4)


def test_where_the_best_expert_changes_with_the_position_it_beats_every_static_mixture() -> None:
    rewards = torch.tensor([float((a, b) == (0, 2)) for a, b in ANSWERS])
    grid = [torch.tensor([[share, 1 - share]]).expand(LENGTH, 2) for share in torch.linspace(0, 1, 201).tolist()]
    static = max(expected(weights, rewards) for weights in grid)
    found = learned(rewards, positions=2)
    assert expected(found, rewards) > static + 0.2
    assert expected(found, rewards) == pytest.approx(0.49, abs=0.03)  # each expert where it is best: .7 x .7

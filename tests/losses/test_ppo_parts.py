"""The parts of PPO: numbers worked by hand, and a second implementation of the advantages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moalign.losses.ppo import adapted, clipped, gae, gate, token_rewards, whitened

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_every_token_pays_for_its_distance_and_the_last_one_is_rewarded() -> None:
    log_ratio = torch.tensor([[0.5, -1.0, 2.0], [3.0, 9.0, 9.0]])
    rewards = token_rewards(torch.tensor([[10.0, -4.0], [1.0, 0.0]]), log_ratio, MASK, kl_coef=0.1)
    torch.testing.assert_close(rewards[0], torch.tensor([[-0.05, -0.05], [0.1, 0.1], [9.8, -4.2]]))
    torch.testing.assert_close(rewards[1], torch.tensor([[0.7, -0.3], [0.0, 0.0], [0.0, 0.0]]))


def test_advantages_by_hand() -> None:
    """gamma 1, lambda 1/2: deltas (0 + 2 - 1, 0 + 4 - 2, 8 - 4) = (1, 2, 4); A = (1 + 1 + 1, 2 + 2, 4)."""
    values = torch.tensor([[[1.0], [2.0], [4.0]], [[3.0], [7.0], [7.0]]])
    rewards = torch.tensor([[[0.0], [0.0], [8.0]], [[5.0], [0.0], [0.0]]])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.5)
    assert advantages[..., 0].tolist() == [[3.0, 4.0, 4.0], [2.0, 0.0, 0.0]]
    assert returns[..., 0].tolist() == [[4.0, 6.0, 8.0], [5.0, 0.0, 0.0]]


def test_discounted_advantages_by_hand() -> None:
    """gamma 1/2, lambda 1: rewards to go 0 + .5 (0 + .5 * 8) = 2, 4, 8, less the value."""
    values = torch.tensor([[[1.0], [1.0], [1.0]]])
    rewards = torch.tensor([[[0.0], [0.0], [8.0]]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=1.0)
    assert advantages[0, :, 0].tolist() == [1.0, 3.0, 7.0]


def test_advantages_against_a_second_implementation() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, size=5)
    rewards, values = rng.normal(size=(2, 5, 6, 3))
    mask = np.arange(6)[None] < lengths[:, None]
    rewards[~mask] = 0
    found, _ = gae(*(torch.tensor(x) for x in (rewards, values, mask)), gamma=0.9, lam=0.7)
    for row, length in enumerate(lengths):
        following = np.concatenate([values[row, 1:length], np.zeros((1, 3))])
        deltas = rewards[row, :length] + 0.9 * following - values[row, :length]
        for t in range(length):
            wanted = sum((0.9 * 0.7) ** (k - t) * deltas[k] for k in range(t, length))
            assert found[row, t].tolist() == pytest.approx(wanted.tolist())
    assert not found[torch.tensor(~mask)].any()


def test_the_critics_of_other_objectives_do_not_matter() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    both, _ = gae(rewards, values, MASK, 1.0, 0.95)
    alone, _ = gae(rewards[..., 1:], values[..., 1:], MASK, 1.0, 0.95)
    torch.testing.assert_close(both[..., 1:], alone)


def test_whitening() -> None:
    advantages = torch.tensor([[[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]], [[7.0, 5.0], [99.0, 99.0], [99.0, 99.0]]])
    inside = advantages[MASK]
    scaled = whitened(advantages, MASK, "scale")[MASK]
    torch.testing.assert_close(scaled[:, 0], inside[:, 0] / np.sqrt(5.0))  # of 1, 3, 5, 7
    torch.testing.assert_close(scaled[:, 1], inside[:, 1])  # a constant has no spread to divide by
    full = whitened(advantages, MASK, "full")[MASK]
    torch.testing.assert_close(full.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)
    assert full[:, 0].std(unbiased=False).item() == pytest.approx(1)
    assert torch.equal(whitened(advantages, MASK, "none"), advantages)
    assert not whitened(advantages, MASK, "full")[~MASK].any()


# -- the clipped objective -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # more of what was good, beyond the range: no further push
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.6, 0.0),  # less of what was bad, beyond the range
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_the_clipped_objective_and_its_gate(ratio: float, advantage: float, loss: float, slope: float) -> None:
    u = torch.tensor(ratio, requires_grad=True)
    found = clipped(u, torch.tensor(advantage), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert u.grad is not None
    assert u.grad.item() == pytest.approx(slope)
    assert bool(gate(u.detach(), torch.tensor(advantage), 0.2)) == (slope != 0)


def test_the_kl_coefficient_moves_towards_its_target() -> None:
    assert adapted(0.2, kl=6.0, target=6.0, responses=64, horizon=640) == pytest.approx(0.2)
    assert adapted(0.2, kl=6.6, target=6.0, responses=64, horizon=640) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted(0.2, kl=60.0, target=6.0, responses=64, horizon=640) == pytest.approx(0.2 * 1.02)  # at most 20 %
    assert adapted(0.2, kl=-3.0, target=6.0, responses=64, horizon=640) == pytest.approx(0.2 * 0.98)

"""PPO with value heads: every part against numbers worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moalign.losses.ppo import (
    Experience,
    beside,
    clipped,
    experience,
    gae,
    gate,
    loss,
    token_rewards,
    whitened,
)
from moalign.training.kl_budget import adapted

MASK = torch.tensor([[True, True, True], [True, False, False]])


# -- rewards, advantages ---------------------------------------------------------------------------------------------


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
    small = whitened(0.01 * advantages, MASK, "scale")[MASK]
    torch.testing.assert_close(small[:, 0], inside[:, 0] / np.sqrt(5.0))  # whatever the unit of the rewards
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
        (1.5, 0.5, -0.6, 0.0),  # small advantages count as much
        (0.5, 0.5, -0.25, -0.5),
        (0.5, -0.5, 0.4, 0.0),
        (1.5, -0.5, 0.75, 0.5),
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
    assert adapted(0.2, kl=6.0, budget=6.0, responses=64, horizon=640) == pytest.approx(0.2)
    assert adapted(0.2, kl=6.6, budget=6.0, responses=64, horizon=640) == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    assert adapted(0.2, kl=60.0, budget=6.0, responses=64, horizon=640) == pytest.approx(0.2 * 1.02)  # at most 20 %
    assert adapted(0.2, kl=-3.0, budget=6.0, responses=64, horizon=640) == pytest.approx(0.2 * 0.98)


# -- the loss on hand-made numbers -------------------------------------------------------------------------------------

GAE: dict[str, Any] = {"gamma": 1.0, "gae_lambda": 1.0, "whiten": "none"}
LOGPS = torch.where(MASK, torch.tensor(-1.0), torch.tensor(0.0))
"""Of the policy that sampled."""
Z = np.array([[2.0, 1.0], [-1.0, 0.5]])


def made(
    z: Any = Z, values: torch.Tensor | None = None, gap: float = 0.0, kl_coef: float = 0.0, kl_apart: bool = False
) -> Experience:
    """Experience of two responses; the reference finds each token ``gap`` nats less likely; critics say 0."""
    rewards = torch.as_tensor(z, dtype=torch.float32)
    if values is None:
        values = torch.zeros(2, 3, rewards.shape[1] + kl_apart)
    ref = torch.where(MASK, LOGPS - gap, LOGPS)
    return experience(rewards, values, LOGPS, ref, MASK, kl_coef, kl_apart=kl_apart, **GAE)


def test_every_row_carries_its_advantages() -> None:
    found = made()
    tensors = found.tensors(found.advantages.sum(-1))
    assert tensors["advantages"].tolist() == [[3.0, 3.0, 3.0], [-0.5, 0.0, 0.0]]
    assert tensors["returns"][0].tolist() == [[2.0, 1.0]] * 3
    assert tensors["per_token"].tolist() == [0.5, 0.5]  # 2 rows, 4 tokens
    assert torch.equal(found.mask, MASK)
    assert torch.equal(found.old_logps, LOGPS)
    assert found.kl is None


def test_a_cost_of_distance_apart_is_added_to_whatever_the_others_make() -> None:
    """Costs to go -.3, -.2, -.1 and -.1, which no reward sees. All others are forgotten here."""
    found = made(gap=1.0, kl_coef=0.1, kl_apart=True)
    wanted = torch.tensor([[-0.3, -0.2, -0.1], [-0.1, 0.0, 0.0]])
    tensors = found.tensors(found.advantages[..., 0] * 0.0)
    torch.testing.assert_close(tensors["advantages"], wanted)
    torch.testing.assert_close(tensors["returns"][..., 2], wanted)
    assert found.advantages.tolist() == [[[2, 1]] * 3, [[-1, 0.5], [0, 0], [0, 0]]]
    more = found.tensors(found.advantages[..., 0])["advantages"]
    torch.testing.assert_close(more, torch.tensor([[1.7, 1.8, 1.9], [-1.1, 0.0, 0.0]]))


def test_its_head_foresees_it() -> None:
    """A head that knows the cost to come leaves no advantage."""
    values = torch.tensor([[[0.0, -0.3], [0.0, -0.2], [0.0, -0.1]], [[0.0, -0.1], [0.0, 9.0], [0.0, 9.0]]])
    found = made(np.zeros((2, 1)), values, gap=1.0, kl_coef=0.1, kl_apart=True)
    torch.testing.assert_close(
        found.tensors(found.advantages[..., 0])["advantages"], torch.zeros(2, 3), atol=1e-6, rtol=0
    )


def test_it_is_on_the_scale_of_the_others() -> None:
    """Deviations sqrt(5) and 2 sqrt(5), and a constant: times the mean of 1 / sd of those two, 3 / (4 sqrt(5))."""
    advantages = torch.tensor([[[1.0, 2, 5, -4], [3, 6, 5, -2], [5, 10, 5, -1]], [[7, 14, 5, 3], [9] * 4, [9] * 4]])
    cost = torch.tensor([-4.0, -2.0, -1.0, 3.0])
    assert torch.equal(beside(advantages, MASK, "none")[MASK], cost)
    torch.testing.assert_close(beside(advantages, MASK, "scale")[MASK], cost * 0.75 / np.sqrt(5.0))
    torch.testing.assert_close(beside(advantages, MASK, "full")[MASK], (cost + 1) * 0.75 / np.sqrt(5.0))
    constant_first = advantages[..., [2, 0, 1, 3]]
    torch.testing.assert_close(beside(constant_first, MASK, "scale")[MASK], cost * 0.75 / np.sqrt(5.0))
    constant = advantages[..., [2, 3]]
    assert torch.equal(beside(constant, MASK, "scale")[MASK], cost)


def loss_of(
    rows: slice, logps: torch.Tensor, values: torch.Tensor, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return loss and metrics of some rows of :func:`made`, where the advantages of both heads are added up."""
    found = made()
    found.importance = importance
    tensors = {name: value[rows] for name, value in found.tensors(found.advantages.sum(-1)).items()}
    entropy = torch.where(MASK, torch.tensor(2.0), torch.tensor(0.0))
    tokens = (logps[rows], entropy[rows], values[rows], LOGPS[rows], MASK[rows])
    return loss(*tokens, tensors, ["r0", "r1"], clip_range=0.2, vf_coef=0.1)


def test_the_loss_of_a_part_by_hand() -> None:
    """4 tokens. u = 1 but for the second token of the first row, u = 1.5: advantages 3, clipped to 1.2 * 3.

    Policy: -(3 + 3.6 + 3 - .5) / 4 = -2.275. Value heads say 0: errors (3 * 4 + 1) / 4 and (3 * 1 + .25) / 4.
    """
    logps = torch.tensor([[-1.0, -1.0 + np.log(1.5), -1.0], [-1.0, 0.0, 0.0]])
    found, metrics = loss_of(slice(0, 2), logps, torch.zeros(2, 3, 2))
    assert metrics["policy_loss"] == pytest.approx(-2.275)
    assert metrics["value_loss/r0"] == pytest.approx(3.25)
    assert metrics["value_loss/r1"] == pytest.approx(0.8125)
    assert found.item() == pytest.approx(-2.275 + 0.1 * (3.25 + 0.8125))
    assert metrics["clip_fraction"] == pytest.approx(0.25)
    assert metrics["entropy"] == pytest.approx(2.0)
    # Value heads that say 1/2: errors (3 * 1.5^2 + 1.5^2) / 4 and (3 * .5^2 + 0) / 4.
    _, metrics = loss_of(slice(0, 2), logps, torch.full((2, 3, 2), 0.5))
    assert metrics["value_loss/r0"] == pytest.approx(2.25)
    assert metrics["value_loss/r1"] == pytest.approx(0.1875)


def test_tokens_that_another_engine_drew_by_hand() -> None:
    """Weights (1/2, 2, 1) and 3 of tokens that lose -(3, 3.6, 3) and .5: -(1.5 + 7.2 + 3 - 1.5) / 4; values as ever."""
    logps = torch.tensor([[-1.0, -1.0 + np.log(1.5), -1.0], [-1.0, 0.0, 0.0]])
    plain, values = loss_of(slice(0, 2), logps, torch.zeros(2, 3, 2))
    weights = torch.tensor([[0.5, 2.0, 1.0], [3.0, 9.0, 9.0]])
    found, metrics = loss_of(slice(0, 2), logps, torch.zeros(2, 3, 2), weights)
    assert metrics["policy_loss"] == pytest.approx(-2.55)
    assert found.item() == pytest.approx(plain.item() + 2.275 - 2.55)
    assert {name: value for name, value in metrics.items() if name != "policy_loss"} == {
        name: value for name, value in values.items() if name != "policy_loss"
    }


def test_parts_add_up_whatever_their_lengths() -> None:
    logps, values = torch.where(MASK, -0.9, 0.0), torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    whole, first, second = (loss_of(rows, logps, values)[0] for rows in (slice(0, 2), slice(0, 1), slice(1, 2)))
    assert whole.item() == pytest.approx((first.item() + second.item()) / 2)


def test_distance_from_the_reference_costs_every_objective() -> None:
    returns = made(np.zeros((2, 2)), gap=1.0, kl_coef=0.1).returns
    torch.testing.assert_close(returns[0, :, 0], torch.tensor([-0.3, -0.2, -0.1]))
    assert torch.equal(returns[..., 0], returns[..., 1])

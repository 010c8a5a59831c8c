"""Group advantages of several rewards by hand, the loss by finite differences, and where a policy comes to rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moalign.losses import grpo

REWARDS = np.array(
    [[[1, 0.2], [0, 0.9], [1, 0.4], [0, 0.1]], [[0, 0.5], [0, 0.5], [0, 0.5], [1, 0.5]]], dtype=np.float64
)
"""Two groups of four answers, two rewards; in the second group the second reward says nothing."""
EVEN = np.full((2, 2), 0.5)
ALIKE = np.zeros(2, dtype=np.intp)


def test_z_scores_by_hand() -> None:
    """1 0 1 0: mean .5, sd sqrt(4 * .25 / 3) = .57735; .5 / .57745 = .86588."""
    z = grpo.standardised(REWARDS)
    np.testing.assert_allclose(z[0, :, 0], [0.86588, -0.86588, 0.86588, -0.86588], atol=1e-5)
    np.testing.assert_allclose(z[1, :, 0], [-0.4999, -0.4999, -0.4999, 1.4997], atol=1e-4)
    assert z[1, :, 1].tolist() == [0.0] * 4  # not NaN, where all answers are alike


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        ("gdpo", [[0.3029, 0.5366, 0.8626, -1.7021], [-0.4980, -0.4980, -0.4980, 1.4940]]),
        ("sum", [[0.5247, 0, 0.8745, -1.3992], [-0.4998, -0.4998, -0.4998, 1.4994]]),
        ("rvpo", [[-0.0837, -0.2710, 0.3420, -0.8544], None]),
        ("dvao", [[0.3214, -0.0001, 0.5357, -0.8570], None]),
    ],
)
def test_the_published_ways_by_their_numbers(how: grpo.Aggregation, wanted: list[list[float] | None]) -> None:
    found = grpo.aggregated(REWARDS, EVEN, how)
    if how == "gdpo":
        found = grpo.whitened(found, ALIKE)
    for row, numbers in zip(found, wanted, strict=True):
        if numbers is not None:
            np.testing.assert_allclose(row, numbers, atol=5.1e-5)


def test_tchebycheff_by_hand() -> None:
    """w = (.8, .2), u = 3, rho = .05: the objective that falls short most by its weight, here the first of both."""
    rewards, w = np.array([[[0.0, 1.0], [1.0, 0.0]]]), np.array([[0.8, 0.2]])
    z = 0.5 / (np.sqrt(0.5) + 1e-4)  # each reward: mean .5, sd sqrt(.5)
    found = grpo.aggregated(rewards, w, "tchebycheff")[0]
    np.testing.assert_allclose(found, [-0.8 * (3 + z) + 0.05 * -0.6 * z, -0.8 * (3 - z) + 0.05 * 0.6 * z])
    np.testing.assert_allclose(grpo.whitened(found[None], ALIKE[:1])[0], [-np.sqrt(0.5), np.sqrt(0.5)], atol=1e-4)


def test_dvao_weighs_by_what_varies_and_none_where_nothing_does() -> None:
    """Weights .5 sd / sum: sds .57735 and .35590 make .6186 and .3814; in group 2 all weight is the first's."""
    z = grpo.standardised(REWARDS)
    found = grpo.aggregated(REWARDS, EVEN, "dvao")
    np.testing.assert_allclose(found[0], z[0] @ [0.61864, 0.38136], atol=1e-5)
    np.testing.assert_allclose(found[1], z[1, :, 0])
    assert grpo.aggregated(np.ones((1, 4, 2)), EVEN[:1], "dvao").tolist() == [[0.0] * 4]


@pytest.mark.parametrize("how", ["sum", "gdpo", "rvpo", "dvao", "tchebycheff"])
def test_at_a_corner_the_other_reward_does_not_count(how: grpo.Aggregation) -> None:
    """Up to the scale that whitening takes away again; w = (0, 1) in group 1, (1, 0) in group 2."""
    found = grpo.aggregated(REWARDS, np.array([[0.0, 1.0], [1.0, 0.0]]), how)
    wanted = grpo.standardised(np.stack([REWARDS[0, :, 1], REWARDS[1, :, 0]]))
    np.testing.assert_allclose(grpo.whitened(found, np.arange(2)), wanted, atol=5e-4)


def test_rvpo_lies_between_gdpo_and_the_least_reward() -> None:
    rng = np.random.default_rng(0)
    rewards, w = rng.normal(size=(5, 6, 3)), rng.dirichlet(np.ones(3), size=5)
    z = grpo.standardised(rewards)
    np.testing.assert_allclose(
        grpo.aggregated(rewards, w, "rvpo", 1e-6), grpo.aggregated(rewards, w, "gdpo"), atol=1e-5
    )
    np.testing.assert_allclose(grpo.aggregated(rewards, w, "rvpo", 1e3), z.min(axis=-1), atol=0.02)


def test_two_rewards_of_constant_sum_cancel_at_equal_weights() -> None:
    """Helpful at the cost of harmless, one for one: nothing is preferred at (.5, .5), and whitening does not help.

    ``rvpo`` and ``tchebycheff`` still prefer the answers in the middle to those at either end; ``dvao`` does not.
    """
    first = np.array([0.0, 1.0, 2.0, 5.0])
    rewards = np.stack([first, 3.0 - first], axis=-1)[None]
    for how in ("sum", "gdpo", "dvao"):
        found = grpo.aggregated(rewards, EVEN[:1], how)
        np.testing.assert_allclose(found, 0, atol=1e-12)
        np.testing.assert_allclose(grpo.whitened(found, ALIKE[:1]), 0, atol=1e-9)
    for how in ("rvpo", "tchebycheff"):
        assert grpo.aggregated(rewards, EVEN[:1], how)[0].argmax() == 2
    # A step away from equal weights the order is there, and whitening makes it as loud as at a corner.
    near = grpo.aggregated(rewards, np.array([[0.55, 0.45]]), "gdpo")
    assert near.std() == pytest.approx(0.1 * grpo.standardised(rewards)[..., 0].std())
    np.testing.assert_allclose(grpo.whitened(near, ALIKE[:1]), grpo.standardised(rewards)[..., 0], atol=2e-3)


@pytest.mark.parametrize(("how", "better"), [("sum", 0), ("dvao", 0), ("gdpo", 1), ("rvpo", 1), ("tchebycheff", 1)])
def test_rewards_standardised_one_by_one_forget_what_one_costs_of_the_other(how: grpo.Aggregation, better: int) -> None:
    """Of two answers the first has 1 more of the first reward, the second .2 more of the second. At (.3, .7) w . r is
    .3 and .14; standardised, both differences are alike, and the larger weight decides whatever the trade."""
    rewards, w = np.array([[[1.0, 0.0], [0.0, 0.2]]]), np.array([[0.3, 0.7]])
    assert grpo.aggregated(rewards, w, how)[0].argmax() == better


def test_dvao_is_the_centred_sum_over_the_weighted_deviations() -> None:
    """So it orders answers as ``sum`` does, and no advantage is larger than there."""
    rng = np.random.default_rng(2)
    rewards, w = rng.normal(size=(4, 5, 3)), rng.dirichlet(np.ones(3), size=4)
    utility = (rewards * w[:, None]).sum(-1)
    spread = (w * rewards.std(axis=1, ddof=1)).sum(-1, keepdims=True)
    found = grpo.aggregated(rewards, w, "dvao")
    np.testing.assert_allclose(found, (utility - utility.mean(1, keepdims=True)) / spread, rtol=1e-3)
    assert (abs(found) <= abs(grpo.aggregated(rewards, w, "sum")) + 1e-3).all()


def test_whitening_keeps_preferences_apart() -> None:
    """Each kind's answers have mean 0 and deviation 1 of their own, wherever its prompts stand in the batch."""
    rng = np.random.default_rng(1)
    advantages, kinds = rng.normal(size=(6, 4)) * np.array([[1], [9], [1], [9], [1], [9]]), np.array([0, 1] * 3)
    found = grpo.whitened(advantages, kinds)
    for kind in (0, 1):
        own = advantages[kinds == kind]
        np.testing.assert_allclose(found[kinds == kind], (own - own.mean()) / (own.std(ddof=1) + 1e-4))


def test_k3_by_hand() -> None:
    """d = log .5 - log .25 = log 2: 2 - log 2 - 1 = .3069; d = 0: 0."""
    found = grpo.k3(torch.tensor([0.25, 0.5]).log(), torch.tensor([0.5, 0.5]).log())
    assert found.tolist() == pytest.approx([0.306853, 0.0], abs=1e-6)


def batch(seed: int = 0) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Three rows of 4, 2 and 3 tokens: ``logps``, ``ref_logps``, ``old_logps``, ``entropy``, ``mask``, and tensors."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(4) < torch.tensor([[4], [2], [3]])
    now, ref, old, entropy = (-torch.rand(3, 4, generator=generator, dtype=torch.float64) * mask for _ in range(4))
    tensors = {
        "advantages": torch.tensor([0.7, -1.2, 0.5], dtype=torch.float64),
        "per_token": torch.full((3,), 3 / 9, dtype=torch.float64),
    }
    return [now, ref, old, entropy, mask], tensors


def test_the_loss_is_a_mean_over_tokens_with_clipping() -> None:
    (now, ref, old, entropy, mask), tensors = batch()
    found, metrics = grpo.loss(now, ref, old, entropy, mask, tensors, clip_range=0.2, beta=0.3)
    total, beyond = 0.0, 0
    for i, j in mask.nonzero().tolist():
        u, a, d = float((now - old)[i, j].exp()), float(tensors["advantages"][i]), float((ref - now)[i, j])
        total += -min(u * a, min(max(u, 0.8), 1.2) * a) + 0.3 * (np.exp(d) - d - 1)
        beyond += (a > 0 and u > 1.2) or (a < 0 and u < 0.8)
    assert float(found) == pytest.approx(total / 9)
    assert 0 < beyond < 9
    assert metrics["clip_fraction"] == pytest.approx(beyond / 9)


def test_its_gradient_is_that_of_finite_differences() -> None:
    (now, *others), tensors = batch(3)

    def value(logps: torch.Tensor) -> torch.Tensor:
        return grpo.loss(logps, *others, tensors, clip_range=0.2, beta=0.3)[0]

    assert torch.autograd.gradcheck(value, now.clone().requires_grad_())


# -- where it comes to rest ------------------------------------------------------------------------------------------

BETA = 4 / 3
"""A prompt with two answers, equally likely to the reference, of reward 1 and 0. With A standardised over answers drawn
with probability p of the first, A_1 = sqrt((1 - p) / p), A_0 = -sqrt(p / (1 - p)); the gradient of the loss in the
logit vanishes where ``sqrt(p (1 - p)) = beta (p - 1/2)``: ``p = (1 + 1 / sqrt(1 + beta^2)) / 2``, here .8."""


def slope(p: float, answers: int = 10_000) -> float:
    """The gradient of the loss in the first answer's logit, over a group with exactly its share of each answer."""
    logit = torch.tensor(np.log(p / (1 - p)), requires_grad=True)
    ones = round(p * answers)
    first = torch.arange(answers) < ones
    logps = torch.where(first, torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit))[:, None]
    rewards = first.double().numpy()[None, :, None]
    advantages = torch.as_tensor(grpo.aggregated(rewards, np.ones((1, 1)), "sum")[0])
    tensors = {"advantages": advantages, "per_token": torch.ones(answers, dtype=torch.float64)}
    ref, mask = torch.full_like(logps, np.log(0.5)), torch.ones(answers, 1, dtype=torch.bool)
    value, _ = grpo.loss(
        logps, ref.detach(), logps.detach(), torch.zeros(answers, 1), mask, tensors, clip_range=0.2, beta=BETA
    )
    value.backward()
    assert logit.grad is not None
    return float(logit.grad)


def test_a_policy_that_is_a_table_comes_to_rest_at_the_closed_form() -> None:
    assert (1 + 1 / np.sqrt(1 + BETA**2)) / 2 == pytest.approx(0.8)
    assert slope(0.8) == pytest.approx(0, abs=1e-3)
    assert slope(0.7) < -0.01  # more of the better answer
    assert slope(0.9) > 0.01
    p = 0.5
    for _ in range(200):
        p = 1 / (1 + (1 - p) / p * np.exp(4 * slope(p)))  # a gradient step in the logit
    assert p == pytest.approx(0.8, abs=2e-3)

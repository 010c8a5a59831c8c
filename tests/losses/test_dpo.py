"""The DPO loss: hand-worked numbers, finite differences, and the optimum it must reach on an enumerable policy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from moalign.losses.dpo import log_ratios, margin_logits, modpo_losses, pair_loss, preference_loss

BETA = 0.1
WEIGHTS = np.array([0.3, 0.7])


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_log_ratios_sum_over_the_response() -> None:
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]])
    ref = torch.tensor([[-2.0, -2.5, 0.0], [-0.25, 0.0, 0.0]])
    assert log_ratios(logps, ref).tolist() == [1.5, -0.25]


def test_one_pair_by_hand() -> None:
    # z = .1 * (2 - -1) = .3; -log sigma(.3) = log(1 + exp(-.3)) = .554355; the other way round .3 more.
    one = torch.ones(1, 1, dtype=torch.float64)
    assert pair_loss(column(2.0), column(-1.0), one, one, BETA).item() == pytest.approx(0.554355, abs=1e-6)
    assert pair_loss(column(2.0), column(-1.0), -one, one, BETA).item() == pytest.approx(0.854355, abs=1e-6)
    assert pair_loss(column(-1.0), column(2.0), -one, one, BETA).item() == pytest.approx(0.554355, abs=1e-6)


def test_a_pair_whose_responses_are_as_likely_as_in_the_reference_costs_log_2() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    assert pair_loss(column(0.7), column(0.7), one, one, BETA).item() == pytest.approx(math.log(2))


def test_a_label_per_objective_by_hand() -> None:
    # .7 * .554355 (first preferred) + .3 * .854355 (second preferred) = .644355
    labels, weights = torch.tensor([[1.0, -1.0]]).double(), torch.tensor([[0.7, 0.3]]).double()
    loss = pair_loss(column(2.0), column(-1.0), labels, weights, BETA)
    assert loss.item() == pytest.approx(0.644355, abs=1e-6)


def test_ties_cost_nothing_and_pull_nowhere() -> None:
    first = column(2.0, 2.0).requires_grad_()
    labels = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).double()
    weights = torch.tensor([[0.4, 0.6], [0.4, 0.6]]).double()
    loss = pair_loss(first, column(-1.0, -1.0), labels, weights, BETA)
    assert loss.tolist() == pytest.approx([0.6 * 0.5543552444685271, 0.0])
    loss.sum().backward()
    assert first.grad is not None
    assert first.grad[0].item() < 0
    assert first.grad[1].item() == 0


def test_it_stays_finite_where_sigma_underflows() -> None:
    one = torch.ones(2, 1, dtype=torch.float64)
    loss = pair_loss(column(-1e5, 1e5), column(1e5, -1e5), one, one, BETA)
    assert loss.tolist() == pytest.approx([2e4, 0.0])


def test_its_gradient_is_that_of_finite_differences() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=5), rng.normal(size=5)
    labels = torch.tensor(rng.choice([-1.0, 0.0, 1.0], size=(5, 2)))
    weights = torch.tensor(rng.random((5, 2)))

    def total(a: np.ndarray, b: np.ndarray) -> float:
        return float(pair_loss(torch.tensor(a), torch.tensor(b), labels, weights, BETA).sum())

    a, b = torch.tensor(first, requires_grad=True), torch.tensor(second, requires_grad=True)
    pair_loss(a, b, labels, weights, BETA).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    for i, step in enumerate(np.eye(5) * 1e-6):
        assert a.grad[i].item() == pytest.approx(
            (total(first + step, second) - total(first - step, second)) / 2e-6, abs=1e-8
        )
        assert b.grad[i].item() == pytest.approx(
            (total(first, second + step) - total(first, second - step)) / 2e-6, abs=1e-8
        )


# -- the optimum, on a policy over 8 responses that is a table of logits --------------------------------------------

RESPONSES = 8
PAIRS = np.array(list(itertools.combinations(range(RESPONSES), 2)))


@pytest.fixture
def world() -> tuple[np.ndarray, np.ndarray]:
    """log pi_ref ``[8]`` and rewards ``[8, 2]``, scaled so that exp(r / beta) spans a factor of some tens."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=RESPONSES)
    return logits - np.log(np.exp(logits).sum()), BETA * 1.2 * rng.normal(size=(RESPONSES, 2))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def trained(log_ref: np.ndarray, chances: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    """Minimise the expected loss when label k says "first" with chance ``chances[pair, k]``; returns pi ``[8]``."""
    logits = torch.zeros(RESPONSES, dtype=torch.float64, requires_grad=True)
    ref, sure = torch.tensor(log_ref), torch.tensor(chances)
    labels = torch.cat([torch.ones_like(sure), -torch.ones_like(sure)], dim=1)
    told = torch.tensor(weights) * torch.cat([sure, 1 - sure], dim=1)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = log_ratios(torch.log_softmax(logits, 0).unsqueeze(-1), ref.unsqueeze(-1))
        loss = pair_loss(ratio[PAIRS[:, 0]], ratio[PAIRS[:, 1]], labels, told, beta).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(logits.detach(), 0).numpy()


def tilted(log_ref: np.ndarray, log_factor: np.ndarray) -> np.ndarray:
    unnormalised = np.exp(log_ref + log_factor)
    return np.asarray(unnormalised / unnormalised.sum())


def distance(left: np.ndarray, right: np.ndarray) -> float:
    """Total variation."""
    return float(np.abs(left - right).sum() / 2)


def test_weighted_pairs_reach_the_kl_regularised_optimum(world: tuple[np.ndarray, np.ndarray]) -> None:
    """With P(first preferred) = sigma(w.r1 - w.r2) the minimum is ``pi_ref exp(w.r / beta) / Z`` (DPO, eq. 4)."""
    log_ref, rewards = world
    utility = rewards @ WEIGHTS
    chances = sigmoid(utility[PAIRS[:, 0]] - utility[PAIRS[:, 1]])[:, None]
    policy = trained(log_ref, chances, np.ones(1), BETA)
    optimum = tilted(log_ref, utility / BETA)
    assert distance(optimum, np.exp(log_ref)) > 0.1  # there is something to learn
    assert distance(policy, optimum) < 1e-3


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Return the maximum-likelihood log-strengths for a matrix of wins, by Zermelo's fixed-point iteration."""
    strength = np.ones(len(wins))
    games = wins + wins.T
    for _ in range(20_000):
        strength = wins.sum(axis=1) / (games / (strength[:, None] + strength[None, :])).sum(axis=1)
        strength = strength / strength.mean()
    return np.asarray(np.log(strength))


def test_a_label_per_objective_reaches_its_own_fixed_point(world: tuple[np.ndarray, np.ndarray]) -> None:
    """The loss is a Bradley-Terry likelihood in beta * D with ``sum_k w_k sigma(r_k1 - r_k2)`` wins of the first; its
    maximum, found here by another algorithm, is the policy's tilt. It is not the weighted pairs' optimum."""
    log_ref, rewards = world
    rewards, beta = rewards * 20, 2.0  # far from the linear part of sigma, where mixing labels equals mixing rewards
    chances = sigmoid(rewards[PAIRS[:, 0]] - rewards[PAIRS[:, 1]])
    policy = trained(log_ref, chances, np.concatenate([WEIGHTS, WEIGHTS]), beta)
    wins = np.zeros((RESPONSES, RESPONSES))
    wins[PAIRS[:, 0], PAIRS[:, 1]] = chances @ WEIGHTS
    wins[PAIRS[:, 1], PAIRS[:, 0]] = (1 - chances) @ WEIGHTS
    assert distance(policy, tilted(log_ref, bradley_terry(wins) / beta)) < 1e-3
    assert policy.max() < 0.9
    assert distance(policy, tilted(log_ref, rewards @ WEIGHTS / beta)) > 0.03


# -- margins (MODPO) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "mu", "z", "sigmoid", "hinge"),
    [
        # beta .1, D(y_w) = 2, D(y_l) = -1, so beta * (D(y_w) - D(y_l)) = .3.
        ((1.0, 0.0), (0.5,), 0.3, 0.554355, 0.7),
        ((0.5, 0.5), (0.5,), 0.1, 0.644397, 0.9),  # (.3 - .5 * (.3 - -.2)) / .5
        # Three objectives: (.3 - (.3 * .5 + .2 * -1)) / .5 = .35 / .5.
        ((0.5, 0.3, 0.2), (0.5, -1.0), 0.7, 0.403186, 0.3),
        # A margin that says the chosen response is worse elsewhere: (.3 + .6 * 4) / .2.
        ((0.2, 0.6, 0.2), (-4.0, 0.0), 13.5, 1.370957e-6, 0.0),
    ],
)
def test_margins_by_hand(w: tuple[float, ...], mu: tuple[float, ...], z: float, sigmoid: float, hinge: float) -> None:
    found = margin_logits(column(2.0), column(-1.0), column(*mu)[None], column(*w[1:]), w[0], BETA)
    assert found.item() == pytest.approx(z, abs=1e-12)
    sure = column(1.0)
    assert preference_loss(found, sure, "sigmoid").item() == pytest.approx(sigmoid, abs=1e-6)
    assert preference_loss(found, sure, "hinge").item() == pytest.approx(hinge, abs=1e-6)


def test_with_all_the_weight_on_its_objective_it_is_plain_dpo_bit_for_bit() -> None:
    chosen, rejected = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    margins = torch.randn(50, 2, generator=torch.Generator().manual_seed(2))
    z = margin_logits(chosen, rejected, margins, torch.zeros(2), 1.0, 0.3)
    one = torch.ones(50, 1)
    plain = pair_loss(chosen, rejected, one, one, 0.3)
    assert torch.equal(preference_loss(z, torch.ones(50), "sigmoid"), plain)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_the_gradient_is_minus_beta_over_w_k_times_sigma_of_minus_z(share: float) -> None:
    """Against finite differences and against the formula, for both responses of every pair."""
    rng = np.random.default_rng(3)
    values = torch.tensor(rng.normal(size=(2, 20)), requires_grad=True)
    margins, weights = torch.tensor(rng.normal(size=(20, 2))), (1 - share) * column(0.25, 0.75)

    def loss(d: torch.Tensor) -> torch.Tensor:
        return preference_loss(margin_logits(d[0], d[1], margins, weights, share, 0.2), torch.ones(20), "sigmoid")

    loss(values).sum().backward()
    z = margin_logits(values[0], values[1], margins, weights, share, 0.2).detach()
    wanted = -(0.2 / share) * torch.sigmoid(-z)
    torch.testing.assert_close(values.grad, torch.stack([wanted, -wanted]), rtol=1e-10, atol=1e-12)
    step = 1e-6
    up = values.detach() + step * torch.tensor([[1.0], [0.0]])
    down = values.detach() - step * torch.tensor([[1.0], [0.0]])
    torch.testing.assert_close((loss(up) - loss(down)) / (2 * step), wanted, rtol=1e-4, atol=1e-8)


def test_a_label_of_probability_p_costs_its_expectation() -> None:
    z = column(0.3, 0.3, -2.0)
    told = preference_loss(z, column(1.0, 0.25, 0.5), "sigmoid")
    # -log sigma(.3) = .554355, -log sigma(-.3) = .854355; -log sigma(2) = .126928, -log sigma(-2) = 2.126928.
    assert told.tolist() == pytest.approx([0.554355, 0.25 * 0.554355 + 0.75 * 0.854355, 1.126928], abs=1e-6)
    assert preference_loss(z, column(1.0, 0.25, 0.5), "hinge").tolist() == pytest.approx([0.7, 1.15, 1.5])


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="sigmoid or hinge; found 'ipo'"):
        preference_loss(column(0.0), column(1.0), "ipo")


# -- the loss of a batch of labelled pairs ---------------------------------------------------------------------------


def batch_loss(**changes: Any) -> tuple[float, dict[str, float]]:
    """Two pairs. D(y_w) = (2, -1), D(y_l) = (-1, 1): beta times the difference is (1.5, -1) with beta 1/2.

    The margins weigh (.4 * 1 - .1 * 2, .4 * -2 + .1 * 0) = (.2, -.8). Rows of 2 and 1, 1 and 4 tokens.
    """
    logps = torch.tensor([[-1.0, -2, 0, 0], [-5, 0, 0, 0], [-6, 0, 0, 0], [-1, -1, -1, -1]])
    mask = (logps != 0).long()
    ref = torch.tensor([[-5.0, -5.0], [-4.0, -5.0]])  # chosen, rejected
    margins, chance = torch.tensor([[1.0, 2.0], [-2.0, 0.0]]), changes.pop("chance", torch.ones(2))
    given: dict[str, Any] = {"margin_weights": torch.tensor([0.4, -0.1]), "share": 0.5, "beta": 0.5, **changes}
    losses, metrics = modpo_losses(logps, ref, mask, margins, chance, given.pop("weights", torch.ones(2)), **given)
    assert losses.shape == (2,)
    return float(losses.mean()), {name: float(value) for name, value in metrics.items()}


def nll_of_sigmoid(z: float) -> float:
    return math.log1p(math.exp(-z))


Z = ((1.5 - 0.2) / 0.5, (-1.0 + 0.8) / 0.5)


def test_the_loss_of_a_batch_by_hand() -> None:
    loss, metrics = batch_loss()
    assert loss == pytest.approx((nll_of_sigmoid(Z[0]) + nll_of_sigmoid(Z[1])) / 2, abs=1e-6)
    wanted = {"accuracy": 0.5, "preference": (1.5 + 1.0) / 2, "margin": (0.2 + 0.8) / 2, "chosen_log_ratio": 0.5}
    assert metrics == pytest.approx(wanted, abs=1e-6)
    hinge, _ = batch_loss(kind="hinge")
    assert hinge == pytest.approx((0.0 + (1 - Z[1])) / 2, abs=1e-6)


def test_each_pair_has_its_weight_and_its_chance() -> None:
    loss, metrics = batch_loss(weights=torch.tensor([3.0, 0.5]), chance=torch.tensor([0.75, 1.0]))
    first = 0.75 * nll_of_sigmoid(Z[0]) + 0.25 * nll_of_sigmoid(-Z[0])
    assert loss == pytest.approx((3 * first + 0.5 * nll_of_sigmoid(Z[1])) / 2, abs=1e-6)
    assert metrics == batch_loss()[1]


def test_the_supervised_term_is_a_mean_over_tokens_of_the_chosen_or_of_both() -> None:
    """Per token: chosen -3/2 and -5, rejected -6 and -1."""
    plain, _ = batch_loss()
    chosen, _ = batch_loss(sft_coef=0.1, sft_on="chosen")
    both, _ = batch_loss(sft_coef=0.1, sft_on="both")
    assert chosen - plain == pytest.approx(0.1 * (1.5 + 5) / 2, abs=1e-6)
    assert both - plain == pytest.approx(0.1 * ((1.5 + 6) / 2 + (5 + 1) / 2) / 2, abs=1e-6)


def test_three_pairs_by_hand_one_of_them_undecided() -> None:
    """One token each, a reference of 0, beta 1/2: differences of -1 - -1, -2 - -3, -3 - -4 make 0, .5 and .5.

    Then the last rejected response has no token: a mean over none of them is 0.
    """
    logps = torch.tensor([[-1.0], [-2.0], [-3.0], [-1.0], [-3.0], [-4.0]])
    mask, no_margins, ones = torch.ones(6, 1), torch.zeros(3, 0), torch.ones(3)
    given: dict[str, Any] = {"margin_weights": torch.zeros(0), "share": 1.0, "beta": 0.5}
    losses, metrics = modpo_losses(logps, torch.zeros(3, 2), mask, no_margins, ones, ones, **given)
    assert losses.tolist() == pytest.approx([math.log(2), nll_of_sigmoid(0.5), nll_of_sigmoid(0.5)], abs=1e-6)
    assert float(metrics["accuracy"]) == pytest.approx(2 / 3)  # a tie is not right
    assert float(metrics["preference"]) == pytest.approx(1 / 3)
    assert float(metrics["chosen_log_ratio"]) == pytest.approx(-2.0)

    logps[5] = mask[5] = 0.0
    plain, _ = modpo_losses(logps, torch.zeros(3, 2), mask, no_margins, ones, ones, **given)
    both, _ = modpo_losses(logps, torch.zeros(3, 2), mask, no_margins, ones, ones, **given, sft_coef=0.1, sft_on="both")
    assert (both - plain).tolist() == pytest.approx([0.1, 0.25, 0.15], abs=1e-6)


def test_per_token_it_compares_mean_log_probabilities_without_a_reference() -> None:
    """AMoPO's loss: chosen -3/2 and -5 a token, rejected -6 and -1; beta = 1/2 makes differences of 2.25 and -2."""
    loss, metrics = batch_loss(per_token=True, margin_weights=torch.zeros(2), share=1.0)
    assert loss == pytest.approx((nll_of_sigmoid(2.25) + nll_of_sigmoid(-2.0)) / 2, abs=1e-6)
    assert metrics["accuracy"] == 0.5
    with_sft, _ = batch_loss(per_token=True, margin_weights=torch.zeros(2), share=1.0, sft_coef=0.1)
    assert with_sft - loss == pytest.approx(0.1 * (1.5 + 5) / 2, abs=1e-6)

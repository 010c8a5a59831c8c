"""MRPO's virtual reference: hand-worked numbers, the public code's formula written again, DPO where all agree."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from moalign.losses.dpo import modpo_losses
from moalign.losses.references import Trust, clipped, trusted, virtual_reference

BASE, OTHER = (-10.0, -12.0), (-9.0, -14.0)
PAIR = np.array([[BASE], [OTHER]])
"""Two references of one pair, ``[2, 1, 2]``."""


def test_trust_by_hand() -> None:
    # The base tells the pair apart by 2 nats, the other by 5.
    assert trusted(PAIR, "confident")[:, 0] == pytest.approx([2 / 7, 5 / 7], abs=1e-6)
    assert trusted(PAIR, "code")[:, 0] == pytest.approx([5 / 7, 2 / 7], abs=1e-6)
    assert trusted(PAIR, "even")[:, 0].tolist() == [0.5, 0.5]
    three = np.array([[BASE], [OTHER], [(-8.0, -7.0)]])
    assert trusted(three, "confident")[:, 0] == pytest.approx([2 / 8, 5 / 8, 1 / 8], abs=1e-6)
    with pytest.raises(ValueError, match="two references; found 3"):
        trusted(three, "code")
    alike = np.full((2, 1, 2), -5.0)  # nobody tells them apart: the first is the reference
    assert trusted(alike, "confident")[:, 0].tolist() == [1.0, 0.0]


def test_the_trust_region_by_hand() -> None:
    # Mean nats 9.5 and 13 of 22.5: e = .1 * 9.5 / 22.5 = .042222 for the first, .057778 for the second.
    # -9 is above -10 * (1 - .042222) = -9.577778; -14 is below -12 * (1 + .057778) = -12.693333.
    near = clipped(PAIR, 0.1)
    assert near[0, 0].tolist() == list(BASE)
    assert near[1, 0] == pytest.approx([-9.577778, -12.693333], abs=1e-6)
    assert clipped(PAIR, 0.0)[1, 0].tolist() == list(BASE)
    wide = clipped(PAIR, 0.9)  # -10 * (1 - .38), -12 * (1 + .52): both inside
    assert wide[1, 0].tolist() == list(OTHER)


def test_the_reference_and_the_loss_of_a_pair_by_hand() -> None:
    # -log(2/7 e^10 + 5/7 e^9.577778) = -10 - log(.285714 + .714286 * .655588) = -10 + .282375
    # -log(2/7 e^12 + 5/7 e^12.693333) = -12 - log(.285714 + .714286 * 2.000373) = -12 - .539151
    virtual = virtual_reference(PAIR)
    assert virtual[0] == pytest.approx([-9.717625, -12.539151], abs=2e-6)
    # beta .1, the policy at -9 and -13: z = .1 * ((-9 + 9.717625) - (-13 + 12.539151)) = .117847
    loss, _ = losses(torch.tensor([[-9.0], [-13.0]]), virtual)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.117847)), abs=1e-6)


def losses(logps: torch.Tensor, reference: np.ndarray) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Plain DPO of pairs with one token each."""
    pairs = len(reference)
    return modpo_losses(
        logps,
        torch.tensor(reference, dtype=logps.dtype),
        torch.ones_like(logps, dtype=torch.long),
        torch.zeros(pairs, 0, dtype=logps.dtype),
        torch.ones(pairs, dtype=logps.dtype),
        torch.ones(pairs, dtype=logps.dtype),
        margin_weights=torch.zeros(0, dtype=logps.dtype),
        share=1.0,
        beta=0.1,
    )


def random_pairs(count: int, pairs: int = 50) -> np.ndarray:
    return -np.random.default_rng(count).gamma(4.0, 5.0, size=(count, pairs, 2))


def test_code_is_the_public_codes_formula() -> None:
    """``l1 + l2 - log(a e^l1 + (1 - a) e^l2)``, l1 the further reference clipped, a its share of the gaps (eta .1)."""
    l2, l1 = random_pairs(2)
    gap1, gap2 = np.abs(l1[:, 0] - l1[:, 1]), np.abs(l2[:, 0] - l2[:, 1])
    a = gap1 / (gap1 + gap2 + 1e-6)
    mean = (l1 + l2) / 2
    scale = np.abs(mean[:, 0]) / (np.abs(mean[:, 0]) + np.abs(mean[:, 1]))
    wanted = []
    for at, eta in ((0, 0.1 * scale), (1, 0.1 * (1 - scale))):
        first = np.minimum(np.maximum(l1[:, at], l2[:, at] * (1 + eta)), l2[:, at] * (1 - eta))
        mixed = np.logaddexp(np.log(a) + first, np.log1p(-a) + l2[:, at])
        wanted.append(first + l2[:, at] - mixed)
    found = virtual_reference(np.stack([l2, l1]), "code", 0.1)
    np.testing.assert_allclose(found, np.stack(wanted, axis=1), rtol=1e-9)
    own = virtual_reference(np.stack([l2, l1]), "confident", 0.1)
    assert np.abs(own - found).max() > 0.1  # the exchange matters


@pytest.mark.parametrize("trust", ["confident", "even"])
@pytest.mark.parametrize("region", [None, 0.1, 0.5])
def test_references_that_agree_are_that_reference(trust: Trust, region: float | None) -> None:
    one = random_pairs(1)
    np.testing.assert_allclose(virtual_reference(np.repeat(one, 3, axis=0), trust, region), one[0], rtol=1e-12)
    np.testing.assert_allclose(virtual_reference(random_pairs(4), trust, 0.0), random_pairs(4)[0], rtol=1e-12)


def test_it_is_a_harmonic_mean_that_one_doubter_keeps_low() -> None:
    many = random_pairs(3)
    virtual = virtual_reference(many, "even", None)
    np.testing.assert_allclose(np.exp(-virtual), np.exp(-many).mean(axis=0), rtol=1e-9)
    least = many.min(axis=0)
    assert (virtual >= least - 1e-9).all() and (virtual <= least + math.log(3) + 1e-9).all()


def test_its_gradient_is_that_of_the_loss_written_in_probabilities() -> None:
    """``-log sigma(beta log(pi(w) / pi(l) * sum_k a_k / pi_k(w) / sum_k a_k / pi_k(l)))`` by autograd."""
    many = random_pairs(3, 7) / 4
    generator = torch.Generator().manual_seed(3)
    policy = (-4 * torch.rand(14, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    loss, _ = losses(policy, virtual_reference(many, "confident", None))
    (found,) = torch.autograd.grad(loss.sum(), policy)
    a = torch.tensor(trusted(many, "confident"))
    inverse = (a.unsqueeze(-1) / torch.tensor(np.exp(many))).sum(0)
    chosen, rejected = policy.exp().reshape(2, 7)
    odds = (chosen / rejected * inverse[:, 0] / inverse[:, 1]) ** 0.1
    (wanted,) = torch.autograd.grad(-(odds / (1 + odds)).log().sum(), policy)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_its_optimum_is_the_virtual_references_tilt() -> None:
    """On a table of 8 responses, Bradley-Terry labels: ``pi~ exp(r / beta) / Z``, which no single reference gives."""
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(3, 8))
    refs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    rewards, pairs = 0.1 * rng.normal(size=8), np.array(list(itertools.combinations(range(8), 2)))
    virtual = virtual_reference(refs[:, pairs], "even", None)
    chance = torch.tensor(1 / (1 + np.exp(rewards[pairs[:, 1]] - rewards[pairs[:, 0]])))
    table = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = torch.log_softmax(table, 0)[torch.tensor(pairs.T.reshape(-1))].unsqueeze(-1)
        ones = torch.ones(len(pairs), dtype=torch.float64)
        loss = modpo_losses(
            logps, torch.tensor(virtual), torch.ones_like(logps), torch.zeros(len(pairs), 0).double(), chance, ones,
            margin_weights=torch.zeros(0).double(), share=1.0, beta=0.1,
        )[0].mean()  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(closure)
    whole = virtual_reference(refs[:, None, [[0, 1], [2, 3], [4, 5], [6, 7]]][:, 0], "even", None).reshape(-1)
    found = torch.softmax(table.detach(), 0).numpy()

    def tilted(log_ref: np.ndarray) -> np.ndarray:
        weights = np.exp(log_ref + rewards / 0.1)
        return np.asarray(weights / weights.sum())

    assert np.abs(found - tilted(whole)).sum() / 2 < 1e-3
    assert min(np.abs(found - tilted(ref)).sum() / 2 for ref in refs) > 0.05

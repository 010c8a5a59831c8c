"""BAPO's anchor: hand-worked numbers, its gradient, and what it does to the optimum of a policy that is a table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from moalign.losses.anchor import anchor_losses
from moalign.losses.dpo import pair_loss

LOGPS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, 0.0], [-4.0, 0.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
REF = torch.tensor([-3.0, -2.0, -4.0], dtype=torch.float64)


def test_by_hand() -> None:
    # Sums -6, -1, -4 against -3, -2, -4 over 3, 2 and 1 tokens: d = -1, .5, 0.
    below, d = anchor_losses(LOGPS, REF, MASK)
    assert d.tolist() == [-1.0, 0.5, 0.0]
    assert below.tolist() == [1.0, 0.0, 0.0]
    both, _ = anchor_losses(LOGPS, REF, MASK, "both")
    assert both.tolist() == [1.0, 0.25, 0.0]
    with pytest.raises(ValueError, match="below or both; found 'above'"):
        anchor_losses(LOGPS, REF, MASK, "above")  # type: ignore[arg-type]


def test_its_gradient_pulls_up_what_has_become_unlikely() -> None:
    for form, wanted in (("below", [-1 / 3, 0.0, 0.0]), ("both", [-2 / 3, 1 / 2, 0.0])):
        logps = LOGPS.clone().requires_grad_()
        anchor_losses(logps, REF, MASK, form)[0].sum().backward()  # type: ignore[arg-type]
        assert logps.grad is not None
        assert (logps.grad * MASK).amax(1).where(torch.tensor(wanted) > 0, (logps.grad * MASK).amin(1)).tolist() == (
            pytest.approx(wanted)
        )
        assert torch.equal(logps.grad[0], logps.grad[0, 0].expand(3))  # a mean: every token of a response alike


def test_the_heavier_it_is_the_nearer_the_optimum_is_to_the_reference() -> None:
    """Expected loss over all pairs of 8 responses and all anchors, drawn from the reference; 0 is DPO's optimum."""
    rng = np.random.default_rng(2)
    logits = rng.normal(size=8)
    log_ref = torch.tensor(logits - np.logaddexp.reduce(logits))
    rewards, pairs = torch.tensor(0.3 * rng.normal(size=8)), torch.tensor(list(itertools.combinations(range(8), 2)))
    chance = torch.sigmoid(rewards[pairs[:, 0]] - rewards[pairs[:, 1]]).unsqueeze(-1)
    one = torch.ones_like(chance)

    def optimum(weight: float) -> torch.Tensor:
        table = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([table], lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            logps = torch.log_softmax(table, 0)
            d = logps - log_ref
            loss = pair_loss(d[pairs[:, 0]], d[pairs[:, 1]], one, one, 0.1, chance).mean()
            held, _ = anchor_losses(logps.unsqueeze(-1), log_ref, torch.ones(8, 1), "below")
            (loss + weight * (log_ref.exp() * held).sum()).backward()
            optimizer.step()
        return torch.log_softmax(table.detach(), 0)

    found = [optimum(weight) for weight in (0.0, 0.01, 0.1)]
    moved = [float((log_ref.exp() * (log_ref - logps)).sum()) for logps in found]
    assert moved[0] > 2 * moved[1] > 4 * moved[2] > 0
    tilted = torch.log_softmax(log_ref + rewards / 0.1, 0)
    assert float((found[0].exp() - tilted.exp()).abs().sum() / 2) < 0.02

"""The neural process of a user's preference, against closed forms, scipy and numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from moalign.losses.neural_process import elbo_loss, kl, mean_weights, posterior, scale_of, weights


def test_pairs_are_factors_of_a_gaussian_and_unknown_ones_say_nothing() -> None:
    """Two pairs of precision 1 and 2 on a prior of 1: precision 4, the mean a quarter of the shifts' sum."""
    shifts = torch.tensor([[[1.0, -1.0], [3.0, 2.0], [9.0, 9.0]]] * 2)
    precisions = torch.tensor([[[1.0, 0.0], [2.0, 0.5], [7.0, 7.0]]] * 2)
    mean, variance = posterior(shifts, precisions, torch.tensor([[True, True, False], [False] * 3]))
    assert mean.tolist() == [[1.0, pytest.approx(1 / 1.5)], [0.0, 0.0]]
    assert variance.tolist() == [[0.25, pytest.approx(1 / 1.5)], [1.0, 1.0]]


def test_the_factors_are_those_of_bayes_for_a_gaussian_likelihood() -> None:
    """Observations v of z with variance s: shift v / s, precision 1 / s; the posterior by its density on a grid."""
    seen, spread = np.array([0.7, -1.2, 2.0]), np.array([0.5, 1.0, 2.0])
    mean, variance = posterior(
        torch.tensor(seen / spread)[None, :, None], torch.tensor(1 / spread)[None, :, None], torch.ones(1, 3).bool()
    )
    z = np.linspace(-8, 8, 20001)
    density = np.exp(-0.5 * z**2 - 0.5 * ((seen[:, None] - z) ** 2 / spread[:, None]).sum(0))
    density /= density.sum()
    assert float(mean) == pytest.approx((density * z).sum(), abs=1e-9)
    assert float(variance) == pytest.approx((density * z**2).sum() - (density * z).sum() ** 2, abs=1e-9)


def test_the_divergence_is_that_of_torch_and_zero_for_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    m, n = torch.randn(2, 5, 3, generator=generator)
    v, u = torch.rand(2, 5, 3, generator=generator) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m, v.sqrt()), normal(n, u.sqrt())).sum(-1)
    torch.testing.assert_close(kl(m, v, n, u), expected)
    assert kl(m, v, m, v).tolist() == [0.0] * 5


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_prior_has_the_spread_of_the_dirichlet(alpha: float) -> None:
    """Log gamma variables have the trigamma function for a variance; at 1 it is pi^2 / 6."""
    assert scale_of(alpha) ** 2 == pytest.approx(stats.loggamma(alpha).var())
    if alpha == 1.0:
        assert scale_of(alpha) == pytest.approx(math.pi / math.sqrt(6))
    z = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    own = float(weights(z, scale_of(alpha))[:, 0].std())
    assert own == pytest.approx(stats.beta(alpha, alpha).std(), rel=0.06)


def test_the_mean_preference_is_the_integral_and_even_without_pairs() -> None:
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(2))
    mean, variance = torch.tensor([[0.8, -0.3], [0.0, 0.0]]), torch.tensor([[0.3, 0.6], [1.0, 1.0]])
    own = mean_weights(mean, variance, 1.5, noise)
    # A difference of two Gaussians is one.
    difference = stats.norm(1.1, math.sqrt(0.9))
    expected, _ = integrate.quad(lambda d: difference.pdf(d) / (1 + math.exp(-1.5 * d)), -10, 10)
    assert own[0, 0].item() == pytest.approx(expected, abs=0.005)
    assert own[1].tolist() == pytest.approx([0.5, 0.5], abs=1e-6)
    torch.testing.assert_close(own.sum(-1), torch.ones(2))


def test_the_bound_by_hand() -> None:
    """z without spread at 0: w = (.5, .5), so a gap of (2, 0) is a margin of 1, of (0, -4) one of -2."""
    nothing, gaps = torch.full((1, 2), 1e-12), torch.tensor([[[2.0, 0.0], [0.0, -4.0]]])
    zero, one, noise = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(3, 1, 2)
    loss, parts = elbo_loss((zero, nothing), (zero, nothing), gaps, 1.0, noise)
    nll = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert float(loss) == pytest.approx(nll, rel=1e-6)
    assert float(parts["nll"]) == pytest.approx(nll, rel=1e-6) and float(parts["latent_kl"]) == 0.0
    # Against a context at distance 1 in units of its spread: half a nat for each objective, over two targets.
    loss, parts = elbo_loss((zero, one), (one, one), gaps, 1.0, 0 * noise)
    assert float(parts["latent_kl"]) == 1.0
    assert float(loss) == pytest.approx(nll + 0.5, rel=1e-6)


def test_it_is_a_bound_that_the_true_posterior_comes_closest_to() -> None:
    """-log p(T) by integration is below the loss, for whatever q."""
    gaps, scale = torch.tensor([[[1.5, -1.0], [0.5, 0.3]]]), 1.3
    z = np.linspace(-6, 6, 401)
    grid = torch.tensor(np.stack(np.meshgrid(z, z), -1).reshape(-1, 2), dtype=torch.float32)
    likelihood = torch.sigmoid(weights(grid, scale) @ gaps[0].T).prod(-1)
    prior = torch.exp(-0.5 * grid.square().sum(-1))
    evidence = -math.log(float((likelihood * prior).sum() / prior.sum()))
    noise = torch.randn(40_000, 1, 2, generator=torch.Generator().manual_seed(3))
    zero, one = torch.zeros(1, 2), torch.ones(1, 2)

    def bound(mean: list[float], variance: float) -> float:
        return 2 * float(elbo_loss((torch.tensor([mean]), variance * one), (zero, one), gaps, scale, noise)[0])

    centre = ((likelihood * prior)[:, None] * grid).sum(0) / (likelihood * prior).sum()
    near = bound(centre.tolist(), 0.95)
    assert evidence < near < evidence + 0.02
    assert near < bound([0.0, 0.0], 1.0) < bound([-1.0, 1.0], 1.0)


def test_objectives_that_are_alike_are_read_alike() -> None:
    """Of three: nothing known makes a third of each; two with the same mean and variance have the same weight."""
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(64), dtype=torch.float64)
    mean = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.2, 0.2]], dtype=torch.float64)
    variance = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.3, 0.3]], dtype=torch.float64)
    found = mean_weights(mean, variance, 1.5, noise)
    torch.testing.assert_close(found[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(found[1, 1], found[1, 2])
    assert found[1, 0] > found[1, 1]

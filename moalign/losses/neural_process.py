"""Neural process of a user's preference: pure functions, tensors in, tensors out (arXiv 2412.13998, NP-BTL).

A user's latent z ``[objectives]`` is standard normal; their preference is ``w = softmax(scale * z)``. What labelled
pairs say of z are factors of a Gaussian: shifts and precisions that add up (Bayesian aggregation, Volpp et al., ICLR
2021), so that no pairs leave the prior as it is and more pairs never know less.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_of(alpha: float) -> float:
    """Return the scale with which w has the spread of Dirichlet(alpha * 1).

    That is the softmax of logarithms of gamma variables, whose variance is the trigamma function at alpha.
    """
    return float(torch.polygamma(1, torch.tensor(alpha, dtype=torch.float64)).sqrt())


def posterior(shifts: Tensor, precisions: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of q(z|C), ``[users, objectives]``.

    Args:
        shifts, precisions: of each pair, ``[users, pairs, objectives]``; precisions are at least 0.
        known: bool ``[users, pairs]``; the pairs in C.
    """
    inside = known.unsqueeze(-1)
    precision = 1.0 + torch.where(inside, precisions, 0.0).sum(-2)
    return torch.where(inside, shifts, 0.0).sum(-2) / precision, 1.0 / precision


def kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(other)) of diagonal Gaussians, summed over the last dimension."""
    ratio = variance / other_variance
    return 0.5 * (ratio - ratio.log() - 1.0 + (mean - other_mean).square() / other_variance).sum(-1)


def weights(z: Tensor, scale: float) -> Tensor:
    """Return the preferences of latents ``[..., objectives]``."""
    return torch.softmax(scale * z, dim=-1)


def mean_weights(mean: Tensor, variance: Tensor, scale: float, noise: Tensor) -> Tensor:
    """Return E[w] under q, ``[users, objectives]``, over ``noise`` ``[draws, objectives]`` and its mirror image.

    Each draw is used for the objectives in every rotation, forwards and backwards, so that objectives of which a user
    shows the same are read alike: of three these are all orders, of two the mirror image is as much. Of four and more
    it holds where all are alike; else up to the noise of the draws.
    """
    objectives = noise.shape[-1]
    if objectives > 2:
        noise = torch.cat([part.roll(k, -1) for part in (noise, noise.flip(-1)) for k in range(objectives)])
    spread = variance.sqrt() * torch.cat([noise, -noise]).unsqueeze(1)
    return weights(mean + spread, scale).mean(0)


def elbo_loss(
    q: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor], gaps: Tensor, scale: float, noise: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return minus the bound on log p(T|C) per target, averaged over users, and its parts; ``latent_kl`` is of z alone.

    ``-E_q(z|C,T) sum_T log sigma(w(z) . gap) + KL(q(z|C,T) || q(z|C))``, divided by the number of targets (Garnelo et
    al., "Neural Processes", 2018, eq. 7).

    Args:
        q: mean and variance of q(z|C,T), ``[users, objectives]`` each.
        context: the same of q(z|C).
        gaps: rewards of the targets' chosen responses less those of the rejected ones, times how sure users are,
            ``[users, targets, objectives]``.
        noise: standard normal, ``[draws, users, objectives]``.
    """
    mean, variance = q
    w = weights(mean + variance.sqrt() * noise, scale)
    nll = -F.logsigmoid(torch.einsum("dum,utm->dut", w, gaps)).sum(-1).mean()
    divergence = kl(mean, variance, *context).mean()
    targets = gaps.shape[1]
    return (nll + divergence) / targets, {"nll": nll.detach() / targets, "latent_kl": divergence.detach()}

"""The parts of clipped PPO with a head for every reward; :mod:`moalign.training.ppo` says how they fit together.

Sources: arXiv 1707.06347 (clipped objective), 1506.02438 (generalised advantages), 1909.08593 (KL cost and its adaptive
coefficient).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-8


def token_rewards(terminal: Tensor, log_ratio: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward per head, ``[rows, T, heads]``; 0 outside the mask.

    Args:
        terminal: reward of each response, ``[rows, heads]``; it comes with the last token.
        log_ratio: log pi_old - log pi_ref, ``[rows, T]``.
        mask: response tokens, bool ``[rows, T]``, without gaps from the first column on.
    """
    cost = torch.where(mask, -kl_coef * log_ratio, torch.zeros_like(log_ratio))
    rewards = cost.unsqueeze(-1).repeat(1, 1, terminal.shape[1])
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, mask.sum(-1) - 1] += terminal
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and returns, ``[rows, T, heads]`` each; 0 outside the mask.

    Source: arXiv 1506.02438, eq. 16. After the last token the value is 0, also when the limit cut a response off there.
    """
    inside = mask.unsqueeze(-1).to(values.dtype)
    values = values * inside
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    running = torch.zeros_like(following)
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * inside[:, t]
        advantages[:, t] = running
        following = values[:, t]
    return advantages, advantages + values


def whitened(advantages: Tensor, mask: Tensor, how: str) -> Tensor:
    """Scale (and centre) the advantages of each head ``[rows, T, heads]`` over the tokens; a constant head stays."""
    if how == "none":
        return advantages
    tokens = advantages[mask]
    spread = tokens.std(dim=0, unbiased=False)
    scaled = advantages - tokens.mean(dim=0) if how == "full" else advantages
    scaled = scaled / torch.where(spread > TINY, spread, torch.ones_like(spread))
    return torch.where(mask.unsqueeze(-1), scaled, torch.zeros_like(scaled))


def beside(advantages: Tensor, mask: Tensor, how: str) -> Tensor:
    """Return the last column of advantages ``[rows, T, rewards + 1]``, the KL cost's, on the scale of the others.

    That is times the mean of ``1 / sd_i`` of those that vary, sd_i what :func:`whitened` divides them by.
    """
    cost = advantages[..., -1]
    if how == "none":
        return cost
    if how == "full":
        cost = torch.where(mask, cost - cost[mask].mean(), torch.zeros_like(cost))
    spread = advantages[mask][..., :-1].std(dim=0, unbiased=False)
    varies = spread[spread > TINY]
    return cost * varies.reciprocal().mean() if len(varies) else cost


def gate(ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return where the clipped objective still has a gradient, bool, of the broadcast shape."""
    return ~(((advantages > 0) & (ratios > 1 + clip_range)) | ((advantages < 0) & (ratios < 1 - clip_range)))


def clipped(ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return PPO's clipped loss of each token (arXiv 1707.06347, eq. 7, negated)."""
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - clip_range, 1 + clip_range) * advantages)


def adapted(coef: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """Return the next KL coefficient (arXiv 1909.08593, section 2.2): up when ``kl`` is above ``target``."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * responses / horizon)

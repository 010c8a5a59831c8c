"""Clipped PPO with a value head for every reward.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, and "High-Dimensional Continuous
Control Using Generalized Advantage Estimation", arXiv 1506.02438; the token-wise KL cost and its adaptive coefficient
are those of Ziegler et al., arXiv 1909.08593.

    reward of token t, head i:   -kl_coef * (log pi_old - log pi_ref)_t, on the last token also r_i
    A_i[t] = sum_l (gamma * lambda)^l * delta_i[t + l],   delta_i[t] = reward + gamma * V_i[t + 1] - V_i[t]
    loss = -mean_t min(u A, clip(u, 1 - eps, 1 + eps) A) + vf_coef * sum_i mean_t (V_i - (A_i + V_i,old))^2
    u = pi / pi_old

Where another engine drew the tokens, from mu, the policy's loss of each is multiplied by min(pi_old / mu, C): truncated
importance sampling (Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL").

With ``kl_apart`` the KL cost is no part of the heads' rewards but a stream with a head of its own, which foresees the
cost to come: without it GAE would forget the cost of tokens 20 steps ahead (lambda^20 = .36), and what all responses
cost alike would push every sampled token down. Its advantage A_kl is added, with weight 1, to the one that the method
makes of the others. ``kl_coef`` is in units of the normalised reward; where the others are divided by their deviations
(``whiten``), equal weights 1 / m maximise ``s * (a weighted mean of the rewards)``, s the mean of ``1 / sd_i``: A_kl is
multiplied by this s, not divided by its own deviation. It does not depend on how the method weighs the objectives:
weights that sum to 0 must not switch the cost off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-8

KL_HEAD = "kl"
"""Name of the head that foresees the KL cost where it is apart."""


@dataclass
class Experience:
    """Advantages and returns of a rollout, fixed before its first update."""

    mask: Tensor
    """Response tokens, bool ``[rows, T]``."""
    old_logps: Tensor
    """``[rows, T]``."""
    advantages: Tensor
    """``[rows, T, rewards]``; 0 outside the mask."""
    returns: Tensor
    """Targets of the value heads, ``[rows, T, heads]``."""
    kl: Tensor | None = None
    """Advantages of the KL cost where it is apart, on the scale of the others, ``[rows, T]``."""
    importance: Tensor | None = None
    """Weights of the policy's loss, where another engine drew the tokens, ``[rows, T]``."""

    def tensors(self, combined: Tensor) -> dict[str, Tensor]:
        """Return the ``tensors`` of :func:`loss`; ``combined`` is the one advantage of the update, ``[rows, T]``."""
        rows, tokens = len(self.mask), float(self.mask.sum())
        return {
            "advantages": combined if self.kl is None else combined + self.kl,
            "returns": self.returns,
            # Sums over a row times this, averaged over rows, are means over the batch's tokens.
            "per_token": torch.full((rows,), rows / tokens, device=combined.device),
            **({} if self.importance is None else {"importance": self.importance}),
        }


def experience(
    rewards: Tensor,
    values: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    kl_coef: float,
    *,
    gamma: float,
    gae_lambda: float,
    whiten: str,
    kl_apart: bool = False,
) -> Experience:
    """Return advantages and returns of a rollout; see :func:`token_rewards`, :func:`gae` and :func:`whitened`.

    Args:
        rewards: reward of each response, ``[rows, rewards]``.
        values: of the heads as the responses were sampled, ``[rows, T, rewards]``; with ``kl_apart`` one more head.
        old_logps, ref_logps: of the policy that sampled and of the reference, ``[rows, T]``.
        kl_coef: cost of a nat of every token's log ratio to the reference.
        whiten: none, scale or full.
    """
    log_ratio = old_logps - ref_logps
    streams = token_rewards(rewards, log_ratio, mask, 0.0 if kl_apart else kl_coef)
    if kl_apart:
        cost = token_rewards(torch.zeros_like(rewards[:, :1]), log_ratio, mask, kl_coef)
        streams = torch.cat([streams, cost], dim=-1)
    advantages, returns = gae(streams, values, mask, gamma, gae_lambda)
    kl = beside(advantages, mask, whiten) if kl_apart else None
    of_rewards = advantages[..., : rewards.shape[1]]
    return Experience(mask, old_logps, whitened(of_rewards, mask, whiten), returns, kl)


def loss(
    logps: Tensor,
    entropy: Tensor,
    values: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    tensors: Mapping[str, Tensor],
    heads: Sequence[str],
    *,
    clip_range: float,
    vf_coef: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return policy and value loss of a micro-batch (a scalar), means over tokens, and metrics.

    Args:
        logps, entropy, old_logps: of the policy now and of the one that sampled, ``[rows, T]``.
        values: of the heads, ``[rows, T, heads]``.
        tensors: these rows of :meth:`Experience.tensors`.
        heads: a name for every head, for the metrics.
    """

    def mean(tokens: Tensor) -> Tensor:
        return (torch.where(mask, tokens, torch.zeros_like(tokens)).sum(-1) * tensors["per_token"]).mean()

    ratios, advantages = (logps - old_logps).exp(), tensors["advantages"]
    losses = clipped(ratios, advantages, clip_range)
    policy = mean(tensors["importance"] * losses if "importance" in tensors else losses)
    errors = [mean(error) for error in (values - tensors["returns"]).square().unbind(-1)]
    clipped_away = ~gate(ratios.detach(), advantages, clip_range)
    metrics = {
        "policy_loss": float(policy.detach()),
        "entropy": float(mean(entropy)),
        "clip_fraction": float(mean(clipped_away.float())),
    }
    metrics.update({f"value_loss/{n}": float(e.detach()) for n, e in zip(heads, errors, strict=True)})
    return policy + vf_coef * torch.stack(errors).sum(), metrics


def token_rewards(terminal: Tensor, log_ratio: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return each token's reward per head, ``[rows, T, heads]``; 0 outside the mask.

    ``terminal`` ``[rows, heads]`` comes with the last token; ``log_ratio`` is log pi_old - log pi_ref, ``[rows, T]``;
    ``mask`` ``[rows, T]`` has no gaps from the first column on.
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

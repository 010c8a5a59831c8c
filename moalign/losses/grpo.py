"""GRPO with several rewards: advantages of the answers in a group, and the token-level loss.

Source: "DeepSeekMath", arXiv 2402.03300, section 4.1 (group baseline, k3 estimator of the KL); several rewards: GDPO,
arXiv 2601.05242; RVPO, arXiv 2605.05750; DVAO, arXiv 2605.25604.

    Z_k = (r_k - mean r_k) / (sd r_k + eps)        of each reward in its group: the n answers to one prompt
    sum          z-score of w . r in its group
    gdpo         sum_k w_k Z_k                                        then whitened
    rvpo         -(1 / risk) log sum_k w_k exp(-risk Z_k)             then whitened
    dvao         sum_k v_k Z_k,   v_k = w_k sd_k / sum_l w_l sd_l
    tchebycheff  -max_k w_k (u - Z_k) + rho w . Z                     then whitened (pareto.scalarisation)
    loss = mean_t [ -min(u A, clip(u, 1 - eps, 1 + eps) A) + beta (exp(d) - d - 1) ]
    u = pi / pi_old,   d = log pi_ref - log pi

``sum`` and ``dvao`` order answers by w . r (dvao is ``w . (r - mean r)`` over ``sum_l w_l sd_l``). The others forget
what one reward costs of the other: of two answers that trade one for the other each Z_k has the same size, whatever the
trade, and the larger weight decides. So where a group's answers differ by trades, and near a front they do, all
preferences on one side of equal weights are taught the same.

Where the two rewards of an answer have a constant sum, ``sum``, ``gdpo`` and ``dvao`` give 0 to all answers at equal
weights: nothing is preferred, and only the KL term acts.

The gradient of k3, its samples held fixed, is in expectation that of KL(pi_ref, pi), not of KL(pi, pi_ref): the fixed
point is ``pi = beta pi_ref / (beta + mean A - A)``, not ``pi_ref exp(A / beta) / Z``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign.core.arrays import Matrix
from moalign.losses import ppo
from moalign.pareto.scalarisation import scores

Aggregation = Literal["sum", "gdpo", "rvpo", "dvao", "tchebycheff"]

WHITENED = ("gdpo", "rvpo", "tchebycheff")
EPS = 1e-4


def standardised(values: Matrix) -> Matrix:
    """Return ``(x - mean) / (sd + eps)`` over axis 1, ``[groups, n, ...]``; sd with n - 1, as the papers' code has."""
    return np.asarray((values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, ddof=1, keepdims=True) + EPS))


def aggregated(rewards: Matrix, weights: Matrix, how: Aggregation, risk: float = 1.0) -> Matrix:
    """Return the advantage of each answer, not whitened yet, ``[groups, n]``.

    Args:
        rewards: of the answers of each group, ``[groups, n, objectives]``, n at least 2.
        weights: the preference of each group, ``[groups, objectives]``.
        how: see the module.
        risk: of ``rvpo``, above 0: towards 0 it is ``gdpo``; the larger, the more the least Z_k decides.
    """
    w = weights[:, None, :]
    if how == "sum":
        return standardised((rewards * w).sum(axis=-1))
    z = standardised(rewards)
    if how == "rvpo":
        least = np.where(w > 0, z, np.inf).min(axis=-1)
        worse = (w * np.exp(-risk * np.maximum(z - least[..., None], 0.0))).sum(axis=-1)
        return np.asarray(least - np.log(worse) / risk)
    if how == "dvao":
        spread = w * rewards.std(axis=1, ddof=1, keepdims=True)
        total = spread.sum(axis=-1, keepdims=True)
        w = np.divide(spread, total, out=np.zeros_like(spread), where=total > 0)
    return scores(z, w, "tchebycheff" if how == "tchebycheff" else "linear")


def whitened(advantages: Matrix, kinds: NDArray[np.intp]) -> Matrix:
    """Return advantages ``[groups, n]``, centred and scaled over all groups of one kind.

    ``kinds`` ``[groups]`` numbers them. The mean over different preferences is no baseline for any of them, and their
    advantages differ in size: where objectives disagree, a balanced sum is small and a one-sided one is not.
    """
    result = np.empty_like(advantages)
    for kind in np.unique(kinds):
        alike = kinds == kind
        result[alike] = standardised(advantages[alike].reshape(1, -1)).reshape(-1, advantages.shape[1])
    return result


def loss(
    logps: Tensor,
    ref_logps: Tensor,
    old_logps: Tensor,
    entropy: Tensor,
    mask: Tensor,
    tensors: Mapping[str, Tensor],
    *,
    clip_range: float,
    beta: float,
) -> tuple[Tensor, dict[str, float]]:
    """Return the loss of a micro-batch (a scalar), a mean over the tokens of the whole batch, and metrics.

    Args:
        logps, entropy: of the policy now, ``[rows, T]``.
        ref_logps, old_logps: of the reference and of the policy that sampled, ``[rows, T]``.
        mask: response tokens, ``[rows, T]``.
        tensors: ``advantages`` ``[rows]``; ``per_token`` ``[rows]``, the batch's rows over its tokens; ``importance``
            ``[rows, T]`` where another engine sampled (:mod:`moalign.losses.ppo`).
        clip_range: see :func:`moalign.losses.ppo.clipped`.
        beta: strength of the KL term.
    """

    def mean(tokens: Tensor) -> Tensor:
        return (torch.where(mask, tokens, torch.zeros_like(tokens)).sum(-1) * tensors["per_token"]).mean()

    ratios, advantages = (logps - old_logps).exp(), tensors["advantages"].unsqueeze(-1)
    losses = ppo.clipped(ratios, advantages, clip_range)
    policy = mean(tensors["importance"] * losses if "importance" in tensors else losses)
    kl = mean(k3(logps, ref_logps))
    clipped_away = ~ppo.gate(ratios.detach(), advantages, clip_range)
    return policy + beta * kl, {
        "policy_loss": float(policy.detach()),
        "k3": float(kl.detach()),
        "entropy": float(mean(entropy)),
        "clip_fraction": float(mean(clipped_away.float())),
    }


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return the estimate of the KL to the reference at each token, never negative: ``exp(d) - d - 1``."""
    d = ref_logps - logps
    return d.exp() - d - 1

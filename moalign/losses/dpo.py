"""DPO losses, online and offline: pure functions of log-probabilities.

``D(y) = log pi(y|x) - log pi_ref(y|x)`` summed over response tokens; the loss of a labelled pair is
``-log sigma(beta * (D(y+) - D(y-)))`` (DPO, arXiv 2305.18290, eq. 7). MODPO's with its special cases is
:func:`modpo_losses`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return D per row, ``[rows]``, from token log-probabilities ``[rows, T]`` that are 0 outside the response."""
    return (logps - ref_logps).sum(-1)


def pair_loss(
    first: Tensor, second: Tensor, labels: Tensor, weights: Tensor, beta: float, chance: Tensor | None = None
) -> Tensor:
    """Return the weighted DPO loss of each pair, ``[pairs]``.

    With certain labels it has no minimum: the margin grows for as long as it is trained on. With
    ``chance = sigma(s(y+) - s(y-))`` it is least where ``beta * (D(y+) - D(y-)) = s(y+) - s(y-)``, which holds for all
    responses of ``pi_ref(y|x) exp(s / beta) / Z`` and no other policy.

    Args:
        first, second: D of the pair's two responses, ``[pairs]``.
        labels: +1 where the first response is preferred, -1 where the second, 0 where the label says nothing,
            ``[pairs, labels]``.
        weights: weight of each label, ``[pairs, labels]``.
        beta: strength of the KL term.
        chance: probability that each label is right, ``[pairs, labels]``: the loss is its expectation; None: 1.
    """
    margin = beta * (first - second).unsqueeze(-1) * labels
    losses = -F.logsigmoid(margin) if chance is None else preference_loss(margin, chance, "sigmoid")
    per_label = torch.where(labels != 0, losses, torch.zeros_like(margin))
    return (weights * per_label).sum(-1)


def modpo_losses(
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    margins: Tensor,
    chance: Tensor,
    weights: Tensor,
    *,
    margin_weights: Tensor,
    share: float,
    beta: float,
    kind: Literal["sigmoid", "hinge"] = "sigmoid",
    sft_coef: float = 0.0,
    sft_on: Literal["chosen", "both"] = "chosen",
    per_token: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the MODPO loss of each labelled pair times its weight, ``[pairs]``, and metrics.

    With ``share = 1`` and no margins it is plain DPO, and with ``per_token`` AMoPO's loss of one objective.

    Args:
        logps: token log-probabilities, 0 outside the response, ``[2 * pairs, T]``: chosen responses, then rejected.
        ref_logps: of the whole responses under the reference, chosen and rejected, ``[pairs, 2]``.
        mask: response tokens, ``[2 * pairs, T]``.
        margins: ``mu(y_w) - mu(y_l)``, the other objectives' rewards, ``[pairs, objectives - 1]``.
        chance: probability that the chosen response is preferred, ``[pairs]``.
        weights: of the pairs' losses, ``[pairs]``.
        margin_weights: w_-k, ``[objectives - 1]``.
        share: w_k, the weight of the objective that the pairs are labelled for.
        beta: strength of the KL term.
        kind: see :func:`preference_loss`.
        sft_coef, sft_on: weight of the mean negative log-likelihood per token, of the chosen or of both responses.
        per_token: in place of D(y) the mean log-probability of y's tokens, without a reference (AMoPO, arXiv
            2506.07165, as RACO, arXiv 2602.02495, compares with it).

    Returns:
        The losses, and means over the batch: ``accuracy``; ``preference``, |beta (D(y_w) - D(y_l))|; ``margin``,
        |w_-k . mu|; ``chosen_log_ratio``, D(y_w), which falls when the policy leaves what the data shows.
    """
    means = logps.sum(-1) / mask.sum(-1).clamp_min(1)
    chosen, rejected = (means if per_token else logps.sum(-1) - ref_logps.T.reshape(-1)).chunk(2)
    z = margin_logits(chosen, rejected, margins, margin_weights, share, beta)
    losses = preference_loss(z, chance, kind)
    if sft_coef:
        of_chosen, of_rejected = means.chunk(2)
        losses = losses - sft_coef * (of_chosen if sft_on == "chosen" else (of_chosen + of_rejected) / 2)
    preference = beta * (chosen - rejected).detach()
    return weights * losses, {
        "accuracy": (preference > 0).float().mean(),
        "preference": preference.abs().mean(),
        "margin": (margins @ margin_weights).abs().mean(),
        "chosen_log_ratio": chosen.detach().mean(),
    }


def margin_logits(
    chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor, share: float, beta: float
) -> Tensor:
    """Return z of each pair, ``[pairs]`` (MODPO, arXiv 2310.03708, eq. 9).

    ``z = (1 / w_k) * (beta * (D(y_w) - D(y_l)) - w_-k . (mu(y_w) - mu(y_l)))``; with ``w_k = 1`` it is plain DPO's.

    Args:
        chosen, rejected: D of the pair's responses, ``[pairs]``.
        margins, weights, share, beta: see :func:`modpo_losses`.
    """
    return (beta * (chosen - rejected) - margins @ weights) / share


def preference_loss(logits: Tensor, chance: Tensor, kind: str) -> Tensor:
    """Return the loss of each pair, ``[pairs]``: ``-log sigma(z)`` (sigmoid) or ``max(0, 1 - z)`` (hinge).

    ``chance`` ``[pairs]`` is the probability that the chosen response is preferred: the loss is its expectation.
    """
    if kind == "sigmoid":
        as_labelled, reversed_ = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    elif kind == "hinge":
        as_labelled, reversed_ = F.relu(1 - logits), F.relu(1 + logits)
    else:
        raise ValueError(f"loss must be sigmoid or hinge; found {kind!r}")
    return chance * as_labelled + (1 - chance) * reversed_

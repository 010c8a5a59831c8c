"""The DPO loss on sequence log-ratios, online and offline.

``D(y) = log pi(y|x) - log pi_ref(y|x)`` summed over response tokens; the loss of a labelled pair is
``-log sigma(beta * (D(y+) - D(y-)))`` (DPO, arXiv 2305.18290, eq. 7).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Return D per row, ``[rows]``, from token log-probabilities ``[rows, T]`` that are 0 outside the response."""
    return (logps - ref_logps).sum(-1)


def pair_loss(first: Tensor, second: Tensor, labels: Tensor, weights: Tensor, beta: float) -> Tensor:
    """Return the weighted DPO loss of each pair, ``[pairs]``.

    Args:
        first, second: D of the pair's two responses, ``[pairs]``.
        labels: +1 where the first response is preferred, -1 where the second, 0 where the label says nothing,
            ``[pairs, labels]``.
        weights: weight of each label, ``[pairs, labels]``.
        beta: strength of the KL term.
    """
    margin = beta * (first - second).unsqueeze(-1) * labels
    told = torch.where(labels != 0, -F.logsigmoid(margin), torch.zeros_like(margin))
    return (weights * told).sum(-1)


def margin_logits(
    chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor, share: float, beta: float
) -> Tensor:
    """Return z of each pair, ``[pairs]`` (MODPO, arXiv 2310.03708, eq. 9).

    ``z = (1 / w_k) * (beta * (D(y_w) - D(y_l)) - w_-k . (mu(y_w) - mu(y_l)))``; with ``w_k = 1`` it is plain DPO's.

    Args:
        chosen, rejected: D of the pair's responses, ``[pairs]``.
        margins: ``mu(y_w) - mu(y_l)``, the other objectives' rewards, ``[pairs, objectives - 1]``.
        weights: w_-k, ``[objectives - 1]``.
        share: w_k, the weight of the objective that the pairs are labelled for.
        beta: strength of the KL term.
    """
    return (beta * (chosen - rejected) - margins @ weights) / share


def preference_loss(logits: Tensor, chance: Tensor, kind: str) -> Tensor:
    """Return the loss of each pair, ``[pairs]``: ``-log sigma(z)`` (sigmoid) or ``max(0, 1 - z)`` (hinge).

    ``chance`` ``[pairs]`` is the probability that the chosen response is preferred: the loss is its expectation.
    """
    if kind == "sigmoid":
        told, other = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    elif kind == "hinge":
        told, other = F.relu(1 - logits), F.relu(1 + logits)
    else:
        raise ValueError(f"loss must be sigmoid or hinge; found {kind!r}")
    return chance * told + (1 - chance) * other

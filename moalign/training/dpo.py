"""The DPO loss on sequence log-ratios, shared by the methods that use it online.

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

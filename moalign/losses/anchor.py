"""What it costs to make the reference's own responses unlikely: BAPO's anchor (arXiv 2407.00693), a pure function."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Form = Literal["below", "both"]
"""below: ``max(0, -d)``, where d is the log-ratio to the reference per token; both: ``d^2``."""


def anchor_losses(logps: Tensor, ref_logps: Tensor, mask: Tensor, form: Form = "below") -> tuple[Tensor, Tensor]:
    """Return the anchor's loss and d of each response, ``[rows]`` each, in nats per token.

    d is the mean over a response's tokens of ``log pi - log pi_ref``. Of responses drawn from the reference at
    temperature 1 the mean of ``-d`` times their tokens estimates ``KL(pi_ref || pi)``, and ``below`` is at least that.

    Args:
        logps: token log-probabilities, 0 outside the response, ``[rows, T]``.
        ref_logps: of the whole responses under the reference, ``[rows]``.
        mask: response tokens, ``[rows, T]``.
        form: see :data:`Form`; ValueError for another.
    """
    d = (logps.sum(-1) - ref_logps) / mask.sum(-1).clamp_min(1)
    if form == "below":
        return F.relu(-d), d.detach()
    if form == "both":
        return d**2, d.detach()
    raise ValueError(f"anchor must be below or both; found {form!r}")

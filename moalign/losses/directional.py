"""The directional term of PD-MORL: the angle between a direction and a vector of values.

Source: PD-MORL, arXiv 2208.07914, section 4.2: ``g(d, q) = arccos(d . q / (|d| |q|))``, added to the critic's loss and
to the actor's.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRAIGHT = 0.9999
"""Cosines are cut to +- this (public code): the slope of arccos has no bound at 1."""


def angle(directions: Tensor, values: Tensor) -> Tensor:
    """Return the angle in radians between ``[..., m]`` and ``[..., m]``, ``[...]``; pi / 2 where one of them is 0.

    Below .014 (the arccos of :data:`STRAIGHT`) it stays there, without a gradient.
    """
    cosine = torch.nn.functional.cosine_similarity(directions, values, dim=-1)
    return cosine.clamp(-STRAIGHT, STRAIGHT).arccos()

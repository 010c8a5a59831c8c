"""Learning-rate schedules, as factors of the peak rate."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["constant", "linear", "cosine"]


def factor(name: ScheduleName, step: int, total: int, warmup: int = 0) -> float:
    """Return the factor on the learning rate at ``step`` (from 0) of ``total``.

    The rate rises linearly over ``warmup`` steps, then stays (constant), or falls to 0 at ``total``
    along a line (linear) or half a cosine (cosine).
    """
    # Not those of transformers: they take the first step of a warm-up at rate 0, and a cosine rises again after total.
    if step < warmup:
        return (step + 1) / warmup
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

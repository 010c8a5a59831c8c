"""Seeds: every random number of training is fixed by the run's seed and where it is drawn, never by what ran before.

A resumed run therefore needs no saved generator, and evaluation cannot disturb training.
"""

from __future__ import annotations

import hashlib

MOST = 2**63 - 1
"""The largest seed: torch and the tables of results hold integers of 64 bits."""


def derive(seed: int, *place: str | int) -> int:
    """Return a seed in [0, 2**63) for a place such as ``(phase, step)``; stable across processes and machines."""
    text = "\0".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

"""When training should have stopped: rules that read a curve of snapshots and no truth, and what each of them loses.

All take numbers along training, one for each snapshot in order (:class:`moalign.evaluation.curve.CurveRow` has them),
and return the index of the snapshot at which training would have stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moalign.core.errors import RequestError


def by_kl(kl: Sequence[float], budget: float) -> int:
    """Return the last snapshot before the KL to base is first above ``budget`` (nats a response); 0 when it always is.

    A rule sees no future: a KL that comes back below the budget later, in another stage, is not waited for.

    >>> by_kl([0.5, 2.0, 4.5, 9.0], 4.0), by_kl([0.5, 2.0], 0.1), by_kl([0.1, 4.2, 2.2], 4.0)
    (1, 0, 0)
    """
    above = np.flatnonzero(_numbers(kl, "kl") > budget)
    return max(0, int(above[0]) - 1) if len(above) else len(kl) - 1


def by_pessimism(believed: Sequence[float], spread: Sequence[float], k: float) -> int:
    """Return the snapshot with the largest ``believed - k spread``; of equals the first.

    ``spread`` is the reward ensemble's standard deviation in units of ``believed`` (Coste et al. 2023,
    arXiv 2310.02743, use the same lower bound as the reward).

    >>> by_pessimism([0.5, 0.7, 0.9], [0.1, 0.2, 0.5], 1.0)
    1
    """
    lower = _numbers(believed, "believed") - k * _numbers(spread, "spread")
    return int(lower.argmax())


def by_patience(held_out: Sequence[float], patience: int = 1) -> int:
    """Return the best snapshot so far once ``patience`` in a row were not above it; else the best of all.

    ``held_out`` are mean rewards by a reward model that training does not see.

    >>> by_patience([0.2, 0.5, 0.4, 0.9]), by_patience([0.2, 0.5, 0.4, 0.9], patience=2)
    (1, 3)
    """
    if patience < 1:
        raise RequestError(f"patience: found {patience}; allowed: 1 or more snapshots")
    values, best = _numbers(held_out, "held_out"), 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
        elif index - best >= patience:
            break
    return best


def lost(true: Sequence[float], stopped: int) -> float:
    """Return how much of the true reward is lost against the best snapshot by stopping at ``stopped``.

    >>> round(lost([0.3, 0.7, 0.6], 2), 6), lost([0.3, 0.7, 0.6], 1)
    (0.1, 0.0)
    """
    values = _numbers(true, "true")
    return float(values.max() - values[stopped])


def _numbers(values: Sequence[float], name: str) -> np.ndarray:
    """Return an array; RequestError for none at all, and for one that is not known or not finite."""
    known = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    if not len(known):
        raise RequestError(f"{name}: found no snapshot; a rule needs at least one")
    if not np.isfinite(known).all():
        at = int(np.flatnonzero(~np.isfinite(known))[0])
        raise RequestError(f"{name}: not known at snapshot {at} (found {values[at]}); this rule cannot be used")
    return known

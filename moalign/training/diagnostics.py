"""Means of a run's metrics over the last tenth of training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def at_the_end(lines: Iterable[Mapping[str, Any]], phase: str, steps: int, names: Sequence[str]) -> dict[str, float]:
    """Return means over the lines of ``metrics.jsonl`` of the last tenth of a phase (at least its last line).

    Where it ended before its ``steps`` (``kl_stop``), of the steps that it reached: the rollout that ended it, of which
    nothing was learned, has a line, too.
    Of ``names`` ``kl`` takes ``kl``, ``e/`` every metric that begins so. Metrics that no line has are left out, and so
    are values that were not finite.
    """
    own = [line for line in lines if line["phase"] == phase]
    own = [line for line in own if "loss" in line or "skipped" in line] or own
    reached = min(steps, max((line["step"] for line in own), default=0))
    last = [line for line in own if line["step"] > 0.9 * (steps if reached > 0.9 * steps else reached)]
    values_of: dict[str, list[float]] = {}
    for line in last:
        for key, value in line.items():
            if value is not None and any(key == n or (n.endswith("/") and key.startswith(n)) for n in names):
                values_of.setdefault(key, []).append(float(value))
    return {key: sum(values) / len(values) for key, values in values_of.items()}

"""Believed and true: what methods gain by the rewards that they were trained on, and whether the judge agrees.

A lead in believed reward is false

* where the entry is behind the other one in truth with certainty, in hypervolume or in inner product; or
* over the entry with the lowest KL to base, where the true inner product is below that one's, certain or not: what was
  learnt is worth less than staying where one was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from moalign.comparison.result import Believed, Difference, Entry, FalseWin, Pair
from moalign.evaluation.result import ProxyReward


def of_seeds(rewards: Sequence[ProxyReward | None]) -> Believed | None:
    """Return the means over seeds, each given by its believed rewards; None where there are none."""
    known = [reward for reward in rewards if reward is not None]
    if not known or len(known) < len(rewards):
        return None
    return Believed(
        hypervolume=float(np.mean([reward.hypervolume for reward in known])),
        inner_product=float(np.mean([reward.inner_product for reward in known])),
    )


def mark(entries: Sequence[Entry], pairs: Sequence[Pair]) -> None:
    """Fill in the false wins of every entry; ``pairs`` are the true differences between the ``entries``."""
    by_label = {entry.label: entry for entry in entries if entry.believed is not None}
    moved = [(entry.quality.kl, label) for label, entry in by_label.items() if entry.quality]
    base = min(((kl, label) for kl, label in moved if kl is not None), default=(None, None))[1]
    for pair in pairs:
        if pair.a in by_label and pair.b in by_label:
            for first, second, sign in ((pair.a, pair.b, 1), (pair.b, pair.a, -1)):
                leader = by_label[first].believed
                assert leader is not None
                leader.false_wins += _false(by_label[first], by_label[second], pair, sign, second == base)


def _false(entry: Entry, other: Entry, pair: Pair, sign: int, over_base: bool) -> Iterator[FalseWin]:
    """Yield the false wins of ``entry`` over ``other``; ``sign`` is -1 where the pair is the other way round."""
    truths: dict[Literal["hypervolume", "inner_product"], Difference | None]
    truths = {"hypervolume": pair, "inner_product": pair.inner_product}
    for quantity, truth in truths.items():
        believed = getattr(entry.believed, quantity) - getattr(other.believed, quantity)
        if truth is None or not (believed > 0 > sign * truth.difference):
            continue
        near = over_base and quantity == "inner_product"
        if truth.certain or near:
            bounds = sorted(sign * bound for bound in truth.interval)
            yield FalseWin(
                over=other.label,
                quantity=quantity,
                believed=believed,
                difference=sign * truth.difference,
                interval=(bounds[0], bounds[1]),
                certain=truth.certain,
                nearest_to_base=near,
            )

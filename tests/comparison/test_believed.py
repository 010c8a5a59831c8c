"""Believed but false wins: hand-worked numbers, and what readers see of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moalign.comparison import believed
from moalign.comparison.result import Believed, Difference, Entry, FalseWin, Pair
from moalign.evaluation.result import ProxyPoint, ProxyReward, Quality


def entry(label: str, volume: float, product: float, kl: float | None = None) -> Entry:
    quality = Quality(rate=0.0, causes={}, mean_length=20.0, distinct_3=1.0, kl=kl)
    gained = Believed(hypervolume=volume, inner_product=product)
    return Entry(method=label, label=label, status="done", seeded=True, runs=[], quality=quality, believed=gained)


def difference(kind: Any, a: str, b: str, value: float, low: float, high: float, **more: Any) -> Any:
    certain = low > 0 or high < 0
    return kind(
        a=a, b=b, difference=value, interval=(low, high), certain=certain, share_above_zero=0.5, seeds=[0], **more
    )


def pair(a: str, b: str, volume: tuple[float, float, float], product: tuple[float, float, float] | None = None) -> Pair:
    inner = None if product is None else difference(Difference, a, b, *product)
    made: Pair = difference(Pair, a, b, *volume, inner_product=inner)
    return made


def wins(entries: list[Entry], *pairs: Pair) -> dict[str, list[FalseWin]]:
    believed.mark(entries, pairs)
    return {made.label: made.believed.false_wins for made in entries if made.believed is not None}


def test_a_believed_lead_that_is_certainly_none_in_truth_is_false() -> None:
    """a leads b by .8 - .6 = +.2; in truth it is .1 behind, and surely so."""
    marked = wins([entry("a", 0.8, 0.5), entry("b", 0.6, 0.5)], pair("a", "b", (-0.1, -0.2, -0.05)))
    (win,) = marked["a"]
    assert (win.over, win.quantity, win.certain, win.nearest_to_base) == ("b", "hypervolume", True, False)
    assert (win.believed, win.difference, win.interval) == (pytest.approx(0.2), -0.1, (-0.2, -0.05))
    assert marked["b"] == []


def test_whichever_way_round_the_pair_is() -> None:
    marked = wins([entry("a", 0.8, 0.5), entry("b", 0.6, 0.5)], pair("b", "a", (0.1, 0.05, 0.2)))
    (win,) = marked["a"]
    assert (win.over, win.difference, win.interval) == ("b", -0.1, (-0.2, -0.05))
    assert marked["b"] == []


@pytest.mark.parametrize(
    ("volume", "truth"),
    [
        (0.8, (-0.1, -0.2, 0.01)),  # may be chance
        (0.8, (0.1, 0.05, 0.2)),  # true
        (0.6, (-0.1, -0.2, -0.05)),  # no lead at all
        (0.5, (-0.1, -0.2, -0.05)),  # behind in both
    ],
)
def test_every_other_lead_is_not(volume: float, truth: tuple[float, float, float]) -> None:
    assert wins([entry("a", volume, 0.5), entry("b", 0.6, 0.5)], pair("a", "b", truth))["a"] == []


def test_a_loss_to_the_base_is_false_even_where_it_may_be_chance() -> None:
    """b has the lowest KL; c is where b is in both rewards, but is not the base."""
    entries = [entry("a", 0.5, 0.7, kl=9.0), entry("b", 0.5, 0.6, kl=0.1), entry("c", 0.5, 0.6, kl=4.0)]
    level, below = (0.0, -0.1, 0.1), (-0.02, -0.05, 0.01)
    marked = wins(entries, pair("a", "b", level, below), pair("c", "a", level, (0.02, -0.01, 0.05)))
    (win,) = marked["a"]
    assert (win.over, win.quantity, win.certain, win.nearest_to_base) == ("b", "inner_product", False, True)
    assert win.believed == pytest.approx(0.1) and win.difference == -0.02 and win.interval == (-0.05, 0.01)


def test_without_a_kl_nothing_is_the_base() -> None:
    entries = [entry("a", 0.5, 0.7), entry("b", 0.5, 0.6)]
    assert wins(entries, pair("a", "b", (0.0, -0.1, 0.1), (-0.02, -0.05, 0.01)))["a"] == []


def test_an_entry_without_believed_rewards_is_left_out() -> None:
    plain = entry("a", 0.8, 0.5)
    plain.believed = None
    assert wins([plain, entry("b", 0.6, 0.5)], pair("a", "b", (-0.1, -0.2, -0.05))) == {"b": []}


def test_believed_numbers_are_means_over_seeds() -> None:
    """Inner products: (0 x .2 + 1 x .6 + 1 x .4 + 0 x .9) / 2 = .5, and .7 with .4 more at the second point."""

    def seed(volume: float, gain: float) -> ProxyReward:
        points = (
            ProxyPoint(preference=(0.0, 1.0), mean=(0.2, 0.6)),
            ProxyPoint(preference=(1.0, 0.0), mean=(0.4 + gain, 0.9)),
        )
        return ProxyReward(points=points, hypervolume=volume)

    both = believed.of_seeds([seed(0.3, 0.0), seed(0.4, 0.4)])
    assert both is not None
    np.testing.assert_allclose([both.hypervolume, both.inner_product], [0.35, 0.6])
    assert believed.of_seeds([seed(0.3, 0.0), None]) is None and believed.of_seeds([None]) is None

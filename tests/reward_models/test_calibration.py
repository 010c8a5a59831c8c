"""ECE, accuracy and reliability bins: numbers worked by hand, a second implementation, and the one-order trap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import RequestError
from moalign.reward_models import calibration


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def slow_ece(delta: list[float], first: list[float], bins: int) -> float:
    """The definition read aloud: every pair in both orders, dropped into bins one by one."""
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for d, q in zip(delta, first, strict=True):
        for entry in ((1 / (1 + math.exp(-d)), q), (1 / (1 + math.exp(d)), 1 - q)):
            held[min(int(entry[0] * bins), bins - 1)].append(entry)
    total = 0.0
    for inside in held:
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            label = sum(y for _, y in inside) / len(inside)
            total += len(inside) / (2 * len(delta)) * abs(label - confidence)
    return total


def test_by_hand() -> None:
    """Four pairs at 0.8, three of them won: (0.8, 0.75) and (0.2, 0.25), both off by 0.05."""
    delta = [logit(0.8)] * 4
    first = [1.0, 1.0, 1.0, 0.0]
    assert calibration.ece(delta, first) == pytest.approx(0.05)
    assert calibration.accuracy(delta, first) == 0.75
    bars = {round(bar["low"], 2): bar for bar in calibration.reliability(delta, first) if bar["count"]}
    assert sorted(bars) in ([0.2, 0.8], [0.1, 0.8])  # 1 - 0.8 may fall just below 0.2
    high = bars[0.8]
    assert (high["count"], high["confidence"], high["accuracy"]) == (4, pytest.approx(0.8), 0.75)


def test_two_groups_of_bins_by_hand() -> None:
    """2 pairs at 0.95 (both won), 2 pairs at 0.65 (one won): (2 * |1 - .95| + 2 * |.5 - .65|) / 4 = 0.1."""
    delta = [logit(0.95)] * 2 + [logit(0.65)] * 2
    assert calibration.ece(delta, [1, 1, 1, 0]) == pytest.approx(0.1)
    assert calibration.log_loss(delta, [1, 1, 1, 0]) == pytest.approx(
        -(2 * math.log(0.95) + math.log(0.65) + math.log(0.35)) / 4
    )


def test_the_order_in_which_a_pair_is_written_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    delta, first = rng.normal(size=50), (rng.random(50) < 0.5).astype(float)
    turned = rng.random(50) < 0.5
    other = np.where(turned, -delta, delta), np.where(turned, 1 - first, first)
    for bins in calibration.BINS:
        assert calibration.ece(*other, bins) == pytest.approx(calibration.ece(delta, first, bins), abs=1e-12)
    assert calibration.accuracy(*other) == calibration.accuracy(delta, first)


@given(
    # Thousandths off the hundredths: no probability lies on a bin's edge, where rounding would choose the side.
    st.lists(st.tuples(st.integers(-800, 800), st.sampled_from([0.0, 1.0, 0.3])), min_size=1, max_size=40),
    st.sampled_from([1, 5, 10, 20]),
)
@settings(deadline=None, max_examples=150)
def test_a_second_implementation_agrees(pairs: list[tuple[int, float]], bins: int) -> None:
    delta, first = [d / 100 + 0.0031 for d, _ in pairs], [q for _, q in pairs]
    assert calibration.ece(delta, first, bins) == pytest.approx(slow_ece(delta, first, bins), abs=1e-9)
    bars = calibration.reliability(delta, first, bins)
    from_bars = sum(
        bar["count"] * abs(bar["accuracy"] - bar["confidence"])
        for bar in bars
        if bar["accuracy"] is not None and bar["confidence"] is not None
    )
    assert from_bars / (2 * len(delta)) == pytest.approx(calibration.ece(delta, first, bins), abs=1e-9)
    assert sum(bar["count"] for bar in bars) == 2 * len(delta)


def test_the_winner_first_trap() -> None:
    """One order only, label 1, says mean(1 - p): large for a calibrated model, 0 for one that is always certain."""
    rng = np.random.default_rng(0)
    delta = rng.normal(size=200_000) * 1.5
    won = rng.random(len(delta)) < calibration.sigmoid(delta)
    winner_first = np.where(won, delta, -delta)
    right = calibration.ece(delta, won.astype(float))
    assert right < 0.004  # perfectly calibrated, but for noise
    assert calibration.ece(winner_first) == pytest.approx(right, abs=1e-12)

    confidence = calibration.sigmoid(winner_first)
    place = np.minimum((confidence * 10).astype(int), 9)
    trap = sum((place == b).mean() * abs(1 - confidence[place == b].mean()) for b in range(10) if (place == b).any())
    assert trap == pytest.approx(float((1 - confidence).mean()))
    assert trap > 0.3


def test_the_true_probability_may_stand_in_for_the_label() -> None:
    delta = np.random.default_rng(1).normal(size=300)
    assert calibration.ece(delta, calibration.sigmoid(delta)) == pytest.approx(0, abs=1e-12)
    # Twice too certain: the error is that of the certainty itself, without any noise of labels.
    off = np.abs(calibration.sigmoid(2 * delta) - calibration.sigmoid(delta)).mean()
    assert calibration.ece(2 * delta, calibration.sigmoid(delta), 200) == pytest.approx(off, abs=2e-3)


def test_ties_count_half() -> None:
    assert calibration.accuracy([0.0, 1.0], [1.0, 1.0]) == 0.75
    assert calibration.ece([0.0, 0.0], [1.0, 1.0]) == 0.0  # says 0.5 both times, and is right once in each order


@pytest.mark.parametrize(("extreme", "won"), [(800.0, 1.0), (-800.0, 0.0)])
def test_extreme_differences_do_not_overflow(extreme: float, won: float) -> None:
    with np.errstate(over="raise", invalid="raise"):
        assert calibration.sigmoid([extreme])[0] == won
        assert calibration.ece([extreme], [won]) == 0
        assert calibration.log_loss([extreme], [1 - won]) == 800


def test_temperature_recovers_how_much_too_certain_a_model_is() -> None:
    rng = np.random.default_rng(5)
    truth = rng.normal(size=40_000) * 1.5
    won = (rng.random(len(truth)) < calibration.sigmoid(truth)).astype(float)
    fitted = calibration.temperature(2.5 * truth, won)
    assert fitted == pytest.approx(2.5, rel=0.05)
    grid = np.linspace(1.5, 4, 101)
    losses = [calibration.log_loss(2.5 * truth / t, won) for t in grid]
    assert fitted == pytest.approx(grid[int(np.argmin(losses))], abs=0.03)
    assert calibration.temperature([1.0, 2.0], [1.0, 1.0]) == pytest.approx(1e-3, rel=0.01)  # always right


def test_report_holds_intervals_that_hold_the_truth() -> None:
    rng = np.random.default_rng(8)
    truth = rng.normal(size=600) * 1.5
    big = rng.normal(size=200_000) * 1.5
    true_ece = calibration.ece(2 * big, calibration.sigmoid(big))
    won = (rng.random(600) < calibration.sigmoid(truth)).astype(float)
    report = calibration.report(2 * truth, won, draws=500, seed=3)
    assert report["pairs"] == 600
    assert report["ece"]["10"] == pytest.approx(calibration.ece(2 * truth, won))
    low, high = report["ece_ci"]["10"]
    assert 0 < low < true_ece < high
    low, high = report["accuracy_ci"]
    assert low < report["accuracy"] < high
    assert set(report["ece"]) == {"5", "10", "20"}
    assert sum(bar["count"] for bar in report["reliability"]) == 1200
    assert report == calibration.report(2 * truth, won, draws=500, seed=3)


def test_a_calibrated_model_is_within_chance() -> None:
    """Its ECE on 200 pairs is not 0, but no larger than chance gives, and the interval says so."""
    rng = np.random.default_rng(2)
    truth = rng.normal(size=200) * 1.5
    won = (rng.random(200) < calibration.sigmoid(truth)).astype(float)
    report = calibration.report(truth, won, draws=300)
    assert report["ece"]["10"] > 0.02
    assert report["ece_by_chance"]["10"] == pytest.approx(0.053, abs=0.015)
    assert report["ece_ci"]["10"][0] == 0.0


@pytest.mark.parametrize(
    ("delta", "first", "message"),
    [
        ([], 1.0, "there are no pairs"),
        ([0.1, math.nan], 1.0, "difference of pair 1 is nan"),
        ([math.inf], 1.0, "difference of pair 0 is inf"),
        ([0.1, 0.2], [1.0, 1.5], "label of pair 1 is 1.5"),
        ([0.1], [math.nan], "label of pair 0 is nan"),
    ],
)
def test_bad_input_is_named(delta: list[float], first: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        calibration.report(delta, first)  # type: ignore[arg-type]


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="one difference per pair"):
        calibration.ece(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="at least one bin"):
        calibration.ece([0.1], 1.0, 0)

"""Accuracy and calibration of a reward model: accuracy, Expected Calibration Error, reliability bins.

A Bradley-Terry reward model says with what probability the first of two responses is preferred:
``sigma(delta)``, ``delta = r(first) - r(second)``. Every pair enters in BOTH orders, ``(sigma(delta), q)`` and
``(sigma(-delta), 1 - q)``, where q is 1 when the first was preferred; the bins are M equal parts of [0, 1];
``ECE = sum_bins |B| / N * |mean label - mean confidence|`` (arXiv 2312.07401). Entering only the order with the winner
first, label 1, would be wrong: it gives mean(1 - sigma(delta)), whatever the calibration.

Where the annotators' true probability q of preferring the first is known (the sandbox), it may stand in for the label:
the result is then the true calibration error, without the labels' noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import TypedDict

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto import statistics

Vector = NDArray[np.float64]

BINS = (5, 10, 20)
"""The numbers of bins that are reported; 10 is the headline's."""
HEADLINE = 10


class Bin(TypedDict):
    """One bar of a reliability diagram."""

    low: float
    high: float
    count: int
    """Entries: each pair counts twice, once in each order."""
    confidence: float | None
    """Mean stated probability; None when the bin is empty."""
    accuracy: float | None
    """Mean label: how often the first of the two was preferred."""


class CalibrationReport(TypedDict):
    """What :func:`report` returns; intervals are (low, high), dicts go from number of bins to value."""

    pairs: int
    accuracy: float
    accuracy_ci: list[float]
    log_loss: float
    """Nats per pair."""
    ece: dict[str, float]
    ece_ci: dict[str, list[float]]
    ece_by_chance: dict[str, float]
    """Mean ECE of a perfectly calibrated model on as many pairs."""
    reliability: list[Bin]


def sigmoid(x: ArrayLike) -> Vector:
    """Return 1 / (1 + exp(-x)), shape as given, without overflow."""
    values = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(values))
    return np.asarray(np.where(values >= 0, 1 / (1 + small), small / (1 + small)))


def accuracy(delta: ArrayLike, first: ArrayLike | float = 1.0) -> float:
    """Return the share of pairs on which model and label agree; a tie (delta 0) counts half.

    ``delta`` is ``r(first) - r(second)``, ``[pairs]``; ``first`` is 1 where the first was preferred, 0 where the second
    was, or the probability, ``[pairs]`` or one number. They mean the same in the other functions.
    """
    return float(_agreement(*_checked(delta, first)).mean())


def ece(delta: ArrayLike, first: ArrayLike | float = 1.0, bins: int = HEADLINE) -> float:
    """Return the Expected Calibration Error over both orders of every pair."""
    return float(0.5 * np.abs(_gaps(*_checked(delta, first), bins).mean(axis=0)).sum())


def eces(delta: ArrayLike, first: ArrayLike | float = 1.0) -> dict[str, float]:
    """Return the Expected Calibration Error for each of :data:`BINS`, by the number of bins."""
    return {str(bins): ece(delta, first, bins) for bins in BINS}


def reliability(delta: ArrayLike, first: ArrayLike | float = 1.0, bins: int = HEADLINE) -> list[Bin]:
    """Return the bars of the reliability diagram, from low to high confidence."""
    confidence, label, place = _both_orders(*_checked(delta, first), bins)
    bars: list[Bin] = []
    for number in range(bins):
        inside = place == number
        count = int(inside.sum())
        stated, observed = (float(x[inside].mean()) if count else None for x in (confidence, label))
        low, high = number / bins, (number + 1) / bins
        bars.append(Bin(low=low, high=high, count=count, confidence=stated, accuracy=observed))
    return bars


def log_loss(delta: ArrayLike, first: ArrayLike | float = 1.0) -> float:
    """Return the mean negative log-likelihood of the labels in nats: what training minimises."""
    values, labels = _checked(delta, first)
    return float((np.logaddexp(0, -values) * labels + np.logaddexp(0, values) * (1 - labels)).mean())


def by_chance(delta: ArrayLike, bins: int = HEADLINE, draws: int = 200, seed: int = 0) -> Vector:
    """Return the ECEs that a perfectly calibrated model with these confidences would get, ``[draws]``.

    Labels are drawn from the model's own probabilities: on few pairs such a model has an ECE well above 0.
    """
    values, _ = _checked(delta, 1.0)
    rng = np.random.default_rng(seed)
    chance = sigmoid(values)
    return np.array([ece(values, (rng.random(len(values)) < chance).astype(np.float64), bins) for _ in range(draws)])


def temperature(delta: ArrayLike, first: ArrayLike | float = 1.0) -> float:
    """Return the T > 0 for which ``sigma(delta / T)`` has the least log loss on these pairs (temperature scaling).

    The accuracy stays. Fit it on other pairs than those it is judged on. The log loss is convex in 1 / T, so that
    bisection of its slope finds the minimum; T is kept within [1e-3, 1e3] (a model that is always right has no finite
    optimum).
    """
    values, labels = _checked(delta, first)
    low, high = -np.log(1e3), np.log(1e3)
    for _ in range(100):
        middle = (low + high) / 2
        slope = (values * (sigmoid(values * np.exp(middle)) - labels)).mean()
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def report(delta: ArrayLike, first: ArrayLike | float = 1.0, draws: int = 1000, seed: int = 0) -> CalibrationReport:
    """Return accuracy, ECE for each of :data:`BINS`, log loss and reliability bins, with 95 % intervals.

    The intervals come from ``draws`` resamples of the pairs; both orders of a pair stay together.

    An ECE is biased upwards by noise, a resample has that noise twice, and plain percentiles would lie above the
    truth (for a calibrated model they never hold it). So the interval is reflected about the estimate and cut at 0,
    and begins at 0 where the estimate lies within what chance alone gives (:func:`by_chance`, 95 %).
    """
    values, labels = _checked(delta, first)
    columns = [_agreement(values, labels)[:, None], *(_gaps(values, labels, bins) for bins in BINS)]
    drawn = statistics.bootstrap_means(np.concatenate(columns, axis=1)[:, None, :], draws, seed)[:, 0]
    agreement, *gaps = np.split(drawn, np.cumsum([column.shape[1] for column in columns])[:-1], axis=1)
    result = CalibrationReport(
        pairs=len(values),
        accuracy=float(columns[0].mean()),
        accuracy_ci=list(statistics.percentile_interval(agreement[:, 0])),
        log_loss=log_loss(values, labels),
        ece=eces(values, labels),
        ece_ci={},
        ece_by_chance={},
        reliability=reliability(values, labels),
    )
    for bins, gap in zip(BINS, gaps, strict=True):
        error = result["ece"][str(bins)]
        low, high = statistics.basic_interval(0.5 * np.abs(gap).sum(axis=1), error)
        chance = by_chance(values, bins, seed=seed)
        within = error <= np.quantile(chance, 0.95)
        result["ece_ci"][str(bins)] = [0.0 if within else max(0.0, low), max(0.0, high)]
        result["ece_by_chance"][str(bins)] = float(chance.mean())
    return result


def _checked(delta: ArrayLike, first: ArrayLike | float) -> tuple[Vector, Vector]:
    values = np.asarray(delta, dtype=np.float64)
    labels = np.broadcast_to(np.asarray(first, dtype=np.float64), values.shape)
    if values.ndim != 1:
        raise ValueError(f"one difference per pair is needed; found the shape {list(values.shape)}")
    if len(values) == 0:
        raise RequestError("calibration: there are no pairs")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise RequestError(f"calibration: the reward difference of pair {bad[0]} is {values[bad[0]]}")
    wrong = np.flatnonzero(~((labels >= 0) & (labels <= 1)))
    if len(wrong):
        raise RequestError(f"calibration: the label of pair {wrong[0]} is {labels[wrong[0]]}; allowed: 0 to 1")
    return values, labels


def _agreement(delta: Vector, first: Vector) -> Vector:
    return np.where(delta > 0, first, np.where(delta < 0, 1 - first, 0.5))


def _both_orders(delta: Vector, first: Vector, bins: int) -> tuple[Vector, Vector, NDArray[np.intp]]:
    """Return confidence, label and number of the bin of every pair in both orders, ``[2 * pairs]``."""
    if bins < 1:
        raise ValueError(f"at least one bin is needed; found {bins}")
    confidence = np.concatenate([sigmoid(delta), sigmoid(-delta)])
    place = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    return confidence, np.concatenate([first, 1 - first]), place


def _gaps(delta: Vector, first: Vector, bins: int) -> Matrix:
    """Return each pair's share in every bin's sum of label - confidence, ``[pairs, bins]``.

    Their mean over pairs is twice the bin's ``|B| / N * (mean label - mean confidence)``, so that resampled ECEs need
    nothing but resampled means.
    """
    confidence, label, place = _both_orders(delta, first, bins)
    table = np.zeros((len(delta), bins))
    np.add.at(table, (np.tile(np.arange(len(delta)), 2), place), label - confidence)
    return table

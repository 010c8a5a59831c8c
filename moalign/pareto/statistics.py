"""Seeded bootstrap: intervals for every figure, paired differences, seeds as a second level.

Every function that draws has its own numpy generator made from ``seed``; the global generator is
never touched. Scores are ``[prompts, k, m]`` (k preferences, m objectives; several answers to a prompt are averaged
before); the prompt is the unit that is resampled, the same prompts for all k, so what two preferences or two methods
share by answering the same prompt cancels in their difference. Pass the same ``seed`` (and the same prompts in the same
order) for two methods and draw i of one belongs to draw i of the other.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto.front import refuse_unless_finite

DRAWS = 1000

_CHUNK = 1 << 20
"""Resampling counts held in memory at once."""


_MOST_BIAS = 1 + math.sqrt(2)
"""Bias of an estimate by the bias that a resample adds to it, where it grows as the noise does and not as its square.

A resample has the noise twice, which is sqrt(2) times as large: b of noise 1 becomes sqrt(2) b, so that (sqrt(2) - 1) b
is seen. So it is for equal policies, which only noise spreads into a front; for a smooth front the factor is 1.
"""


@dataclass(frozen=True)
class Resampled:
    """A number, or an array of them, of one or more training seeds: as observed, and in resamples of the prompts."""

    observed: Matrix
    """``[seeds, ...]``"""
    draws: Matrix
    """``[draws, seeds, ...]``; the second half mirrors the first (:func:`resample`)."""
    prompts: int

    def each(self, statistic: Callable[[Matrix], float]) -> Resampled:
        """Return a number of the means: ``statistic`` makes it of one seed's, ``[k, m]``."""
        flat = self.draws.reshape(-1, *self.draws.shape[2:])
        values = each_draw(flat, statistic).reshape(self.draws.shape[:2])
        return Resampled(each_draw(self.observed, statistic), values, self.prompts)

    def __sub__(self, other: Resampled) -> Resampled:
        """Return the difference to another method's, seed by seed, in the same resamples of the same prompts."""
        return Resampled(self.observed - other.observed, self.draws - other.draws, self.prompts)

    def __neg__(self) -> Resampled:
        return Resampled(-self.observed, -self.draws, self.prompts)

    def of_seeds(self) -> Matrix:
        """Return the variance ``[...]`` that different training seeds add to the mean over them; 0 for one seed.

        The seeds' observed spread, less what different answers to the same prompts contribute to it.
        """
        seeds = len(self.observed)
        if seeds == 1:
            return np.zeros(self.observed.shape[1:])
        odd = _odd(self.draws)
        own = odd - odd.mean(axis=1, keepdims=True)
        answers = _unbiased(self.prompts) * (own**2).mean(axis=0).sum(axis=0) / (seeds - 1)
        return np.asarray(np.maximum(self.observed.var(axis=0, ddof=1) - answers, 0.0) / seeds, dtype=np.float64)


def resample(scores_by_seed: Sequence[ArrayLike], draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Return the means ``[k, m]`` of every training seed, as observed and in ``draws`` resamples of the prompts.

    All seeds answer the same prompts, so one resample of prompts serves all seeds of a draw (seeds and prompts are
    crossed, not nested). Half of the draws are resampled; the others mirror them about what was observed (antithetic
    resampling, Hall 1989). In a pair of them whatever is linear in the noise cancels, which leaves the bias; in half
    their difference the bias cancels, which leaves the linear part. An odd number of ``draws`` becomes the next even.

    Args:
        scores_by_seed: one array ``[prompts, k, m]`` for each training seed, all of one shape.
        draws: at least 1.
        seed: of the resampling; the same for methods whose difference is taken.

    Raises RequestError as :func:`bootstrap_means` does, for no seeds, and for different shapes.
    """
    if not len(scores_by_seed):
        raise RequestError("bootstrap: no seeds; at least one array of scores is needed")
    tables = [_scores(scores) for scores in scores_by_seed]
    shapes = {table.shape for table in tables}
    if len(shapes) > 1:
        raise RequestError(f"bootstrap: found shapes {sorted(shapes)}; needed: the same for every seed")
    prompts, k, m = tables[0].shape
    observed = np.stack([table.mean(axis=0) for table in tables])
    side_by_side = np.stack(tables, axis=1).reshape(prompts, len(tables) * k, m)
    half = -(-_at_least(draws, 1, "draws") // 2)
    drawn = bootstrap_means(side_by_side, half, seed).reshape(half, len(tables), k, m)
    return Resampled(observed, np.concatenate([drawn, 2 * observed - drawn]), prompts)


def interval(*parts: Resampled, level: float = 0.95, least: float = -math.inf) -> Matrix:
    """Return the interval ``[2, ...]`` (lo, hi) for the mean over training seeds, or for a sum of such means.

    It is meant to hold, in a share ``level`` of evaluations, the number of the expected scores of every seed's
    policy, averaged over all prompts of the task and all training seeds that there could be.

    * Its half width is Student's t times the standard error, squared and added up over what varies: the prompts (n - 1
      degrees of freedom) and the training seeds of each part (seeds - 1; :meth:`Resampled.of_seeds`).
    * Noise pushes a hypervolume up: it spreads equal policies into a front. What resampling adds shows by how much, up
      to a factor between 1 (a smooth front) and 1 + sqrt(2) (equal policies). The interval reaches from the
      half width below the corrected number to the half width above the number as it was observed, or the other
      way round for a bias downwards. Without a bias it is the t interval of a mean.

    How often it holds the truth: ``results/calibration/intervals.md``. One prompt has no spread, so its width is 0.

    Args:
        parts: one for a method or for a difference that is paired over seeds; two, ``a`` and ``-b``, for a difference
            of methods that have different seeds; all of the same resamples.
        level: share of evaluations.
        least: what the number cannot fall below (a hypervolume: 0).
    """
    if not 0 < level < 1:
        raise RequestError(f"interval: level {level}; allowed: between 0 and 1, like 0.95")
    prompts = parts[0].prompts
    observed = np.sum([part.observed.mean(axis=0) for part in parts], axis=0)
    drawn = np.sum([part.draws.mean(axis=1) for part in parts], axis=0)
    refuse_unless_finite(np.asarray(drawn), "interval: draws")
    variance = _unbiased(prompts) * (_odd(drawn) ** 2).mean(axis=0) * student(level, prompts) ** 2
    for part in parts:
        variance = variance + part.of_seeds() * student(level, len(part.observed)) ** 2
    ends = np.stack([observed, observed - _MOST_BIAS * (drawn.mean(axis=0) - observed)])
    half = np.sqrt(variance)
    return np.asarray(np.maximum([ends.min(axis=0) - half, ends.max(axis=0) + half], least), dtype=np.float64)


def share_above_zero(*parts: Resampled, seed: int = 0) -> float:
    """Return the share of resamples, of prompts and of training seeds, in which the sum of ``parts`` is above 0.

    Ties count half. No probability that the truth is above 0: see :func:`interval`.
    """
    total = np.zeros(len(parts[0].draws))
    for stream, part in enumerate(parts, start=1):
        draws, seeds = part.draws.shape
        # From a stream of its own: the prompts drawn do not depend on the number of seeds.
        picks = _generator(seed, stream).integers(seeds, size=(draws, seeds))
        total += part.draws[np.arange(draws)[:, None], picks].mean(axis=1)
    return float((total > 0).mean() + 0.5 * (total == 0).mean())


def probability_of_improvement(of_a: ArrayLike, of_b: ArrayLike) -> float:
    """Return the share of pairs of training seeds in which ``a`` ``[seeds]`` is above ``b`` ``[seeds]``.

    Estimates the probability that a random seed of ``a`` beats a random one of ``b``; ties count half (Agarwal et al.
    2021, *Deep Reinforcement Learning at the Edge of the Statistical Precipice*, 4.3).

    >>> probability_of_improvement([3, 1], [2, 1])
    0.625
    """
    difference = np.subtract.outer(np.asarray(of_a, dtype=np.float64), np.asarray(of_b, dtype=np.float64))
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def student(level: float, numbers: int) -> float:
    """Return Student's two-sided t for a mean of ``numbers`` values; 0 for one, which shows no spread."""
    from scipy.special import stdtrit  # type: ignore[import-untyped,unused-ignore]

    return float(stdtrit(numbers - 1, (1 + level) / 2)) if numbers > 1 else 0.0


def _unbiased(numbers: int) -> float:
    """Return what the variance of resampled means falls short by: they vary around means of the sample itself."""
    return numbers / (numbers - 1) if numbers > 1 else 1.0


def _odd(draws: Matrix) -> Matrix:
    """Return half the difference of every draw ``[draws, ...]`` to its mirror image: ``[draws / 2, ...]``."""
    forth, back = np.split(draws, 2)
    return np.asarray((forth - back) / 2, dtype=np.float64)


def bootstrap_means(scores: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Matrix:
    """Return resampled means ``[draws, k, m]`` of ``scores`` ``[prompts, k, m]``.

    Each draw resamples the prompts with replacement, the same for all preferences and objectives.

    Raises:
        RequestError: wrong shape, no prompts, NaN or infinity, ``draws`` < 1 or a negative ``seed``.
    """
    table = _scores(scores)
    prompts = len(table)
    flat = table.reshape(prompts, -1)
    rng = _generator(seed)
    draws = _at_least(draws, 1, "draws")
    step = max(1, _CHUNK // prompts)
    means = np.empty((draws, flat.shape[1]))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        picks = rng.integers(prompts, size=(size, prompts)) + prompts * np.arange(size)[:, None]
        # How often each draw took each prompt, [size, prompts]: each row sums to ``prompts``.
        counts = np.bincount(picks.ravel(), minlength=size * prompts).reshape(size, prompts).astype(np.float64)
        means[start : start + size] = counts @ flat / prompts
    return means.reshape(draws, *table.shape[1:])


def each_draw(samples: ArrayLike, statistic: Callable[[Matrix], float]) -> Matrix:
    """Apply ``statistic`` (means ``[k, m]`` -> number) to every draw of ``samples`` ``[draws, k, m]``: ``[draws]``."""
    return np.array([statistic(means) for means in np.asarray(samples, dtype=np.float64)], dtype=np.float64)


def percentile_interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval ``(lo, hi)`` of ``samples`` ``[draws]``, for means of many."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise RequestError(f"percentile interval: found samples of shape {values.shape}; needed: one number per draw")
    if not 0 < level < 1:
        raise RequestError(f"percentile interval: level {level}; allowed: between 0 and 1, like 0.95")
    refuse_unless_finite(values, "percentile interval: samples")
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def basic_interval(samples: ArrayLike, observed: float) -> tuple[float, float]:
    """Return the 95 % percentile interval of ``samples`` ``[draws]`` reflected about ``observed``."""
    lo, hi = percentile_interval(samples)
    return 2 * observed - hi, 2 * observed - lo


def interquartile_mean(values: ArrayLike) -> float:
    """Return the mean of the middle half of ``values`` ``[n]``.

    When n is no multiple of 4 the outermost values that remain count with the fraction of them that
    lies inside: three values weigh 1/4, 1, 1/4.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not numbers.size:
        raise RequestError(f"interquartile mean: found shape {numbers.shape}; needed: at least one number")
    refuse_unless_finite(numbers, "interquartile mean")
    # scipy's trim_mean cuts whole values off only: of three seeds none.
    n = len(numbers)
    edges = np.clip(np.arange(n + 1), n / 4, 3 * n / 4)
    return float(np.sort(numbers) @ np.diff(edges) / (n / 2))


def _scores(scores: ArrayLike) -> Matrix:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 3 or not table.size:
        raise RequestError(
            f"scores: found shape {table.shape}; needed: [prompts, preferences, objectives], none of them 0"
        )
    refuse_unless_finite(table, "scores")
    return table


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(_at_least(seed, 0, "seed"), spawn_key=stream))


def _at_least(number: int, least: int, name: str) -> int:
    try:
        value = operator.index(number)
    except TypeError:
        raise RequestError(f"bootstrap: {name} is {number!r}; needed: a whole number") from None
    if value < least:
        raise RequestError(f"bootstrap: {name} is {value}; allowed: {least} or more")
    return value

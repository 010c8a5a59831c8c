"""Bootstrap: closed forms, hand-worked numbers, pairing, determinism, the global generator untouched."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student

from moalign.core.errors import RequestError
from moalign.pareto import statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.statistics import (
    Resampled,
    basic_interval,
    bootstrap_means,
    each_draw,
    interquartile_mean,
    interval,
    percentile_interval,
    probability_of_improvement,
    resample,
    share_above_zero,
)


def hypervolume_samples(scores: np.ndarray, ref: object, draws: int = 1000, seed: int = 0) -> np.ndarray:
    return each_draw(bootstrap_means(scores, draws, seed), lambda means: hypervolume(means, ref))


def scores_of(seed: int, prompts: int = 50, k: int = 3, m: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 1.0, (prompts, k, m))


def test_shape_and_closed_form_moments() -> None:
    scores = scores_of(0)
    samples = bootstrap_means(scores, draws=20_000, seed=1)
    assert samples.shape == (20_000, 3, 2)
    # Resampled means have mean x-bar and variance (population variance) / prompts.
    error = scores.std(axis=0) / math.sqrt(50)
    assert np.allclose(samples.mean(axis=0), scores.mean(axis=0), atol=5 * error.max() / math.sqrt(20_000))
    assert np.allclose(samples.std(axis=0), error, rtol=0.03)
    # All preferences and objectives share the resampled prompts, so covariances carry over too.
    assert np.allclose(
        np.cov(samples.reshape(20_000, -1).T), np.cov(scores.reshape(50, -1).T, bias=True) / 50, atol=2e-3
    )


def test_each_draw_is_a_mean_of_prompts_drawn_with_replacement() -> None:
    # The score of prompt i is 10^i, so the digits of a sum tell how often each prompt was drawn.
    prompts = 4
    samples = bootstrap_means((10.0 ** np.arange(prompts)).reshape(-1, 1, 1), draws=3000, seed=0)
    sums = np.rint(samples.ravel() * prompts).astype(int)
    counts = np.array([[int(digit) for digit in f"{total:04d}"] for total in sums])
    assert (counts.sum(axis=1) == prompts).all()
    # Multinomial: each prompt is missing with probability (3/4)^4.
    assert np.allclose((counts == 0).mean(axis=0), 0.75**4, atol=0.03)


def test_chunks_only_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = scores_of(0)
    whole = bootstrap_means(scores, draws=40, seed=5)
    monkeypatch.setattr(statistics, "_CHUNK", 170)
    assert np.allclose(bootstrap_means(scores, draws=40, seed=5), whole, rtol=1e-12)


def test_same_seed_same_digits_other_seed_other_digits() -> None:
    scores = scores_of(0)
    assert np.array_equal(bootstrap_means(scores, 100, seed=3), bootstrap_means(scores.copy(), 100, seed=3))
    assert not np.allclose(bootstrap_means(scores, 100, seed=3), bootstrap_means(scores, 100, seed=4))
    once, again = (hypervolume_samples(scores, [0, 0], 100, seed=3) for _ in range(2))
    assert np.array_equal(once, again)
    both = [resample([scores, scores + 1], 100, seed=3).draws for _ in range(2)]
    assert np.array_equal(*both)


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    scores = scores_of(0)

    def all_of_them() -> list[np.ndarray]:
        means = bootstrap_means(scores, 50, seed=3)
        levels = resample([scores, scores], 50, seed=3).draws
        return [means, levels, hypervolume_samples(scores, [0, 0], 50, seed=3)]

    np.random.seed(1)
    before = np.random.get_state(legacy=False)
    first = all_of_them()
    after = np.random.get_state(legacy=False)
    assert before["state"]["pos"] == after["state"]["pos"]
    assert np.array_equal(before["state"]["key"], after["state"]["key"])
    np.random.seed(2)
    for one, other in zip(first, all_of_them(), strict=True):
        assert np.array_equal(one, other)


def test_scores_are_not_mutated() -> None:
    scores = scores_of(0)
    scores.flags.writeable = False
    before = scores.copy()
    bootstrap_means(scores, 20)
    hypervolume_samples(scores, [0, 0], 20)
    resample([scores], 20)
    assert np.array_equal(scores, before)


def test_interval_of_known_samples() -> None:
    samples = np.arange(1001.0)
    assert percentile_interval(samples) == pytest.approx((25.0, 975.0))
    assert percentile_interval(samples[::-1], level=0.5) == pytest.approx((250.0, 750.0))
    assert basic_interval(samples, observed=400.0) == pytest.approx((-175.0, 775.0))


def test_the_interval_of_a_mean_is_students() -> None:
    """Whatever is linear in the noise has no bias; what is left is the t interval of a mean of many numbers."""
    for prompts in (5, 200):
        scores = np.random.default_rng(prompts).exponential(1.0, (prompts, 1, 1))
        lo, hi = interval(resample([scores], draws=20_000, seed=1))
        half = student.ppf(0.975, prompts - 1) * scores.std(ddof=1) / math.sqrt(prompts)
        assert (lo[0, 0], hi[0, 0]) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.02 * half)


def by_hand(*observed: float, forth: list[list[float]], back: list[list[float]], prompts: int = 4) -> Resampled:
    return Resampled(np.array(observed), np.array(forth + back), prompts)


def test_an_interval_by_hand() -> None:
    part = by_hand(1.0, forth=[[1.3], [1.1]], back=[[0.9], [1.1]])
    # Half differences .2 and 0: variance .02, unbiased for 4 prompts 4/3 of it. The mean of the draws is .1 too high,
    # so that the truth may be up to (1 + sqrt 2) .1 below what was observed; t of 3 degrees of freedom is 3.182.
    half = 3.182446 * math.sqrt(0.02 * 4 / 3)
    assert interval(part) == pytest.approx([1 - 0.1 * (1 + math.sqrt(2)) - half, 1 + half])
    assert interval(-part) == pytest.approx([-1 - half, -1 + 0.1 * (1 + math.sqrt(2)) + half])
    assert interval(part, least=0.9)[0] == 0.9


def test_an_interval_over_seeds_by_hand() -> None:
    part = by_hand(1.0, 3.0, forth=[[1.2, 3.0]], back=[[0.8, 3.0]])
    # Prompts: the mean's half difference is .1, so 4/3 of .01. Seeds: their variance is 2; that of their answers, with
    # half differences .2 and 0 around .1, is 4/3 of .02; the mean of two has half of what is left, and t is 12.706.
    prompts, seeds = 4 / 3 * 0.01, (2 - 4 / 3 * 0.02) / 2
    half = math.sqrt(3.182446**2 * prompts + 12.706205**2 * seeds)
    assert interval(part) == pytest.approx([2 - half, 2 + half])
    # Another method whose seeds are others: the variances of its seeds add up, with their own t.
    other = by_hand(0.5, forth=[[0.6]], back=[[0.4]])
    assert interval(part, -other) == pytest.approx([1.5 - 12.706205 * math.sqrt(seeds), 1.5 + 12.706205 * seeds**0.5])


def test_seeds_that_differ_no_more_than_their_answers_do_not_widen() -> None:
    part = by_hand(1.0, 1.0, forth=[[1.2, 1.0]], back=[[0.8, 1.0]])
    assert part.of_seeds() == 0


def test_half_of_the_draws_mirror_the_others() -> None:
    scores = [scores_of(0), scores_of(1)]
    means = resample(scores, draws=99, seed=3)
    assert means.draws.shape == (100, 2, 3, 2) and means.prompts == 50
    assert np.allclose(means.observed, [table.mean(axis=0) for table in scores])
    assert np.allclose(means.draws[:50] + means.draws[50:], 2 * means.observed)
    # All seeds have the same prompts in a draw, as a resample of each by itself has.
    for seed, table in enumerate(scores):
        assert np.allclose(means.draws[:50, seed], bootstrap_means(table, 50, seed=3))
    area = means.each(lambda point: hypervolume(point, [0, 0]))
    assert area.draws[7, 1] == hypervolume(means.draws[7, 1], [0, 0]) and area.observed.shape == (2,)


def test_the_share_above_zero_by_hand() -> None:
    part = by_hand(0.0, forth=[[1.0], [0.0]], back=[[-1.0], [2.0]])
    assert share_above_zero(part) == 0.625  # two above, one tie of four
    # Seeds that disagree are resampled too: both 1, both -1, or one of each.
    seeds = by_hand(1.0, -1.0, forth=[[1.0, -1.0]] * 2000, back=[[1.0, -1.0]] * 2000)
    assert share_above_zero(seeds, seed=1) == pytest.approx(0.5, abs=0.03)
    assert share_above_zero(seeds, -by_hand(0.5, forth=[[0.5]] * 2000, back=[[0.5]] * 2000)) == pytest.approx(
        0.25, abs=0.03
    )


def test_the_probability_of_improvement_by_hand() -> None:
    # Of six pairs 3 > 2, 3 > 1, 2.5 > 2, 2.5 > 1, 1 = 1 and 1 < 2.
    assert probability_of_improvement([3, 1, 2.5], [2, 1]) == pytest.approx(4.5 / 6)


def simulation() -> Any:
    """Return ``results/calibration/intervals.py``, which simulates evaluations with a known truth."""
    path = Path(__file__).parents[2] / "results" / "calibration" / "intervals.py"
    spec = importlib.util.spec_from_file_location("simulated_intervals", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def test_the_simulation_has_the_packages_hypervolume() -> None:
    points = np.random.default_rng(0).normal(0.4, 0.4, (30, 11, 2))
    assert simulation().hypervolume(points) == pytest.approx([hypervolume(front, [0, 0]) for front in points])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        (("linear", None, 32), True),
        (("concave", None, 128), False),
        (("concave", "linear", 32), True),
        (("linear", None, 32, 3, 0.02), False),
        (("concave", None, 128, 3, 0.0), True),
        (("concave", "lower concave", 32, 5, 0.02), False),
    ],
)
def test_an_interval_covers_the_truth_in_95_of_100_simulated_evaluations(cell: tuple[Any, ...], wrong: bool) -> None:
    """Single, paired and over seeds; ``wrong``: percentiles, as the package had them, do not."""
    simulated = simulation()
    found = simulated.coverage(simulated.Cell(*cell), sets=1000, draws=200)
    assert 0.93 <= found["now"] <= 0.97
    if wrong:
        assert not 0.93 <= found["before"] <= 0.97


@pytest.mark.slow
def test_what_only_noise_spreads_into_a_front_is_covered_too() -> None:
    simulated = simulation()
    found = simulated.coverage(simulated.Cell("one policy", None, 128), sets=500, draws=200)
    assert found["before"] <= 0.1 and found["now"] >= 0.85


def test_pairing_cancels_what_two_methods_share() -> None:
    prompts = np.random.default_rng(1).normal(0, 1, (100, 1, 1))
    method_a = 5 + prompts + np.random.default_rng(2).normal(0, 0.05, (100, 1, 1))
    method_b = 4.9 + prompts + np.random.default_rng(3).normal(0, 0.05, (100, 1, 1))
    a, b, b_unpaired = (
        resample([scores], 1000, seed).each(lambda means: means[0, 0])
        for scores, seed in [(method_a, 0), (method_b, 0), (method_b, 1)]
    )
    paired = interval(a - b)
    assert paired.mean() == pytest.approx(float((method_a - method_b).mean()), abs=0.002)
    assert paired[0] > 0 and share_above_zero(a - b) == 1.0
    assert np.ptp(paired) < 0.15 * np.ptp(interval(a - b_unpaired))
    # Paired over seeds or not, there is one: the resamples of prompts are the same.
    assert interval(a, -b) == pytest.approx(paired)


def test_a_method_against_itself_is_a_tie() -> None:
    part = resample([scores_of(0), scores_of(1)], 100).each(lambda means: hypervolume(means, [0, 0]))
    assert interval(part - part).tolist() == [0.0, 0.0] and share_above_zero(part - part) == 0.5


def test_interquartile_mean_by_hand() -> None:
    assert interquartile_mean([8, 1, 2, 3, 4, 5, 6, 100]) == 4.5
    assert interquartile_mean([7]) == 7
    assert interquartile_mean([1, 3]) == 2
    assert interquartile_mean([0, 6, 100]) == pytest.approx((0.25 * 0 + 6 + 0.25 * 100) / 1.5)
    assert interquartile_mean([1, 3, 5, 7, 9, 11, 13, 15, 17]) == pytest.approx(9)


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=9))
def test_interquartile_mean_is_the_trimmed_mean_of_four_copies(values: list[float]) -> None:
    # Four copies of each value make the quarter a whole number, so plain slicing is exact.
    repeated = sorted(values * 4)
    n = len(values)
    assert interquartile_mean(values) == pytest.approx(float(np.mean(repeated[n : 3 * n])), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_means([[1.0, 2.0]]), "shape"),
        (lambda: bootstrap_means(np.empty((0, 2, 2))), "shape"),
        (lambda: bootstrap_means([[[1.0]], [[math.nan]]]), "scores: row 2 of 2"),
        (lambda: bootstrap_means(scores_of(0), draws=0), "draws is 0"),
        (lambda: bootstrap_means(scores_of(0), draws=1.5), "whole number"),
        (lambda: bootstrap_means(scores_of(0), seed=-1), "seed is -1"),
        (lambda: bootstrap_means(scores_of(0), seed=None), "whole number"),
        (lambda: percentile_interval([]), "one number per draw"),
        (lambda: percentile_interval([[1.0]]), "one number per draw"),
        (lambda: percentile_interval([1.0, math.inf]), "row 2"),
        (lambda: percentile_interval([1.0], level=95), "0.95"),
        (lambda: interval(resample([scores_of(0)], 10), level=95), "0.95"),
        (lambda: resample([]), "no seeds"),
        (lambda: resample([scores_of(0)], draws=0), "draws is 0"),
        (lambda: resample([scores_of(0), scores_of(0, prompts=4)]), "same for every seed"),
        (lambda: interquartile_mean([]), "at least one"),
        (lambda: interquartile_mean([math.nan]), "interquartile mean: row 1"),
    ],
)
def test_bad_input_is_refused(call: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        call()  # type: ignore[operator]

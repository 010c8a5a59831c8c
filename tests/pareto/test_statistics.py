"""Bootstrap: closed forms, coverage by simulation, pairing, determinism, the global generator untouched."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm as normal
from scipy.stats import t as student

from moalign.core.errors import RequestError
from moalign.core.preferences import grid
from moalign.pareto import statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.statistics import (
    basic_interval,
    bootstrap_means,
    each_draw,
    interquartile_mean,
    interval,
    intervals,
    paired_difference,
    two_level_bootstrap,
    two_level_means,
    widening,
)

Patch = Callable[[], None]


@pytest.fixture
def unwidened(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Shows the plain resampling below the widening."""
    return lambda: monkeypatch.setattr(statistics, "widening", lambda seeds: 1.0)


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
    both = [two_level_bootstrap([scores, scores + 1], np.sum, 100, seed=3) for _ in range(2)]
    assert np.array_equal(*both)


def test_the_global_generator_is_neither_used_nor_moved() -> None:
    scores = scores_of(0)

    def all_of_them() -> list[np.ndarray]:
        means = bootstrap_means(scores, 50, seed=3)
        levels = two_level_bootstrap([scores, scores], np.sum, 50, seed=3)
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
    two_level_bootstrap([scores], np.sum, 20)
    assert np.array_equal(scores, before)


def test_interval_of_known_samples() -> None:
    samples = np.arange(1001.0)
    assert interval(samples) == pytest.approx((25.0, 975.0))
    assert interval(samples[::-1], level=0.5) == pytest.approx((250.0, 750.0))
    assert np.allclose(intervals(np.stack([samples, 2 * samples], axis=1)), [[25, 50], [975, 1950]])
    assert basic_interval(samples, observed=400.0) == pytest.approx((-175.0, 775.0))


REPETITIONS = 500


def covered(trial: Callable[[int, np.random.Generator], bool]) -> float:
    return float(np.mean([trial(number, np.random.default_rng([11, number])) for number in range(REPETITIONS)]))


def test_the_interval_of_a_mean_covers_the_truth() -> None:
    def trial(number: int, rng: np.random.Generator) -> bool:
        scores = rng.normal(1.0, 1.0, (128, 1, 1)) + rng.exponential(0.5, (128, 1, 1)) - 0.5
        lo, hi = intervals(bootstrap_means(scores, 400, seed=number))
        return bool(lo[0, 0] <= 1.0 <= hi[0, 0])

    assert 0.93 <= covered(trial) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3])
def test_the_interval_of_a_hypervolume_covers_the_truth(objectives: int) -> None:
    truth = 0.2 + 0.7 * np.sqrt(np.array(grid(objectives, 2)))
    ref = np.zeros(objectives)
    area = hypervolume(truth, ref)

    def trial(number: int, rng: np.random.Generator) -> bool:
        shared = rng.normal(0, 0.2, (128, 1, objectives))
        scores = truth + shared + rng.normal(0, 0.2, (128, len(truth), objectives))
        lo, hi = interval(hypervolume_samples(scores, ref, draws=500, seed=number))
        return lo <= area <= hi

    assert 0.93 <= covered(trial) <= 0.97


@pytest.mark.slow
def test_the_interval_of_a_paired_difference_covers_the_truth() -> None:
    fronts = [np.array([[0.2, 0.9], [0.6, 0.6], [0.9, 0.2]]) + gain for gain in (0.03, 0.0)]
    lead = hypervolume(fronts[0], [0, 0]) - hypervolume(fronts[1], [0, 0])

    def trial(number: int, rng: np.random.Generator) -> bool:
        shared = rng.normal(0, 0.3, (128, 1, 2))
        a, b = (
            hypervolume_samples(front + shared + rng.normal(0, 0.1, (128, 3, 2)), [0, 0], 500, seed=number)
            for front in fronts
        )
        lo, hi = paired_difference(a, b)["ci"]
        return lo <= lead <= hi

    assert 0.93 <= covered(trial) <= 0.97


@pytest.mark.parametrize(("seeds", "between"), [(3, 0.5), (5, 0.5), (10, 0.5), (5, 0.05), (10, 0.0)])
def test_the_interval_over_seeds_covers_the_truth(seeds: int, between: float) -> None:
    """Prompts and training seeds both vary, shared noise of prompts included; the truth is 0."""

    def trial(number: int, rng: np.random.Generator) -> bool:
        shared = rng.normal(0, 0.5, (64, 1, 1))
        tables = [rng.normal(0, between) + shared + rng.normal(0, 0.25, (64, 1, 1)) for _ in range(seeds)]
        lo, hi = intervals(two_level_means(tables, 400, seed=number))
        return bool(lo[0, 0] <= 0 <= hi[0, 0])

    assert 0.93 <= covered(trial) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.1])
def test_where_seeds_hardly_differ_three_of_them_err_on_the_wide_side(between: float) -> None:
    def trial(number: int, rng: np.random.Generator) -> bool:
        tables = [rng.normal(0, between) + rng.normal(0, 0.5, (64, 1, 1)) for _ in range(3)]
        lo, hi = intervals(two_level_means(tables, 400, seed=number))
        return bool(lo[0, 0] <= 0 <= hi[0, 0])

    assert covered(trial) >= 0.95


@pytest.mark.slow
def test_noise_spreads_equal_policies_into_a_front_and_the_basic_interval_says_so_less() -> None:
    rng = np.random.default_rng(9)
    percentile = basic = 0
    for trial in range(60):
        scores = 0.5 + rng.normal(0, 0.3, (60, 11, 2))
        observed = hypervolume(scores.mean(axis=0), [0, 0])
        samples = hypervolume_samples(scores, [0, 0], 200, seed=trial)
        lo, hi = interval(samples)
        percentile += lo <= 0.25 <= hi
        lo, hi = basic_interval(samples, observed)
        basic += lo <= 0.25 <= hi
    assert percentile <= 3
    assert basic >= 30


def test_pairing_cancels_what_two_methods_share() -> None:
    prompts = np.random.default_rng(1).normal(0, 1, (100, 1, 1))
    method_a = 5 + prompts + np.random.default_rng(2).normal(0, 0.05, (100, 1, 1))
    method_b = 4.9 + prompts + np.random.default_rng(3).normal(0, 0.05, (100, 1, 1))
    a, b, b_unpaired = (
        bootstrap_means(scores, 1000, seed=seed).ravel()
        for scores, seed in [(method_a, 0), (method_b, 0), (method_b, 1)]
    )
    paired, unpaired = paired_difference(a, b), paired_difference(a, b_unpaired)
    truth = float((method_a - method_b).mean())
    assert paired["difference"] == pytest.approx(truth, abs=0.002)
    assert paired["ci"][0] > 0
    assert paired["p_improve"] == 1.0
    assert np.ptp(paired["ci"]) < 0.15 * np.ptp(unpaired["ci"])
    # Closed form: the sd of the paired difference is that of the per-prompt differences / sqrt(prompts).
    assert np.ptp(paired["ci"]) == pytest.approx(2 * 1.96 * (method_a - method_b).std() / 10, rel=0.1)


def test_paired_difference_by_hand() -> None:
    found = paired_difference([1, 2, 3, 4], [1, 1, 4, 1], level=0.5)
    # Differences 0, 1, -1, 3: two wins and half a tie of four; quartiles -.25 and 1.5.
    assert found == {"difference": 0.75, "ci": (-0.25, 1.5), "p_improve": 0.625}
    assert paired_difference([1, 2], [1, 1], observed=0.4)["difference"] == 0.4


def test_a_method_against_itself_is_a_tie() -> None:
    stat = hypervolume_samples(scores_of(0), [0, 0], 100)
    assert paired_difference(stat, stat) == {"difference": 0.0, "ci": (0.0, 0.0), "p_improve": 0.5}


def test_one_seed_is_the_one_level_bootstrap() -> None:
    scores = scores_of(0)

    def area(means: np.ndarray) -> float:
        return hypervolume(means, [0, 0])

    one = each_draw(bootstrap_means(scores, 60, seed=9), area)
    for aggregate in ("mean", "iqm"):
        assert two_level_bootstrap([scores], area, 60, seed=9, aggregate=aggregate) == pytest.approx(one, rel=1e-12)


def test_widening_is_student_over_normal_times_the_bias_of_few() -> None:
    for seeds in range(2, 60):
        ratio = student.ppf(0.975, seeds - 1) / normal.ppf(0.975)
        assert widening(seeds) == pytest.approx(math.sqrt(seeds / (seeds - 1)) * ratio, rel=1e-12)
    assert widening(1) == 1.0


def test_one_seed_more_or_less_is_widened_around_the_seeds_that_are_there(unwidened: Patch) -> None:
    tables = [scores_of(seed, k=2) for seed in range(3)]
    wide = two_level_means(tables, 50, seed=3)
    centre = bootstrap_means(np.concatenate(tables, axis=1), 50, seed=3).reshape(50, 3, 2, 2).mean(axis=1)
    unwidened()
    assert np.allclose(wide - centre, widening(3) * (two_level_means(tables, 50, seed=3) - centre))


def test_two_level_means_are_the_two_level_bootstrap_of_each_mean() -> None:
    tables = [scores_of(seed, k=2) for seed in range(3)]
    one = two_level_bootstrap(tables, lambda means: means[1, 0], 50, seed=3)
    assert np.allclose(two_level_means(tables, 50, seed=3)[:, 1, 0], one)


def test_both_levels_add_their_variance(unwidened: Patch) -> None:
    unwidened()
    # Seeds differ by constants: the seed level alone has variance var(constants) / seeds.
    offsets = np.array([0.0, 1.0, 5.0, 2.0])
    noise = scores_of(3, prompts=40, k=1, m=1)
    samples = two_level_bootstrap([noise + offset for offset in offsets], lambda means: means[0, 0], 20_000, seed=1)
    assert samples.mean() == pytest.approx(offsets.mean() + noise.mean(), abs=0.03)
    assert samples.var() == pytest.approx(offsets.var() / 4 + noise.var() / 40, rel=0.05)


def test_seeds_answer_the_same_resampled_prompts(unwidened: Patch) -> None:
    unwidened()
    noise = scores_of(3, prompts=40, k=1, m=1)
    samples = two_level_bootstrap([noise, -noise], lambda means: means[0, 0], 500, seed=1)
    one = bootstrap_means(noise, 500, seed=1).ravel()
    # Picking seeds (0, 0), (1, 1) or one of each gives +x, -x or exactly 0 when prompts are shared.
    kinds = [np.isclose(samples, one), np.isclose(samples, -one), np.isclose(samples, 0, atol=1e-12)]
    assert np.all(np.logical_or.reduce(kinds))
    assert [kind.mean() for kind in kinds] == pytest.approx([0.25, 0.25, 0.5], abs=0.07)


def test_iqm_aggregate_ignores_a_seed_that_went_wild() -> None:
    tables = [np.full((10, 1, 1), value) for value in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1000.0)]
    iqm = two_level_bootstrap(tables, lambda means: means[0, 0], 300, seed=0, aggregate="iqm")
    mean = two_level_bootstrap(tables, lambda means: means[0, 0], 300, seed=0)
    assert np.median(iqm) == 1.0
    assert np.median(mean) > 100


def test_two_level_pairs_two_methods() -> None:
    a = [scores_of(seed, k=1, m=1) for seed in range(3)]
    b = [scores - 0.1 for scores in a]
    stats = [two_level_bootstrap(tables, lambda means: means[0, 0], 200, seed=4) for tables in (a, b)]
    assert paired_difference(*stats)["ci"] == pytest.approx((0.1, 0.1))


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
        (lambda: interval([]), "no samples"),
        (lambda: interval([[1.0]]), "one number per draw"),
        (lambda: interval([1.0, math.inf]), "row 2"),
        (lambda: interval([1.0], level=95), "0.95"),
        (lambda: paired_difference([1, 2], [1]), "same draws"),
        (lambda: two_level_bootstrap([], np.sum), "no seeds"),
        (lambda: two_level_bootstrap([scores_of(0), scores_of(0, prompts=4)], np.sum), "same for every seed"),
        (lambda: two_level_bootstrap([scores_of(0)], np.sum, aggregate="median"), "allowed: mean, iqm"),
        (lambda: interquartile_mean([]), "at least one"),
        (lambda: interquartile_mean([math.nan]), "interquartile mean: row 1"),
    ],
)
def test_bad_input_is_refused(call: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        call()  # type: ignore[operator]

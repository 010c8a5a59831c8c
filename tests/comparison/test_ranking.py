"""Rows, pairs, ranking and winner from score matrices alone."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign.comparison.ranking import EntryRuns, SeedResult, average, ranking
from moalign.comparison.result import RunSummary
from moalign.config.card import EvaluationSpec
from moalign.core.errors import WorkError
from moalign.evaluation.evaluate import Evaluation, judge
from moalign.evaluation.result import AnsweringCost, EvalResult, Generalisation, Quality, Side, Volume
from moalign.pareto import indicators
from moalign.pareto.hypervolume import hypervolume

GRID = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
FRONT = np.array([[0.1, 0.8], [0.6, 0.6], [0.8, 0.1]])
DRAWS, SEED = 200, 7
COST = {"tokens_generated": 100, "tokens_trained": 0, "reward_calls": 10, "seconds": 2.0, "peak_memory_bytes": 2**20}


def task(optimum: np.ndarray | None = None, ref: tuple[float, float] = (0.0, 0.0), second: float = -0.1) -> Any:
    return SimpleNamespace(
        card=SimpleNamespace(
            evaluation=EvaluationSpec(bootstrap=DRAWS, seed=SEED),
            reference_point=list(ref),
            sensitivity_point=[second, second],
        ),
        names=["help", "harm"],
        judge_normaliser=SimpleNamespace(lo=[0.0, 0.0], hi=[1.0, 1.0], unit=np.asarray),
        eval_prompts=[],
        optimum=lambda asked, prompts: optimum,
    )


def scores(means: np.ndarray, seed: int = 0, noise: float = 0.2, prompts: int = 60) -> np.ndarray:
    """Scores ``[prompts, k, m]`` whose means are exactly ``means``; the prompts' noise is shared by equal seeds."""
    drawn = np.random.default_rng(seed).normal(0, noise, (prompts, *means.shape))
    return means + drawn - drawn.mean(axis=0)


def evaluated(table: np.ndarray, on: Any = None, grid: list[tuple[float, ...]] | None = None) -> Evaluation:
    result = EvalResult(
        **dict(judge(on or task(), grid or GRID, table)),
        run="runs/0123",
        run_id="0123",
        method="toy",
        task="toy",
        card_hash="abc",
        seed=0,
        objectives=("help", "harm"),
        samples=1,
        quality=Quality(rate=0.0, causes={"short": 0.0}, mean_length=20.0, distinct_3=1.0),
        cost=AnsweringCost(tokens_generated=500, reward_calls=40, seconds=1.0),
    )
    return Evaluation(result, table)


def summary(seed: int, error: str | None = None) -> RunSummary:
    status = "done" if error is None else "failed"
    return RunSummary(run=f"runs/{seed}", run_id=str(seed), seed=seed, status=status, command="moalign", error=error)


def entry(
    label: str,
    *tables: np.ndarray,
    on: Any = None,
    seeded: bool = True,
    failed: int = 0,
    grid: list[tuple[float, ...]] | None = None,
) -> EntryRuns:
    runs = [summary(seed) for seed in range(len(tables))]
    runs += [summary(len(tables) + k, "ValueError: burst") for k in range(failed)]
    finished = [SeedResult(seed, evaluated(table, on, grid), COST) for seed, table in enumerate(tables)]
    return EntryRuns(label, label, runs, finished, seeded)


def ranked(*entries: EntryRuns) -> dict[str, Any]:
    return ranking(entries, GRID, DRAWS, SEED).content


def test_rows_are_ranked_by_hypervolume() -> None:
    record = ranked(entry("low", scores(FRONT - 0.2)), entry("high", scores(FRONT, 1)))
    assert [(row["label"], row["rank"]) for row in record["rows"]] == [("high", 1), ("low", 2)]
    assert record["rows"][0]["hypervolume"] == pytest.approx(hypervolume(FRONT, [0, 0]))


def test_the_interval_of_one_seed_is_the_evaluations_own() -> None:
    group = entry("a", scores(FRONT))
    assert tuple(ranked(group)["rows"][0]["ci"]) == group.results[0].hypervolume_interval


def test_identical_runs_differ_by_exactly_nothing() -> None:
    record = ranked(entry("a", scores(FRONT)), entry("b", scores(FRONT)))
    (pair,) = record["pairs"]
    assert pair["difference"] == 0 and pair["ci"] == [0, 0]
    assert pair["share_above_zero"] == 0.5 and not pair["certain"]
    assert record["winner"] is None
    assert [row["rank"] for row in record["rows"]] == [1, 1]


def test_a_difference_between_methods_is_paired_over_prompts() -> None:
    """What prompts share cancels: a small constant gain is certain though both intervals overlap widely."""
    record = ranked(entry("a", scores(FRONT, noise=0.5)), entry("b", scores(FRONT + 0.02, noise=0.5)))
    first, second = record["rows"]
    assert first["ci"][0] < second["hypervolume"] < first["ci"][1]
    (pair,) = record["pairs"]
    assert (pair["a"], pair["b"]) == ("b", "a")
    assert pair["certain"] and pair["ci"][0] > 0 and record["winner"] == "b"


def test_a_pair_matches_an_independent_bootstrap() -> None:
    """A plain loop over resampled prompts agrees with the vectorised one within its noise."""
    a, b = scores(FRONT + 0.03, 1), scores(FRONT, 2)
    (pair,) = ranked(entry("a", a), entry("b", b))["pairs"]
    rng = np.random.default_rng(123)
    drawn = []
    for _ in range(2000):
        chosen = rng.integers(len(a), size=len(a))
        drawn.append(hypervolume(a[chosen].mean(axis=0), [0, 0]) - hypervolume(b[chosen].mean(axis=0), [0, 0]))
    assert pair["difference"] == pytest.approx(hypervolume(FRONT + 0.03, [0, 0]) - hypervolume(FRONT, [0, 0]))
    bias = (1 + np.sqrt(2)) * (np.mean(drawn) - pair["difference"])
    half = 2.001 * np.sqrt(len(a) / (len(a) - 1)) * np.std(drawn)  # Student's t for 60 prompts
    low, high = sorted([pair["difference"], pair["difference"] - bias])
    assert pair["ci"] == pytest.approx([low - half, high + half], abs=0.03)
    assert pair["share_above_zero"] == pytest.approx(np.mean(np.array(drawn) > 0), abs=0.08)


def test_no_winner_when_the_lead_may_be_chance() -> None:
    a, b, low = scores(FRONT + 0.005, 1, 0.5), scores(FRONT, 2, 0.5), scores(FRONT - 0.4, 3, 0.1)
    record = ranked(entry("a", a), entry("b", b), entry("low", low))
    assert record["winner"] is None
    certain = {(pair["a"], pair["b"]): pair["certain"] for pair in record["pairs"]}
    assert certain == {("a", "b"): False, ("a", "low"): True, ("b", "low"): True}


def test_a_winner_beats_every_other_one() -> None:
    low, mid, top = (
        entry(name, scores(FRONT + up, i, 0.1))
        for i, (name, up) in enumerate([("low", -0.2), ("mid", 0.0), ("top", 0.2)])
    )
    assert ranked(low, mid, top)["winner"] == "top"


@pytest.mark.slow
def test_a_spread_that_is_only_noise_is_not_a_lead() -> None:
    """Equal policies: one sampled anew for every preference (noise spreads its points), one sampled once.

    In half of these trials the lead is above 0 in nearly all resamples.
    """
    grid = [(i / 10, 1 - i / 10) for i in range(11)]
    named = resampled = 0
    for trial in range(10):
        rng = np.random.default_rng(trial)
        spread = rng.normal(0.5, 0.5, (60, 11, 2))
        shared = np.repeat(rng.normal(0.5, 0.5, (60, 1, 2)), 11, axis=1)
        groups = [entry(name, table, grid=grid) for name, table in (("spread", spread), ("shared", shared))]
        record = ranking(groups, grid, DRAWS, SEED).content
        (pair,) = record["pairs"]
        share = pair["share_above_zero"] if pair["a"] == "spread" else 1 - pair["share_above_zero"]
        resampled += share > 0.975
        named += record["winner"] == "spread"
    assert named <= 1 and resampled >= 4


def test_alone_there_is_no_winner() -> None:
    record = ranked(entry("a", scores(FRONT)))
    assert record["winner"] is None and record["pairs"] == []


def test_kl_to_base_is_averaged_over_seeds_and_stays_a_bound() -> None:
    def quality(*measured: tuple[float | None, bool]) -> dict[str, Any]:
        group = entry("a", scores(FRONT), scores(FRONT, 1))
        for result, (kl, bound) in zip(group.results, measured, strict=True):
            result.quality.kl, result.quality.kl_bound = kl, bound
        averages: dict[str, Any] = ranked(group)["rows"][0]["quality"]
        return averages

    known = quality((1.0, False), (2.0, False))
    assert known["kl"] == 1.5 and known["kl_bound"] is False and known["mean_length"] == 20.0
    assert quality((1.0, True), (2.0, True))["kl_bound"] is True
    # One of the evaluations is from before it was measured.
    assert quality((None, False), (1.0, False))["kl"] is None and quality((1.0, False), (None, False))["kl"] is None


def test_a_failed_method_keeps_its_row() -> None:
    record = ranked(entry("dead", failed=1), entry("a", scores(FRONT)))
    assert [row["label"] for row in record["rows"]] == ["a", "dead"]
    dead = record["rows"][1]
    assert dead["status"] == "failed" and dead["error"] == "ValueError: burst" and dead["rank"] is None
    assert set(dead) == set(record["rows"][0])


def test_all_failed() -> None:
    record = ranked(entry("dead", failed=2))
    assert record["rows"][0]["status"] == "failed"
    assert record["winner"] is None and record["optimum"] is None and record["sensitivity"] is None


def test_a_method_that_lost_a_seed_does_not_win() -> None:
    top = entry("top", scores(FRONT + 0.2, 1, 0.1), failed=1)
    record = ranked(top, entry("low", scores(FRONT, 2, 0.1)))
    assert record["rows"][0]["status"] == "partial" and record["rows"][0]["error"] == "ValueError: burst"
    assert record["pairs"][0]["certain"] and record["winner"] is None


# --- seeds ------------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    shifts = (-0.1, 0.0, 0.15)
    three = entry("a", *(scores(FRONT + shift, noise=0.05) for shift in shifts))
    one = entry("b", scores(FRONT, noise=0.05))
    rows = {row["label"]: row for row in ranked(three, one)["rows"]}
    volumes = [hypervolume(FRONT + shift, [0, 0]) for shift in shifts]
    assert rows["a"]["hypervolume_by_seed"] == pytest.approx(volumes)
    assert rows["a"]["hypervolume"] == pytest.approx(np.mean(volumes))
    assert rows["a"]["hypervolume_median"] == pytest.approx(volumes[1])
    width = {label: row["ci"][1] - row["ci"][0] for label, row in rows.items()}
    assert width["a"] > 2 * width["b"]


def test_points_over_seeds() -> None:
    three = entry("a", *(scores(FRONT + shift, noise=0.05) for shift in (-0.1, 0.0, 0.1)))
    points = ranked(three)["rows"][0]["points"]
    assert [tuple(point["prefs"]) for point in points] == GRID
    assert np.array([point["mean"] for point in points]) == pytest.approx(FRONT)
    for point, mean in zip(points, FRONT, strict=True):
        for (lo, hi), value in zip(point["ci"], mean, strict=True):
            assert lo < value < hi and hi - lo > 0.1


def test_a_difference_is_that_of_the_numbers_that_are_ranked_whatever_seeds_they_are_of() -> None:
    """On the one seed that both have b is ahead, over all of them a: rank, difference and winner say the same."""
    a = entry("a", scores(FRONT - 0.2, 1, 0.01), scores(FRONT + 0.3, 2, 0.01), scores(FRONT + 0.3, 3, 0.01))
    b = entry("b", scores(FRONT, 1, 0.01))
    record = ranked(a, b)
    (pair,) = record["pairs"]
    first, second = record["rows"]
    assert (first["label"], pair["a"], pair["seeds"]) == ("a", "a", [0, 1, 2])
    assert pair["difference"] == pytest.approx(first["hypervolume"] - second["hypervolume"])
    assert pair["difference"] > 0 and record["winner"] is None, "a's seeds scatter too much to be sure"
    assert pair["inner_product"]["difference"] == pytest.approx(0.4 / 3)
    assert pair["probability_of_improvement"] is None  # one seed of b says nothing about its others


def test_how_often_a_seed_beats_a_seed_is_reported_beside_the_share_of_resamples() -> None:
    """Three seeds against two, worked by hand: of six pairs of seeds four are won; an equal one counts half."""
    a = entry("a", *(scores(FRONT + up) for up in (0.1, 0.2, 0.0)))
    b = entry("b", *(scores(FRONT + up) for up in (0.05, 0.0)))
    (pair,) = ranked(a, b)["pairs"]
    assert (pair["a"], pair["probability_of_improvement"]) == ("a", pytest.approx(4.5 / 6))
    assert pair["inner_product"]["probability_of_improvement"] == pytest.approx(4.5 / 6)


def test_seeds_that_scatter_widely_make_no_certain_lead() -> None:
    """Another method has other seeds: the spread of both counts, each with its own Student's t."""
    a = entry("a", *(scores(FRONT + up, noise=0.01) for up in (0.1, 0.2, 0.0)))
    b = entry("b", *(scores(FRONT + up, noise=0.01) for up in (0.0, 0.04)))
    (pair,) = ranked(a, entry("c", *(scores(FRONT, noise=0.01) for _ in range(3))))["pairs"]
    assert pair["a"] == "a" and not pair["certain"]
    (unpaired,) = ranked(a, replace(b, seeded=False))["pairs"]
    assert unpaired["ci"][1] - unpaired["ci"][0] > pair["ci"][1] - pair["ci"][0]


def test_a_method_without_training_stands_for_every_seed() -> None:
    three = entry("a", *(scores(FRONT + 0.2, seed, 0.05) for seed in range(3)))
    base = entry("base", scores(FRONT, 9, 0.05), seeded=False)
    record = ranked(three, base)
    (pair,) = record["pairs"]
    assert pair["seeds"] == [0, 1, 2]
    assert pair["probability_of_improvement"] == 1.0  # each of the three beats the one that stands for all
    assert pair["difference"] == pytest.approx(record["rows"][0]["hypervolume"] - record["rows"][1]["hypervolume"])
    assert record["winner"] == "a"


# --- the rest of a row ------------------------------------------------------------------------------------------


def test_the_reference_point_can_turn_the_ranking_round() -> None:
    """METRICS: {(.9,.2),(.2,.9)} against {(.6,.6)} gives .32 / .36 at 0 and 1.47 / 1.21 at -.5."""
    on = task(second=-0.5)
    wide = entry("wide", scores(np.array([[0.2, 0.9], [0.55, 0.0], [0.9, 0.2]])), on=on)
    middle = entry("middle", scores(np.array([[0.6, 0.6]] * 3)), on=on)
    record = ranked(wide, middle)
    assert [row["label"] for row in record["rows"]] == ["middle", "wide"]
    assert [row["hypervolume"] for row in record["rows"]] == pytest.approx([0.36, 0.32])
    assert [row["sensitivity_hypervolume"] for row in record["rows"]] == pytest.approx([1.21, 1.47])
    assert record["sensitivity"] == {
        "ref": [-0.5, -0.5],
        "ranking": ["wide", "middle"],
        "flips": True,
        "flipped": [["middle", "wide"]],
    }


def test_shares_of_a_known_optimum() -> None:
    best = FRONT + 0.2
    record = ranked(entry("a", scores(FRONT), on=task(best)))
    row, most = record["rows"][0], hypervolume(best, [0, 0])
    assert record["optimum"]["hypervolume"] == pytest.approx(most)
    assert row["optimal_share"] == pytest.approx(row["hypervolume"] / most)
    assert row["optimal_share_ci"] == pytest.approx([bound / most for bound in row["ci"]])
    assert record["igd_plus_to"] == "optimum"


def test_without_an_optimum_the_distance_is_to_the_best_of_all() -> None:
    high, low = FRONT + 0.1, FRONT - 0.1
    record = ranked(entry("high", scores(high)), entry("low", scores(low)))
    assert record["igd_plus_to"] == "union front" and record["optimum"] is None
    distances = [row["indicators"]["igd_plus"] for row in record["rows"]]
    assert distances == pytest.approx([0.0, indicators.igd_plus(low, high)])
    assert record["rows"][0]["optimal_share"] is None


@pytest.mark.parametrize(("peaks", "most"), [((300, 800), 800), ((300, None), None)])
def test_of_the_memory_of_answering_the_largest_counts(peaks: tuple[int | None, ...], most: int | None) -> None:
    both = entry("a", scores(FRONT), scores(FRONT, 1))
    for result, peak in zip(both.results, peaks, strict=True):
        result.cost.peak_memory_bytes = peak
    assert ranked(both)["rows"][0]["cost"]["answering"]["peak_memory_bytes"] == most


def test_cost_is_told_in_common_units() -> None:
    row = ranked(entry("a", scores(FRONT), scores(FRONT, 1)))["rows"][0]
    assert {key: row["cost"][key] for key in COST} == COST
    assert row["cost"]["answering"] == {
        "tokens_generated": 500,
        "reward_calls": 40,
        "seconds": 1.0,
        "peak_memory_bytes": None,
    }
    per = row["hypervolume_per_cost"]
    assert per["seconds"] == pytest.approx(row["hypervolume"] / 2) and per["tokens_trained"] is None


def test_other_preferences_are_marked() -> None:
    two = [GRID[0], GRID[2]]
    table = scores(FRONT[[0, 2]])
    own = entry("own", table, grid=two)
    record = ranked(own, entry("a", scores(FRONT)))
    assert {row["label"]: row["own_preferences"] for row in record["rows"]} == {"a": False, "own": True}


def test_evaluations_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(WorkError, match="b answered 40, a answered 60"):
        ranked(entry("a", scores(FRONT)), entry("b", scores(FRONT, prompts=40)))


def test_average() -> None:
    rows = [{"a": 1, "b": {"c": [1.0, 3.0]}, "d": None}, {"a": 2, "b": {"c": [3.0, 5.0]}, "d": 1.0}]
    assert average(rows) == {"a": 1.5, "b": {"c": [2.0, 4.0]}, "d": None}


def test_warnings_of_training_are_those_of_all_seeds_each_once() -> None:
    group = entry("a", scores(FRONT), scores(FRONT, 1))
    assert ranked(group)["rows"][0]["warnings"] == []
    group.finished[0].warnings, group.finished[1].warnings = ["flat"], ["flat", "flatter"]
    assert ranked(group)["rows"][0]["warnings"] == ["flat", "flatter"]


def test_diagnostics_are_averaged_over_the_seeds_that_have_them() -> None:
    group = entry("a", scores(FRONT), scores(FRONT, 1))
    first, second = group.finished
    first.diagnostics = {"kl": 1.0, "gate": 4}
    second.diagnostics = {"kl": 3.0, "broken": float("nan"), "words": "x"}
    row = ranked(group)["rows"][0]
    assert row["diagnostics"] == {"kl": 2.0, "gate": 4.0}


def test_held_out_preferences_and_the_gap_are_averaged_over_seeds() -> None:
    group = entry("a", scores(FRONT), scores(FRONT, 1))
    row = ranked(group)["rows"][0]
    assert row["generalisation"] is None and row["gap"] is None
    for number, result in enumerate(group.results):
        side = {**result.model_dump(include=set(Volume.model_fields)), "prefs": [(1.0, 0.0)], "hypervolume": number}
        side["indicators"] |= {"tau": 0.5, "inner_product": number}
        trained = Side(**{**side, "optimal_share": 0.5 + number, "utility_share": 0.75})
        result.generalisation = Generalisation(trained=trained, held_out=Side(**{**side, "optimal_share": None}))
        result.gap = 0.1 * number
    row = ranked(group)["rows"][0]
    assert row["gap"] == pytest.approx(0.05)
    assert row["generalisation"]["trained"] == {
        "preferences": 1,
        "hypervolume": 0.5,
        "optimal_share": 1.0,
        "utility_share": 0.75,
        "tau": 0.5,
        "inner_product": 0.5,
    }
    held_out = row["generalisation"]["held_out"]
    assert held_out["optimal_share"] is None and held_out["utility_share"] is None


def test_three_seeds_are_widened_by_students_t() -> None:
    """Seeds that differ by constants, prompts that do not matter: the interval is that of three numbers."""
    shifts = np.array([-0.05, 0.0, 0.05])
    flat = [np.repeat((FRONT + shift)[None], 60, axis=0) for shift in shifts]
    row = ranked(entry("a", *flat))["rows"][0]
    for (lo, hi), mean in zip(row["points"][1]["ci"], FRONT[1], strict=True):
        assert [lo, hi] == pytest.approx([mean - 4.302653 * 0.05 / np.sqrt(3), mean + 4.302653 * 0.05 / np.sqrt(3)])


# --- what preferences asked for -------------------------------------------------------------------------------------


def test_equal_fronts_asked_for_the_wrong_way_round() -> None:
    """Worked by hand: w.n is .8, .6, .8 for the one and .1, .6, .1 for the other; their hypervolumes are equal."""
    (pair,) = ranked(entry("right", scores(FRONT)), entry("wrong", scores(FRONT[::-1].copy())))["pairs"]
    assert pair["difference"] == pytest.approx(0, abs=1e-12) and not pair["certain"]
    inner = pair["inner_product"]
    assert (inner["a"], inner["b"], inner["certain"], inner["share_above_zero"]) == ("right", "wrong", True, 1.0)
    assert inner["difference"] == pytest.approx((0.8 + 0.6 + 0.8 - 0.1 - 0.6 - 0.1) / 3)
    assert inner["ci"] == pytest.approx([inner["difference"]] * 2)  # the prompts' noise is shared and cancels


@pytest.mark.slow
def test_the_interval_of_what_was_asked_for_is_that_of_a_mean_over_prompts() -> None:
    """The inner product is linear: its interval is that of the mean of each prompt's own difference."""
    of_a, of_b = scores(FRONT + 0.02, seed=1), scores(FRONT, seed=2)
    (pair,) = ranking([entry("a", of_a), entry("b", of_b)], GRID, 4000, SEED).content["pairs"]
    each = ((of_a - of_b) * np.array(GRID)).sum(axis=2).mean(axis=1)
    half = 1.96 * each.std(ddof=1) / np.sqrt(len(each))
    assert pair["inner_product"]["difference"] == pytest.approx(0.02)
    assert pair["inner_product"]["ci"] == pytest.approx([0.02 - half, 0.02 + half], abs=0.1 * half)


def test_what_was_asked_for_is_compared_over_all_seeds_of_each() -> None:
    both = [scores(FRONT + gain, seed=k) for k, gain in enumerate((0.0, 0.02, 0.04))]
    a, b = entry("a", *both), entry("b", scores(FRONT - 0.1, seed=0), scores(FRONT - 0.1, seed=1))
    (pair,) = ranked(a, b)["pairs"]
    assert pair["inner_product"]["seeds"] == [0, 1, 2]
    assert pair["inner_product"]["difference"] == pytest.approx(0.1 + 0.02)


def test_a_single_preference_has_no_tau() -> None:
    one = entry("one", scores(FRONT[1:2]), grid=GRID[1:2])
    (row,) = ranked(one)["rows"]
    assert row["indicators"]["tau"] is None and row["hypervolume"] > 0


def test_those_that_were_asked_other_preferences_are_not_compared_by_it() -> None:
    own = entry("own", scores(FRONT[:2]), grid=GRID[:2])
    (pair,) = ranked(entry("all", scores(FRONT)), own)["pairs"]
    assert pair["inner_product"] is None and pair["difference"] > 0

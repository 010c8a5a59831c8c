"""results/learned/reward_models.py: its statistics, what it goes on with, and its page."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.config import yaml_lines
from moalign.core.errors import RequestError
from moalign.reward_models.pairs import PairSet

FOLDER = Path(__file__).resolve().parents[1] / "results" / "learned"
sys.path.insert(0, str(FOLDER))
import reward_models as script  # noqa: E402
import reward_models_page as page  # noqa: E402
import reward_models_ranking as ranking  # noqa: E402
import reward_models_training as training  # noqa: E402

sys.path.remove(str(FOLDER))


@pytest.fixture
def spec() -> dict[str, Any]:
    return dict(yaml_lines.load(FOLDER / "reward_models.yaml").data)


NAMES = {
    "part": "-",
    "backbone": "sandbox",
    "layers": 2,
    "loss": "multitask",
    "pairs": 1000,
    "flipped": 0.0,
    "seed": 0,
}


def cell(part: str, **more: Any) -> dict[str, Any]:
    numbers = {"accuracy": 0.6, "ece": 0.05, "log_loss": 0.66, "by_chance": 0.02, "cpu_seconds": 36.0, "seconds": 40.0}
    truth = {"true_accuracy": 0.61, "true_ece": 0.04, "true_log_loss": 0.65, "parameters": 107_000}
    return {**NAMES, "part": part, **numbers, **truth, **more}


# -- statistics -----------------------------------------------------------------------------------------------------


def test_a_median_and_the_interval_of_the_mean_over_seeds() -> None:
    """Of 1..5: sd 1.5811, over sqrt 5 .7071, times Student's 2.7764 = 1.9632."""
    seeds = page.over_seeds([5, 1, 4, 2, 3])
    assert (seeds["median"], seeds["mean"], seeds["seeds"]) == (3, 3, 5)
    assert (seeds["lo"], seeds["hi"]) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert page.over_seeds([0.25]) == {"median": 0.25, "mean": 0.25, "lo": 0.25, "hi": 0.25, "seeds": 1}


def test_rank_correlations_by_hand() -> None:
    """1 2 3 4 against 1 3 2 4: five of six pairs agree, one does not; squared differences of ranks sum to 2."""
    x, y = np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])
    assert page.kendall(x, y) == pytest.approx(4 / 6)
    assert page.spearman(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert (page.kendall(x, -x), page.spearman(x, -x)) == pytest.approx((-1, -1))
    assert page.kendall(x, np.ones(4)) == page.spearman(x, np.ones(4)) == 0


def test_rank_correlations_are_those_of_scipy_with_ties() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 6, size=(2, 20)).astype(float)
        assert page.kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)
        assert page.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_a_partial_correlation_is_that_of_what_a_regression_leaves() -> None:
    from scipy.stats import rankdata

    rng = np.random.default_rng(1)
    given = rng.normal(size=30)
    x, y = given + rng.normal(size=30), given - rng.normal(size=30)
    design = np.stack([np.ones(30), rankdata(given)], axis=1)
    left = [rankdata(v) - design @ np.linalg.lstsq(design, rankdata(v), rcond=None)[0] for v in (x, y)]
    assert page.partial_spearman(x, y, given) == pytest.approx(np.corrcoef(*left)[0, 1])
    assert page.partial_spearman(given**3, y, given) == 0  # the same order: nothing is left of it


def test_an_interval_of_a_correlation_holds_it_and_depends_on_the_data_alone() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=24)
    y = x + 0.8 * rng.normal(size=24)
    interval = page.with_interval(page.spearman, x, y)
    assert interval == page.with_interval(page.spearman, x, y)
    assert 0 < interval["lo"] < interval["value"] < interval["hi"] <= 1
    # Fisher's interval, another way to the same: atanh(r) -+ 1.96 / sqrt(n - 3)
    low, high = np.tanh(np.arctanh(interval["value"]) + np.array([-1.96, 1.96]) / np.sqrt(21))
    assert (interval["lo"], interval["hi"]) == pytest.approx((low, high), abs=0.15)
    alike = page.with_interval(page.kendall, x, 2 * x)
    assert tuple(alike.values()) == pytest.approx((1, 1, 1))


# -- best-of-n ------------------------------------------------------------------------------------------------------


def test_the_best_of_n_by_a_reward_model_is_judged_by_the_truth() -> None:
    """One draw of three candidates: the corners take the first and the second, the middle the third."""
    scores = np.array([[[2.0, 0.0], [0.0, 2.0], [1.5, 1.5]]])
    truth = np.array([[[0.1, 0.0], [0.0, 0.2], [0.3, 0.4]]])
    grid = np.array([[1, 0], [0, 1], [0.5, 0.5]])
    np.testing.assert_allclose(ranking.best_of_n(scores, truth, grid), [[0.1, 0], [0, 0.2], [0.3, 0.4]])
    twice = ranking.best_of_n(np.tile(scores, (2, 1, 1)), np.concatenate([truth, 3 * truth]), grid)
    np.testing.assert_allclose(twice, 2 * np.array([[0.1, 0], [0, 0.2], [0.3, 0.4]]))


def test_reward_models_of_one_cell_share_no_labels_with_another(spec: dict[str, Any]) -> None:
    every = script.cells(spec, "ranking")
    assert len(every) >= 20
    assert len({ranking.seed_of(wanted) for wanted in every}) == len(every)


def test_policies_are_trained_on_models_from_end_to_end_of_the_range(spec: dict[str, Any]) -> None:
    models = [cell("ranking", seed=seed, ece=0.01 * seed) for seed in (3, 1, 4, 0, 5, 2, 8, 7, 6, 9, 10)]
    others = [cell("ranking", layers=1, ece=0.5)]
    wanted = ranking.chosen({"cells": models + others}, {**spec, "policies": {"count": 6}})
    assert [model["seed"] for model in wanted] == [0, 2, 4, 6, 8, 10]
    assert {model["part"] for model in wanted} == {"policies"}
    with pytest.raises(RequestError, match="first run the part ranking"):
        ranking.chosen({"cells": others}, spec)


def test_a_cells_card_is_the_one_its_policies_are_trained_on(spec: dict[str, Any], tmp_path: Path) -> None:
    wanted = script.cells(spec, "ranking")[1]
    people = ranking.sandbox_task(spec, ranking.card_settings(wanted), tmp_path).annotators
    assert (people.pairs, people.flipped, people.seed) == (wanted["pairs"], wanted["flipped"], ranking.seed_of(wanted))


# -- pairs and measures ---------------------------------------------------------------------------------------------


def test_dialogues_are_grouped_by_human_turns() -> None:
    turn = "\n\nHuman: a\n\nAssistant:"
    mixed = PairSet("mixed")
    for turns in (1, 3, 2, 5):
        mixed.add(turn * turns, f" yes {turns}", " no")
    groups = training.by_turns([mixed], 3)
    assert [(pairs.name, pairs.chosen) for pairs in groups] == [
        ("turns-1", [" yes 1"]),
        ("turns-2", [" yes 2"]),
        ("turns-3", [" yes 3", " yes 5"]),
    ]


def test_measures_are_means_over_groups_or_of_all_pairs_together() -> None:
    """Three pairs of which two are right, and one that is: accuracies 2/3 and 1, mean 5/6, together 3/4."""
    deltas = [np.array([1.0, 2.0, -1.0]), np.array([3.0])]
    sets = [PairSet("a", [""] * 3, [""] * 3, [""] * 3, [0.5, 0.75, 1.0]), PairSet("b", [""], [""], [""], [0.25])]
    apart, together = training.measures(deltas, sets), training.measures(deltas, sets, pooled=True)
    assert (apart["accuracy"], together["accuracy"]) == pytest.approx((5 / 6, 3 / 4))
    # By the true chances: .5, .75 and 0 of the first, .25 of the second.
    assert (apart["true_accuracy"], together["true_accuracy"]) == pytest.approx(((1.25 / 3 + 0.25) / 2, 1.5 / 4))
    assert together["log_loss"] == pytest.approx(np.log1p(np.exp([-1, -2, 1, -3])).mean())


def test_a_temperature_moves_the_calibration_error_and_no_answer() -> None:
    """Right with sigma(2) and twice as sure of it: the error is gone after the temperature 2; accuracy stays."""
    rng = np.random.default_rng(0)
    fair = np.abs(rng.normal(size=4000)) * 2
    right = rng.random(4000) < 1 / (1 + np.exp(-fair))
    sure = 2 * np.where(right, fair, -fair)
    sets = [PairSet("a", [""] * 2000, [""] * 2000, [""] * 2000)]
    numbers = training.measures([sure[:2000]], sets, [sure[2000:]])
    assert numbers["ece_scaled"] < 0.03 < 0.05 < numbers["ece"]
    assert numbers["accuracy"] == training.measures([sure[:2000] / 2], sets)["accuracy"]


# -- what is done and what is left ----------------------------------------------------------------------------------


def test_every_combination_is_a_cell_and_seed_0_comes_first(spec: dict[str, Any]) -> None:
    counts = {part: len(script.cells(spec, part)) for part in script.PARTS}
    smol, stories = 3, 3
    assert counts == {"ranking": 3 * 4 * 2 * 2, "sandbox": 3 * 2 * 3 * 5, "hh": (smol + stories) * 3 * 5}
    for part in script.PARTS:
        every = script.cells(spec, part)
        assert len({script.key(wanted) for wanted in every}) == len(every)
        assert [wanted["seed"] for wanted in every] == sorted(wanted["seed"] for wanted in every)
    first = script.cells(spec, "sandbox")[:3]
    assert {(wanted["layers"], wanted["pairs"]) for wanted in first} == {(1, 300)}


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        out=tmp_path, results=tmp_path / "results", parts=["ranking"], minutes=float("inf"), policies=False, page=False
    )


@pytest.fixture
def small(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "ranking": {**spec["ranking"], "layers": [2], "pairs": [300], "flipped": [0.0], "seeds": 3}}


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> list[int]:
    done: list[int] = []

    def work(wanted: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        if wanted["seed"] == fails_at:
            raise KeyboardInterrupt
        done.append(wanted["seed"])
        truth = {
            "share": 0.5,
            "inner_product": 0.6,
            "ceiling": {"share": 0.8, "inner_product": 0.9},
            "ece_scaled": 0.02,
        }
        return {name: value for name, value in {**cell("ranking"), **truth}.items() if name not in wanted}

    monkeypatch.setitem(script.WORK, "ranking", work)
    monkeypatch.setattr(page, "DRAWS", 20)
    return done


def test_the_same_command_goes_on_where_it_ended(
    options: argparse.Namespace,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = counted(monkeypatch, fails_at=2)
    with pytest.raises(KeyboardInterrupt):
        script.run(options, small)
    assert done == [0, 1]
    kept = json.loads((options.out / "reward_models.json").read_text())
    assert [wanted["seed"] for wanted in kept["cells"]] == [0, 1]
    more = counted(monkeypatch)
    script.run(options, small)
    assert more == [2]
    assert capsys.readouterr().out.endswith("0 cells are left\n")
    script.run(options, small)
    assert more == [2]
    assert (options.out / "reward_models.png").read_bytes().startswith(b"\x89PNG")


def test_parts_side_by_side_keep_each_others_cells(
    options: argparse.Namespace, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is read anew for each cell: what the other process has put there meanwhile stays."""
    path, lock = options.out / "reward_models.json", options.out / "lock"

    def work(wanted: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        script.keep(path, lock, small, cell("sandbox", seed=wanted["seed"]))
        return {"ece": 0.1}

    monkeypatch.setitem(script.WORK, "ranking", work)
    monkeypatch.setattr(script, "write_page", lambda *_: None)
    (options.results / "reward-models").mkdir(parents=True)
    script.run(options, small)
    kept = json.loads(path.read_text())["cells"]
    assert [(wanted["part"], wanted["seed"]) for wanted in kept] == [
        (part, seed) for seed in range(3) for part in ("sandbox", "ranking")
    ]


def test_a_cell_that_another_process_has_begun_or_kept_is_left_to_it(
    options: argparse.Namespace,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second, third = script.cells(small, "ranking")
    folder = options.results / "reward-models"
    folder.mkdir(parents=True)
    done: list[int] = []

    def work(wanted: Mapping[str, Any], *_: Any) -> dict[str, Any]:
        done.append(wanted["seed"])
        with script.taken(folder, third) as mine:
            assert mine
            script.keep(options.out / "reward_models.json", folder / "scaling.lock", small, cell(**third))
        return {"ece": 0.1}

    monkeypatch.setitem(script.WORK, "ranking", work)
    monkeypatch.setattr(script, "write_page", lambda *_: None)
    with script.taken(folder, first) as mine, script.taken(folder, first) as again:
        assert (mine, again) == (True, False)
        script.run(options, small)
    assert done == [second["seed"]], "the first is held, the third was kept meanwhile"
    assert capsys.readouterr().out.endswith("1 cells are left\n")
    script.run(options, small)
    assert done == [second["seed"], first["seed"]]


def test_no_cell_is_begun_after_its_minutes(
    options: argparse.Namespace,
    small: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done, options.minutes = counted(monkeypatch), 0.0
    script.run(options, small)
    assert done == []
    assert capsys.readouterr().out == "3 cells are left\n"
    assert "Too few yet" in (options.out / "reward_models.md").read_text(encoding="utf-8")


def test_a_record_takes_more_seeds_and_sizes_and_refuses_other_settings(
    options: argparse.Namespace, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = counted(monkeypatch)
    script.run(options, small)
    grown = {**small, "ranking": {**small["ranking"], "pairs": [300, 1000], "seeds": 4}}
    script.run(options, grown)
    assert len(done) == 8
    other = {**small, "ranking": {**small["ranking"], "n": 8}}
    with pytest.raises(RequestError, match="cells of ranking were made by other settings"):
        script.run(options, other)
    elsewhere = {**small, "hh": {**small["hh"], "passes": 9}}  # a part without cells: nothing to contradict
    script.run(options, elsewhere)


def test_a_backbone_that_is_not_there_is_left_out_and_said(
    options: argparse.Namespace,
    spec: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """stories260k is a folder of the machine's; the model that comes with the project is trained all the same."""
    monkeypatch.setenv("MOALIGN_SHARED", str(tmp_path))
    done: list[str] = []
    monkeypatch.setitem(script.WORK, "hh", lambda wanted, *_: done.append(wanted["backbone"]) or {})
    monkeypatch.setattr(script, "write_page", lambda *_: None)
    options.parts = ["hh"]
    script.run(options, {**spec, "hh": {**spec["hh"], "seeds": 1}})
    assert done == ["smollm2-135m"] * 9
    assert capsys.readouterr().out.startswith("hh: left out stories260k, which is not there; set MOALIGN_SHARED")


# -- the page -------------------------------------------------------------------------------------------------------


def test_a_table_has_medians_and_intervals_over_seeds_and_paired_differences() -> None:
    rows = [cell("sandbox", seed=seed, ece=ece) for seed, ece in enumerate((0.05, 0.07, 0.06))]
    rows += [cell("sandbox", seed=seed, ece=ece, loss="more") for seed, ece in ((2, 0.05), (0, 0.03), (7, 0.9))]
    table = page.scaling_table(rows, "sandbox")
    assert table[2].startswith(
        "| sandbox, 2 layers, 107 k | 1000 | multitask | 3 | 0.600 [0.600, 0.600] | 0.060 [0.035,"
    )
    assert len(table) == 4
    assert page.paired(rows[:3], rows[3:], "ece") == pytest.approx([-0.02, -0.01])  # seeds 0 and 2 alone
    assert (
        "| sandbox, 2 layers | 1000 | +0.0000 [+0.0000, +0.0000] | -0.0150 ["
        in page.difference_table(rows, "sandbox")[2]
    )
    assert page.scaling_table(rows, "hh") == ["None yet."]


def test_the_largest_size_less_the_smallest_is_paired_over_seeds() -> None:
    """Of layers 8, 15 and 30 the middle is left out; a seed that one lacks, too."""
    eces = {8: [0.05, 0.06, 0.10], 15: [0.5, 0.5, 0.5], 30: [0.02, 0.05]}
    cells = [
        cell("hh", backbone="smollm2", layers=layers, pairs=50, seed=seed, ece=ece)
        for layers, rows in eces.items()
        for seed, ece in enumerate(rows)
    ]
    head, _, row = page.size_table([*cells, cell("hh", backbone="one size")], "hh")
    assert head == "| largest - smallest | pairs a group | loss | accuracy | ECE | log loss |"
    assert row.startswith("| smollm2, 30 layers - 8 layers | 50 | multitask | +0.000 [+0.000, +0.000] | -0.020 [")
    assert page.size_table([cell("hh")], "hh") == []


def test_the_page_tells_correlations_by_the_measures_names(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse the more miscalibrated, at one accuracy: Kendall's tau of ECE is -1, and it stays at equal accuracy."""
    monkeypatch.setattr(page, "DRAWS", 50)
    ceiling = {"share": 0.8, "inner_product": 0.9}
    models = [
        cell("ranking", seed=seed, ece=0.02 * seed, ece_scaled=0.01, accuracy=accuracy, share=0.9 - 0.1 * seed,
             inner_product=0.5, ceiling=ceiling)
        for seed, accuracy in enumerate((0.6, 0.64, 0.61, 0.62, 0.6, 0.63))
    ]  # fmt: skip
    policies = [cell("policies", seed=1, share=0.123, inner_product=0.456, kl=7.0, tau=0.9)]
    people = [cell("hh", backbone="stories260k", seed=seed) for seed in (0, 1)]
    record = {"settings": spec, "cells": [*models, *policies, *people, cell("sandbox")]}
    text = page.markdown(record)
    assert "| ECE | -1.00 [-1.00, -1.00] | -1.00 [-1.00, -1.00] | -1.00" in text
    assert (
        "6 reward models (all); hypervolume, share of the optimum's: 0.40 to 0.90; by the exact rewards 0.80." in text
    )
    assert "| 1000 | 0% | 0.640 | 0.020 | 0.040 | 0.800 | 0.123 | 0.456 | 7.0 |" in text
    assert "{" not in text
    assert page.draw(record).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.skipif(not (FOLDER / "reward_models.json").is_file(), reason="not measured yet")
def test_the_committed_page_is_made_of_its_record() -> None:
    record = json.loads((FOLDER / "reward_models.json").read_text(encoding="utf-8"))
    assert (FOLDER / "reward_models.md").read_text(encoding="utf-8") == page.markdown(record)


# -- for real, small ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["bt", "multitask", "more"])
def test_a_cell_of_the_sandbox_for_real(
    loss: str, spec: dict[str, Any], random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "sandbox_base", lambda: random_base)
    mine = {**spec["sandbox"], "labelled": 40, "held_out": 30, "pairs": [20]}
    mine["settings"] = {**mine["settings"], "batch": 20}
    case = {**NAMES, "layers": 2, "loss": loss, "pairs": 20}
    numbers = training.of_sandbox(case, {"sandbox": mine}, tmp_path)
    assert 0.2 < numbers["accuracy"] < 0.8
    assert {"ece", "log_loss", "true_ece", "true_accuracy", "by_chance", "parameters"} <= set(numbers)
    # Hundreds of models would fill the disk: only the backbone stays.
    (kept,) = tmp_path.rglob("model.safetensors")
    assert kept.parent.name.startswith("sandbox-2-")


@pytest.mark.slow
def test_a_cell_of_people_adapts_the_last_layers_alone(
    spec: dict[str, Any], random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.reward_models import runs

    lines = [
        {side: "\n\nHuman: q" + f" {n}" + "\n\nAssistant: ok\n\nHuman: why" * (n % 3) + f"\n\nAssistant: {side}"
         for side in ("chosen", "rejected")}
        for n in range(200)
    ]  # fmt: skip
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requests: list[Any] = []
    obtain: Callable[..., Any] = runs.obtain
    monkeypatch.setattr(runs, "obtain", lambda request: requests.append(request) or obtain(request))
    how = {"model": str(random_base), "adapted": 1, "lora": {"r": 2, "alpha": 4}, "settings": {"lr": 1e-3}}
    mine = {**spec["hh"], "files": [str(tmp_path / "people.jsonl")], "turns": 3, "backbones": {"tiny": how}}
    mine["settings"] = {**mine["settings"], "batch": 15}
    case = {**NAMES, "backbone": "tiny", "layers": 2, "pairs": 32}
    numbers = training.of_people(case, {"hh": mine}, tmp_path)
    (states,) = (tmp_path / "reward-models" / "states").iterdir()
    texts = set(states.iterdir())
    assert 100 < len(texts) <= 2 * (3 * 32 + numbers["held_out"])  # two answers of every pair; few tokens, some alike
    training.of_people({**case, "loss": "more"}, {"hh": mine}, tmp_path)
    assert set(states.iterdir()) == texts, "another loss reads the same texts"
    assert requests[0].settings.lora.targets == r".*\.layers\.(1)\..*_proj"
    assert requests[0].steps == 6  # 96 pairs in 3 groups, 15 a step
    assert numbers["held_out"] > 20 and "true_ece" not in numbers

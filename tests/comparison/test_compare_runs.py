"""``compare`` of finished runs: what is compared, how entries are called, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moalign.comparison import compare as workflow
from moalign.comparison import entries, jobs
from moalign.comparison.compare import CompareRequest, compare
from moalign.comparison.result import CompareResult
from moalign.config.recipe import PolicySpec
from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.methods import registry
from moalign.runs.store import results_of
from tests.comparison.conftest import CARD, ask

pytestmark = pytest.mark.usefixtures("_toys")


# --- finished runs --------------------------------------------------------------------------------------------------


def runs_of(compared: CompareResult) -> list[str]:
    return [run["run"] for row in compared.content["rows"] for run in row["runs"]]


def test_runs_are_compared_by_folder_or_identifier(card: str, results: Path) -> None:
    first = ask(card, results)
    folders = runs_of(first)
    again = compare(CompareRequest(runs=[folders[0], Path(folders[1]).name], results=results))
    for key in ("rows", "pairs", "winner", "card_hash"):
        assert again.content[key] == first.content[key]


def test_the_results_folder_of_a_run_is_the_one_it_is_named_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``runs`` may be a link to another disk, whose own folder knows no scale; names stay as short as they are."""
    real = tmp_path / "scratch" / "runs" / "task" / "method" / "0123"
    real.mkdir(parents=True)
    home = tmp_path / "home" / "results"
    home.mkdir(parents=True)
    (home / "runs").symlink_to(real.parents[2])
    other = Path("otherwise")
    assert results_of(home / "runs/task/method/0123", other) == home
    monkeypatch.chdir(home.parent)
    assert results_of(Path("results/runs/task/method/0123"), other) == Path("results")
    (home.parent / "best").symlink_to(real)
    assert results_of(Path("best"), other) == (tmp_path / "scratch").resolve()
    monkeypatch.chdir(real.parent)
    assert results_of(Path("0123"), other) == (tmp_path / "scratch").resolve()
    assert results_of(tmp_path / "home", other) == other


@pytest.mark.parametrize("how", ["a name from inside", "a link", "a link below folders", "a copy"])
def test_runs_are_compared_wherever_their_folder_is_named_from(
    card: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each is judged on the scale of the results folder that it lies in, and no other scale is made."""
    first = ask(card, results)
    folders = [Path(folder).resolve() for folder in runs_of(first)]
    there = results.resolve()
    place = tmp_path / "elsewhere" / ("deep/er/still" if how == "a link below folders" else "")
    place.mkdir(parents=True)
    names = [str(place / f"run-{number}") for number in range(len(folders))]
    for folder, name in zip(folders, names, strict=True):
        if how == "a copy":
            shutil.copytree(folder, name)
        else:
            Path(name).symlink_to(folder)
    if how == "a name from inside":
        place, names = folders[0].parent, [folders[0].name, f"../{folders[1].parent.name}/{folders[1].name}"]
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    again = compare(CompareRequest(runs=names, results=there))
    assert set(place.iterdir()) == before
    for key in ("pairs", "winner", "card_hash"):
        assert again.content[key] == first.content[key]
    assert [row["hypervolume"] for row in again.content["rows"]] == [r["hypervolume"] for r in first.content["rows"]]


def test_the_benchmark_s_answers_are_asked_for_anew_each_time(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """results/bench/bench.py times them in a process of its own, after all else."""
    from tests.test_result_pages import RESULTS, script

    monkeypatch.syspath_prepend(RESULTS / "bench")
    (folder,) = runs_of(ask(card, results, methods=["good"]))
    bench, asked = script("bench/bench.py"), []
    given = evaluate.respond
    monkeypatch.setattr(evaluate, "respond", lambda *told: (asked.append(told), given(*told))[1])
    record = bench.inside(results, results, 2)
    assert record.keys() == {"grid", "one", "ratio"} and len(asked) == 6
    assert record["grid"]["responses"] == 3 * record["one"]["responses"] > 0
    assert not list(Path(folder).glob("unjudged-*"))


def test_a_run_named_twice_counts_once(card: str, results: Path) -> None:
    folders = runs_of(ask(card, results))
    assert len(compare(CompareRequest(runs=[*folders, folders[0]], results=results)).content["rows"]) == 2


def test_one_run_from_two_results_folders_is_no_second_seed(card: str, results: Path, tmp_path: Path) -> None:
    folders = runs_of(ask(card, results))
    shutil.copytree(results, tmp_path / "copy")
    twin = tmp_path / "copy" / Path(folders[0]).resolve().relative_to(results.resolve())
    with pytest.raises(RequestError, match=f"runs {folders[0]} and {twin} are of one request and seed; name one of"):
        compare(CompareRequest(runs=[*folders, str(twin)], results=results))


def test_settings_tell_runs_of_one_method_apart(card: str, results: Path) -> None:
    folders = [
        run
        for gain in (0.1, 0.2)
        for run in runs_of(ask(card, results, methods=["good"], seeds=2, overrides=[f"gain={gain}"]))
    ]
    compared = compare(CompareRequest(runs=folders, results=results))
    assert [row["label"] for row in compared.content["rows"]] == ["good (gain=0.2)", "good (gain=0.1)"]
    assert [row["seeds"] for row in compared.content["rows"]] == [[0, 1], [0, 1]]
    assert compared.content["winner"] == "good (gain=0.2)"


@pytest.mark.slow
def test_runs_of_one_method_that_differ_in_three_settings_have_labels_of_their_own(card: str, results: Path) -> None:
    """Every setting in which they differ is in the label: no two of six runs look alike."""
    settings = [
        f"gain={gain} tuning.rounds={rounds} fail_seed={seed}"
        for gain, rounds, seed in [(0.3, 4, 7), (0.3, 4, 8), (0.3, 2, 7), (0.2, 2, 7), (0.2, 2, 8), (0.2, 4, 8)]
    ]
    folders = [
        run for texts in settings for run in runs_of(ask(card, results, methods=["good"], overrides=texts.split()))
    ]
    compared = compare(CompareRequest(runs=folders, results=results))
    wanted = {text.replace(" ", ", ") for text in settings}
    assert {row["label"].removeprefix("good (").removesuffix(")") for row in compared.content["rows"]} == wanted


def test_defaults_that_an_identity_leaves_out_are_named_where_others_differ() -> None:
    identities: list[dict[str, Any]] = [
        {"config": {}, "policy": {}},
        {"config": {"gain": 5.0}, "policy": {}},
        {"config": {}, "policy": {"lora": {"r": 8}}},
    ]
    runs = [jobs.ComparedRun(registry.get("good"), 0, own, Path(f"run-{n}"), []) for n, own in enumerate(identities)]
    gain, rank = registry.get("good").Config().gain, PolicySpec().lora.r  # type: ignore[attr-defined]
    assert list(entries.grouped(runs)) == [
        f"good (gain={gain:g}, policy.lora.r={rank})",
        f"good (gain=5, policy.lora.r={rank})",
        f"good (gain={gain:g}, policy.lora.r=8)",
    ]


@pytest.mark.slow
def test_long_values_are_abbreviated_where_labels_stay_apart(card: str, results: Path) -> None:
    """A value is cut only where what is left tells it apart; numbers get the digits that they need."""

    def labels(*overrides: str) -> set[str]:
        folders = [run for text in overrides for run in runs_of(ask(card, results, methods=["good"], overrides=[text]))]
        return {row["label"] for row in compare(CompareRequest(runs=folders, results=results)).content["rows"]}

    assert labels("base=/elsewhere/in-a-long-folder", "base=/models/one") == {
        "good (base=/elsewhere/in-a…)",
        "good (base=/models/one)",
    }
    assert labels("base=/models/in-one-folder/small", "base=/models/in-one-folder/large") == {
        "good (base=/models/in-one-folder/small)",
        "good (base=/models/in-one-folder/large)",
    }
    assert labels("gain=0.1", "gain=0.10000001") == {"good (gain=0.1)", "good (gain=0.10000001)"}


def test_runs_that_only_their_vectors_tell_apart_have_labels_of_their_own(card: str, results: Path) -> None:
    vectors = [[[0.125, 0.875], [0.5, 0.5], [0.75, 0.25], [1.0, k / 10]] for k in range(2)]
    runs = [
        jobs.ComparedRun(
            registry.get("own-only"), 0, {"config": {}, "prefs": prefs, "seed": 0}, Path(f"{k}23456789"), []
        )
        for k, prefs in enumerate(vectors)
    ]
    assert list(entries.grouped(runs)) == [
        "own-only (prefs=[[0.125, 0.875]…) [023456]",
        "own-only (prefs=[[0.125, 0.875]…) [123456]",
    ]


def test_a_setting_at_its_default_is_named_with_its_value() -> None:
    """Also where a run's identity leaves it out, and where it lies deeper."""
    configs: list[dict[str, Any]] = [{}, {"gain": 0.5}, {"tuning": {"rounds": 9}}]
    runs = [
        jobs.ComparedRun(registry.get("good"), 0, {"config": config, "seed": 0}, Path(str(k)), [])
        for k, config in enumerate(configs)
    ]
    assert list(entries.grouped(runs)) == [
        "good (gain=0, tuning.rounds=4)",
        "good (gain=0.5, tuning.rounds=4)",
        "good (gain=0, tuning.rounds=9)",
    ]


def record_config(folder: str, config: Mapping[str, Any], without: str = "") -> None:
    """Let a run's record say that it was trained with other settings, as when these were the defaults."""
    path = Path(folder) / "run.json"
    record = json.loads(path.read_text())
    record["recipe"]["config"] |= config
    record["recipe"]["config"].pop(without, None)
    path.write_text(json.dumps(record))


def test_runs_trained_under_different_defaults_are_entries_of_their_own(card: str, results: Path) -> None:
    folders = runs_of(ask(card, results, methods=["good"], seeds=2))
    record_config(folders[0], {"gain": 3.0})
    compared = compare(CompareRequest(runs=folders, results=results))
    assert {row["label"]: row["seeds"] for row in compared.content["rows"]} == {
        "good (gain=3)": [0],
        "good (gain=0)": [1],
    }


def test_a_setting_that_only_one_record_has_keeps_no_runs_apart(card: str, results: Path) -> None:
    folders = runs_of(ask(card, results, methods=["good"], seeds=2))
    record_config(folders[0], {}, without="gain")
    compared = compare(CompareRequest(runs=folders, results=results))
    assert [(row["label"], row["seeds"]) for row in compared.content["rows"]] == [("good", [0, 1])]


def test_of_a_part_that_is_off_by_default_only_what_was_requested_is_named() -> None:
    """And what two entries that have it differ in, under other defaults."""

    def run(number: int, requested: Mapping[str, Any], recorded: Mapping[str, Any]) -> jobs.ComparedRun:
        made: Any = SimpleNamespace(record=SimpleNamespace(recipe={"config": recorded, "policy": {}}))
        identity = {"config": requested, "seed": number}
        return jobs.ComparedRun(registry.get("good"), number, identity, Path(str(number)), [], run=made)

    runs = [
        run(0, {}, {"gain": 0.0, "extra": None}),
        run(1, {"extra": {"steps": 3}}, {"gain": 0.0, "extra": {"steps": 3, "lr": 0.1}}),
    ]
    assert list(entries.grouped(runs)) == ["good (extra.steps=None)", "good (extra.steps=3)"]
    runs.append(run(2, {"extra": {"steps": 3}}, {"gain": 0.0, "extra": {"steps": 3, "lr": 0.2}}))
    assert list(entries.grouped(runs))[1:] == [f"good (extra.steps=3, extra.lr={lr})" for lr in (0.1, 0.2)]


def test_a_run_that_fits_two_entries_which_differ_joins_neither(card: str, results: Path) -> None:
    """Its record lacks the setting in which they differ, whatever the order in which the runs are named."""
    folders = runs_of(ask(card, results, methods=["good"], seeds=4))
    for folder in folders[:2]:
        record_config(folder, {"gain": 3.0})
    record_config(folders[2], {}, without="gain")
    for named in (folders, folders[::-1]):
        rows = compare(CompareRequest(runs=named, results=results)).content["rows"]
        assert sorted(row["seeds"] for row in rows) == [[0, 1], [2], [3]]
        assert len({row["label"] for row in rows}) == 3 and "good (gain=3)" in {row["label"] for row in rows}


def test_task_cards_are_not_mixed(card: str, results: Path, tmp_path: Path) -> None:
    folders = runs_of(ask(card, results, methods=["good"]))
    other = tmp_path / "other" / "task.yaml"
    other.parent.mkdir()
    other.write_text(CARD.replace("name: toy", "name: toy-2").replace("grid: 3", "grid: 4"), encoding="utf-8")
    folders += runs_of(ask(str(other), results, methods=["bad"]))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=folders, results=results))
    message = str(caught.value)
    assert "toy (card " in message and "toy-2 (card " in message and "they differ in name, grid" in message


def test_options_that_train_do_not_go_with_runs(card: str, results: Path) -> None:
    folders = runs_of(ask(card, results))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=folders, results=results, methods=["good"], seeds=2, overrides=["gain=1"]))
    assert all(option in str(caught.value) for option in ("--methods", "--seeds", "--set"))
    with pytest.raises(RequestError, match="the runs named are of task toy"):
        compare(CompareRequest(runs=folders, results=results, task="sandbox-3"))


def test_runs_that_are_not_done_or_not_there(card: str, results: Path) -> None:
    done, failed = runs_of(ask(card, results, overrides=["bad.fail=true"]))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=[done, failed, "nowhere"], results=results))
    assert "it is failed, not done" in str(caught.value) and "unknown run 'nowhere'" in str(caught.value)


def test_a_card_that_changed_since_is_refused(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card points to counts: every run that it concerns is named, and nothing is compared."""
    from moalign.tasks.sandbox import base

    folders = runs_of(ask(card, results))
    monkeypatch.setattr(base, "identity", lambda *_: "another base")
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=folders, results=results))
    assert str(caught.value).count("its task card has changed since") == 2


def test_runs_of_differing_normalisers_are_refused() -> None:
    runs: Any = [SimpleNamespace(bounds=((0.0,), (hi,)), folder=Path(f"results-{hi}")) for hi in (1.0, 1.0, 2.0)]
    workflow._require_same_bounds(runs[:2])
    with pytest.raises(RequestError, match="results-1.0 and results-2.0: their normalisers differ"):
        workflow._require_same_bounds(runs)


def test_a_seed_that_warns_is_named_where_the_mean_does_not_and_so_is_a_judge(card: str, results: Path) -> None:
    folders = runs_of(ask(card, results, methods=["good"], seeds=3))
    for number, folder in enumerate(folders):
        content = json.loads((Path(folder) / "eval.json").read_text())
        content["quality"] |= {"rate": 0.14 if number == 1 else 0.0, "mean_length": 10.0}
        content["judges"] = {"helpfulness": {"failure_rate": 0.4}} if number == 2 else None
        (Path(folder) / "eval.json").write_text(json.dumps(content))
    (row,) = compare(CompareRequest(runs=folders, results=results)).content["rows"]
    assert row["warnings"] == [
        "seed 1, 14 % of its responses are collapsed (short, repetitive or looping); read some before trusting its "
        "hypervolume",
        "seed 2, 40 % of the verdicts on helpfulness could not be read and are in no mean",
    ]
    content["quality"]["rate"] = 0.5
    (Path(folder) / "eval.json").write_text(json.dumps(content))
    (row,) = compare(CompareRequest(runs=folders, results=results)).content["rows"]
    assert not any("collapsed" in text for text in row["warnings"]), "the mean of the three says it"

"""``compare`` from request to files, on toy methods and finished runs made from score matrices; no model, no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from moalign.comparison import compare as workflow
from moalign.comparison import entries, executors, jobs
from moalign.comparison.compare import CompareRequest, Comparison, compare
from moalign.config.strict import Strict
from moalign.core.errors import RequestError, WorkError
from moalign.core.preferences import label
from moalign.evaluation import evaluate
from moalign.evaluation.divergence import KlToBase
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.report import drawings
from moalign.runs.record import RunRecord
from moalign.training.job import Job, RunContext

CARD = """
name: toy
kind: sandbox
description: scores made up by the tests
objectives:
  - {name: helpfulness, kind: sandbox}
  - {name: harmlessness, kind: sandbox}
sandbox: {base: warm}
normaliser:
  helpfulness: {mean: 0, sd: 1, lo: 0, hi: 1}
  harmlessness: {mean: 0, sd: 1, lo: 0, hi: 1}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
grid: 3
evaluation: {prompts: 40, samples: 1, seed: 5, bootstrap: 100}
suite: [good, bad]
"""


class Tuning(Strict):
    rounds: int = 4


class Config(Strict):
    gain: float = 0.0
    base: str = "/models/one-and-the-same-folder/small"
    tuning: Tuning = Tuning()
    fail: bool = False
    fail_seed: int | None = None


def toy(method: str, base: float = 0.0, config: type[Strict] = Config, **able: Any) -> Any:
    """A method whose mean scores are known: ``w + base + gain``, with noise that all methods share per prompt."""

    class Toy:
        name: ClassVar[str] = method
        summary: ClassVar[str] = "a toy"
        capabilities: ClassVar[Capabilities] = Capabilities(**able)
        Config: ClassVar[type[Strict]] = config

        def train(self, job: Job) -> None:
            if getattr(job.config, "fail", False) or getattr(job.config, "fail_seed", None) == job.seed:
                raise WorkError("the optimiser walked off")
            job.meter.add_tokens_trained(1000)

        def policy(self, context: RunContext, preference: Any) -> Any:
            raise AssertionError("the tests answer for it")

        def level(self, context: RunContext) -> float:
            return base + getattr(context.config, "gain", 0.0)

    return Toy()


class Settled(Strict):
    """A config without ``gain``."""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    toys = {
        "good": toy("good", 0.3),
        "bad": toy("bad", 0.0),
        "fixed": toy("fixed", 0.1, Settled, trains=False),
        "own-only": toy("own-only", 0.2, steerable=False),
    }
    monkeypatch.setattr(registry, "names", lambda: sorted(toys))
    monkeypatch.setattr(registry, "get", toys.__getitem__)
    monkeypatch.setattr(jobs, "HEAVY", ())
    monkeypatch.setattr(evaluate, "respond", respond)
    monkeypatch.setattr(drawings, "ALL", {"fronts": lambda record, suffix: FIGURES[suffix]})
    yield


FIGURES = {".png": b"\x89PNG a figure", ".svg": b"<?xml a figure"}
"""Stand in for drawings, which take seconds; one test below draws them all."""


def respond(
    method: Any, context: RunContext, asked: Any, progress: Any, samples: int
) -> tuple[pd.DataFrame, dict[str, int], list[KlToBase]]:
    prompts = context.task.eval_prompts
    noise = np.random.default_rng(3).normal(0, 0.3, (len(prompts), 2)) + 0.01 * context.run.record.seed
    rows = [
        {
            "prompt": prompt,
            "preference": label(w),
            "response": "one two three four five six",
            "helpfulness": w[0] + method.level(context) + noise[i, 0],
            "harmlessness": w[1] + method.level(context) + noise[i, 1],
        }
        for w in asked
        for i, prompt in enumerate(prompts)
        for _ in range(samples)
    ]
    return (
        pd.DataFrame(rows),
        {"tokens_generated": 6 * len(rows), "reward_calls": 2 * len(rows)},
        [KlToBase(None)] * len(asked),
    )


@pytest.fixture
def card(tmp_path: Path) -> str:
    path = tmp_path / "toy" / "task.yaml"
    path.parent.mkdir()
    path.write_text(CARD, encoding="utf-8")
    return str(path)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def ask(card: str, results: Path, **more: Any) -> Comparison:
    return compare(CompareRequest(**{"task": card, "results": results, **more}))


def by_label(compared: Comparison) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in compared.content["rows"]}


# --- training what is missing ---------------------------------------------------------------------------------------


def test_the_suite_is_trained_and_compared(card: str, results: Path) -> None:
    compared = ask(card, results)
    record = compared.content
    assert [row["method"] for row in record["rows"]] == ["good", "bad"]
    assert record["winner"] == "good" and compared.exit_code == 0 and record["failed"] == []
    assert (record["task"], record["objectives"], record["ref"]) == ("toy", ["helpfulness", "harmlessness"], [0.0, 0.0])
    assert record["verdict"][0].startswith("good wins")


def test_keys_of_the_contract(card: str, results: Path) -> None:
    record = ask(card, results).content
    wanted = "task card_hash objectives ref rows pairs winner optimum figure markdown sensitivity"
    assert set(wanted.split()) <= set(record)
    of_row = "method hypervolume ci rank indicators cost quality optimal_share seeds runs status"
    assert set(of_row.split()) <= set(record["rows"][0])
    assert {"tau", "inner_product", "expected_utility", "regret", "igd_plus"} <= set(record["rows"][0]["indicators"])
    cost = "tokens_generated tokens_trained reward_calls seconds peak_memory_bytes answering"
    assert set(cost.split()) <= set(record["rows"][0]["cost"])
    assert {"a", "b", "difference", "ci", "p_improve"} <= set(record["pairs"][0])
    assert record["optimum"]["hypervolume"] > 0


def test_files_are_written_and_named(card: str, results: Path) -> None:
    record = ask(card, results).content
    folder = Path(record["json"]).parent
    assert folder.parent == results / "compare" and folder.name.startswith("toy-")
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "compare.md", "fronts.png"]
    assert json.loads(Path(record["json"]).read_text()) == record
    assert Path(record["figure"]).read_bytes().startswith(b"\x89PNG")
    assert "](fronts.png)" in Path(record["markdown"]).read_text()


def test_places_of_the_users_choice(card: str, results: Path, tmp_path: Path) -> None:
    figure, page = tmp_path / "out" / "f.svg", tmp_path / "page.md"
    record = ask(card, results, figure=figure, markdown=page).content
    assert figure.read_bytes().startswith(b"<?xml") and record["figure"] == str(figure)
    assert "](out/f.svg)" in page.read_text()


def test_the_same_comparison_again_trains_nothing(card: str, results: Path) -> None:
    first = ask(card, results)
    before = {path: path.stat().st_mtime_ns for path in results.rglob("run.json")}
    again = ask(card, results)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("run.json")} == before
    assert again.content == first.content


def test_no_torch_is_needed_to_compare_what_is_there(card: str, results: Path) -> None:
    """The modules that compare uses do not import torch by themselves."""
    import subprocess

    code = "import sys, moalign.comparison.compare; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeds(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["good", "fixed"], seeds=3)
    rows = by_label(compared)
    assert rows["good"]["seeds"] == [0, 1, 2] and len(rows["good"]["hypervolume_by_seed"]) == 3
    assert rows["fixed"]["seeds"] == [0], "nothing is trained, so another seed is the same run"
    assert compared.content["pairs"][0]["seeds"] == [0, 1, 2]


def test_a_grid_of_its_own_size(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["good", "own-only"], grid=5)
    assert len(compared.content["grid"]) == 5
    for row in compared.content["rows"]:
        assert len(row["points"]) == 5 and not row["own_preferences"]


def test_more_answers_to_each_prompt(card: str, results: Path) -> None:
    """The same runs, other answers, a comparison of its own; the card's number spelt out is the plain one."""
    plain = ask(card, results, methods=["good", "own-only"]).content
    asked = ask(card, results, methods=["good", "own-only"], samples=3).content
    assert (plain["samples"], asked["samples"]) == (1, 3)
    assert asked["json"] != plain["json"] and "--samples 3" in asked["command"]
    assert [row["runs"][0]["run"] for row in asked["rows"]] == [row["runs"][0]["run"] for row in plain["rows"]]
    for one, other in zip(plain["rows"], asked["rows"], strict=True):
        assert other["hypervolume"] == pytest.approx(one["hypervolume"])  # the stand-in says the same each time
        assert other["cost"]["answering"]["tokens_generated"] == 3 * one["cost"]["answering"]["tokens_generated"]
    assert ask(card, results, methods=["good", "own-only"], samples=1).content["json"] == plain["json"]


def test_settings_go_to_the_methods_that_have_them(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["bad", "fixed", "good"], overrides=["gain=0.05", "bad.gain=0.9"])
    commands = {name: row["runs"][0]["command"] for name, row in by_label(compared).items()}
    assert "--set gain=0.05 --set gain=0.9" in commands["bad"]
    assert "--set gain=0.05" in commands["good"] and "--set" not in commands["fixed"]
    assert compared.content["winner"] == "bad"


def test_the_commands_ask_for_the_same_runs(card: str, results: Path) -> None:
    """What the page says about making a row again is true: the arguments plan the same run."""
    import shlex

    from moalign.experiment.train import TrainRequest, plan

    record = ask(card, results, methods=["own-only"], grid=4, overrides=["gain=0.25"]).content
    run = record["rows"][0]["runs"][0]
    words = shlex.split(run["command"])
    assert words[:3] == ["moalign", "train", "own-only"]
    options: dict[str, list[str]] = {}
    for name, value in zip(words[3::2], words[4::2], strict=True):
        options.setdefault(name, []).append(value)
    made = plan(
        TrainRequest(
            "own-only",
            task=options["--task"][0],
            prefs=options["--prefs"],
            overrides=options["--set"],
            seed=int(options["--seed"][0]),
            results=Path(options["--results"][0]),
        )
    )
    assert made.folder == Path(run["run"]) and made.existing_run is not None


def test_progress_names_whose_it_is(card: str, results: Path) -> None:
    said: list[str] = []
    compare(CompareRequest(task=card, results=results), lambda what, done, total: said.append(what))
    assert all(what.startswith(("good seed 0", "bad seed 0", "preparing")) for what in said)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failed_method_stays_visible(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["bad", "good", "fixed"], overrides=["bad.fail=true"])
    rows = by_label(compared)
    assert rows["bad"]["status"] == "failed" and rows["bad"]["error"] == "the optimiser walked off"
    assert rows["bad"]["runs"][0]["status"] == "failed"
    assert rows["good"]["rank"] == 1 and compared.content["winner"] == "good"
    assert compared.exit_code == 1 and compared.content["failed"] == ["bad"]
    assert "WorkError: the optimiser walked off" in compared.traces[0]
    page = Path(compared.content["markdown"]).read_text()
    assert "bad (failed)" in page and "the optimiser walked off" in page


def test_a_failed_seed_stays_visible(card: str, results: Path) -> None:
    compared = ask(card, results, seeds=2, overrides=["good.fail_seed=1"])
    good = by_label(compared)["good"]
    assert good["status"] == "partial" and good["seeds"] == [0]
    assert [run["status"] for run in good["runs"]] == ["done", "failed"]
    assert compared.content["pairs"][0]["certain"] and compared.content["winner"] is None
    assert compared.exit_code == 1


def test_everything_failed(card: str, results: Path) -> None:
    compared = ask(card, results, overrides=["fail=true"])
    assert compared.exit_code == 1 and compared.content["figure"] is None
    assert compared.content["verdict"][0] == "No method finished, so there is nothing to compare."
    assert Path(compared.content["markdown"]).is_file()


def test_a_failed_evaluation_fails_its_row(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_for_bad(method: Any, *rest: Any) -> Any:
        if method.name == "bad":
            raise WorkError("scorer helpfulness: sample 3: NaN")
        return respond(method, *rest)

    monkeypatch.setattr(evaluate, "respond", nan_for_bad)
    compared = ask(card, results)
    assert by_label(compared)["bad"]["error"] == "scorer helpfulness: sample 3: NaN" and compared.exit_code == 1


def test_an_interruption_is_not_a_failure(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.train, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(card, results)


# --- requests that are refused ------------------------------------------------------------------------------------


def refused(card: str, results: Path, **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        ask(card, results, **more)
    assert not results.exists() or not list(results.rglob("run.json")), "nothing may be trained"
    return str(caught.value)


def test_every_unknown_method_is_named(card: str, results: Path) -> None:
    said = refused(card, results, methods=["goood", "worse", "bad"], seeds=0)
    assert "unknown method 'goood'" in said and "did you mean 'good'" in said and "'worse'" in said
    assert "--seeds 0" in said


def test_every_setting_is_checked_before_anything_is_trained(card: str, results: Path) -> None:
    said = refused(card, results, overrides=["gian=1", "good.gain=much", "bad.fail=perhaps"])
    assert "gian" in said and "did you mean" in said and "much" in said and "perhaps" in said
    assert len(said.splitlines()) == len(set(said.splitlines()))


def test_a_malformed_setting(card: str, results: Path) -> None:
    assert "no '='" in refused(card, results, overrides=["gain"])


def test_a_card_without_suite(card: str, results: Path) -> None:
    Path(card).write_text(CARD.replace("suite: [good, bad]", ""), encoding="utf-8")
    assert "--methods" in refused(card, results)


def test_a_figure_of_an_unknown_kind(card: str, results: Path) -> None:
    assert ".png, .pdf, .svg" in refused(card, results, figure=Path("fronts.bmp"))


def test_a_place_that_cannot_be_written_is_refused_before_training(card: str, results: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write here" in refused(card, results, markdown=tmp_path / "file" / "page.md")
    assert "it is a folder" in refused(card, results, markdown=tmp_path)


# --- finished runs --------------------------------------------------------------------------------------------------


def runs_of(compared: Comparison) -> list[str]:
    return [run["run"] for row in compared.content["rows"] for run in row["runs"]]


def test_runs_are_compared_by_folder_or_identifier(card: str, results: Path) -> None:
    first = ask(card, results)
    found = runs_of(first)
    again = compare(CompareRequest(runs=[found[0], Path(found[1]).name], results=results))
    for key in ("rows", "pairs", "winner", "card_hash"):
        assert again.content[key] == first.content[key]


def test_a_run_named_twice_counts_once(card: str, results: Path) -> None:
    found = runs_of(ask(card, results))
    assert len(compare(CompareRequest(runs=[*found, found[0]], results=results)).result.content["rows"]) == 2


def test_settings_tell_runs_of_one_method_apart(card: str, results: Path) -> None:
    found = [
        run
        for gain in (0.1, 0.2)
        for run in runs_of(ask(card, results, methods=["good"], seeds=2, overrides=[f"gain={gain}"]))
    ]
    compared = compare(CompareRequest(runs=found, results=results))
    assert [row["label"] for row in compared.content["rows"]] == ["good (gain=0.2)", "good (gain=0.1)"]
    assert [row["seeds"] for row in compared.content["rows"]] == [[0, 1], [0, 1]]
    assert compared.content["winner"] == "good (gain=0.2)"


def test_runs_of_one_method_that_differ_in_three_settings_have_labels_of_their_own(card: str, results: Path) -> None:
    """Every setting in which they differ is in the label: no two of six runs look alike."""
    settings = [
        f"gain={gain} tuning.rounds={rounds} fail_seed={seed}"
        for gain, rounds, seed in [(0.3, 4, 7), (0.3, 4, 8), (0.3, 2, 7), (0.2, 2, 7), (0.2, 2, 8), (0.2, 4, 8)]
    ]
    found = [
        run for texts in settings for run in runs_of(ask(card, results, methods=["good"], overrides=texts.split()))
    ]
    compared = compare(CompareRequest(runs=found, results=results))
    wanted = {text.replace(" ", ", ") for text in settings}
    assert {row["label"].removeprefix("good (").removesuffix(")") for row in compared.content["rows"]} == wanted


def test_long_values_are_abbreviated_where_labels_stay_apart(card: str, results: Path) -> None:
    """A value is cut only where what is left tells it apart; numbers get the digits that they need."""

    def labels(*overrides: str) -> set[str]:
        found = [run for text in overrides for run in runs_of(ask(card, results, methods=["good"], overrides=[text]))]
        return {row["label"] for row in compare(CompareRequest(runs=found, results=results)).result.content["rows"]}

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
    works = [
        jobs.Work(registry.get("own-only"), 0, {"config": {}, "prefs": prefs, "seed": 0}, Path(f"{k}23456789"), [])
        for k, prefs in enumerate(vectors)
    ]
    assert list(entries.grouped(works)) == [
        "own-only (prefs=[[0.125, 0.875]…) [023456]",
        "own-only (prefs=[[0.125, 0.875]…) [123456]",
    ]


def test_a_setting_at_its_default_is_named_with_its_value() -> None:
    """Also where a run's identity leaves it out, and where it lies deeper."""
    configs: list[dict[str, Any]] = [{}, {"gain": 0.5}, {"tuning": {"rounds": 9}}]
    works = [
        jobs.Work(registry.get("good"), 0, {"config": config, "seed": 0}, Path(str(k)), [])
        for k, config in enumerate(configs)
    ]
    assert list(entries.grouped(works)) == [
        "good (gain=0, tuning.rounds=4)",
        "good (gain=0.5, tuning.rounds=4)",
        "good (gain=0, tuning.rounds=9)",
    ]


def test_task_cards_are_not_mixed(card: str, results: Path, tmp_path: Path) -> None:
    found = runs_of(ask(card, results, methods=["good"]))
    other = tmp_path / "other" / "task.yaml"
    other.parent.mkdir()
    other.write_text(CARD.replace("name: toy", "name: toy-2").replace("grid: 3", "grid: 4"), encoding="utf-8")
    found += runs_of(ask(str(other), results, methods=["bad"]))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=found, results=results))
    said = str(caught.value)
    assert "toy (card " in said and "toy-2 (card " in said and "they differ in name, grid" in said


def test_options_that_train_do_not_go_with_runs(card: str, results: Path) -> None:
    found = runs_of(ask(card, results))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=found, results=results, methods=["good"], seeds=2, overrides=["gain=1"]))
    assert all(option in str(caught.value) for option in ("--methods", "--seeds", "--set"))
    with pytest.raises(RequestError, match="the runs named are of task toy"):
        compare(CompareRequest(runs=found, results=results, task="sandbox-3"))


def test_runs_that_are_not_done_or_not_there(card: str, results: Path) -> None:
    done, failed = runs_of(ask(card, results, overrides=["bad.fail=true"]))
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=[done, failed, "nowhere"], results=results))
    assert "it is failed, not done" in str(caught.value) and "unknown run 'nowhere'" in str(caught.value)


def test_a_card_that_changed_since_is_refused(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card points to counts: every run that it concerns is named, and nothing is compared."""
    from moalign.tasks.sandbox import base

    found = runs_of(ask(card, results))
    monkeypatch.setattr(base, "identity", lambda *_: "another base")
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(runs=found, results=results))
    assert str(caught.value).count("its task card has changed since") == 2


def test_runs_of_differing_normalisers_are_refused() -> None:
    works: Any = [SimpleNamespace(bounds=((0.0,), (hi,)), folder=Path(f"results-{hi}")) for hi in (1.0, 1.0, 2.0)]
    workflow._same_bounds(works[:2])
    with pytest.raises(RequestError, match="results-1.0 and results-2.0: their normalisers differ"):
        workflow._same_bounds(works)


# --- processes ------------------------------------------------------------------------------------------------------


def planned(card: str, results: Path, **more: Any) -> list[jobs.Work]:
    return workflow.plan_all(CompareRequest(**{"task": card, "results": results, **more}))[0]


def test_jobs_are_trained_in_processes(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is told to train exactly the planned run, and its run is taken over."""
    seen: list[list[str]] = []
    here = {work.folder: work for work in planned(card, results)}

    def run(self: Any, command: list[str], progress: Any) -> tuple[int, str]:
        seen.append(command)
        work = next(work for work in here.values() if work.command == command)
        assert work.plan is not None
        jobs.train.train(work.plan)
        return 0, ""

    monkeypatch.setattr(executors.Processes, "run", run)
    compared = ask(card, results, jobs=2)
    assert sorted(command[1] for command in seen) == ["bad", "good"]
    assert compared.exit_code == 0 and compared.content["winner"] == "good"


@pytest.mark.parametrize(
    ("code", "messages", "error"),
    [
        (2, "step 3\nerror: the disk is full\n", "the disk is full"),
        (1, "Traceback\nValueError: burst", "ValueError: burst"),
        (-9, "", "its process ended without a word (killed by signal 9)"),
    ],
)
def test_a_process_that_fails_fails_its_run(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch, code: int, messages: str, error: str
) -> None:
    monkeypatch.setattr(executors.Processes, "run", lambda self, command, progress: (code, messages))
    compared = ask(card, results, jobs=2)
    assert [row["error"] for row in compared.content["rows"]] == [error, error]


def test_where_runs_are_trained_is_asked_of_the_executor(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here for one at a time, else by the executor; what stands against it is told with the other problems."""
    asked: list[tuple[str, int | None]] = []
    monkeypatch.setattr(jobs, "train_here", lambda works, progress: asked.append(("here", 1)))
    monkeypatch.setattr(jobs, "train_apart", lambda works, executor, count, progress: asked.append((executor, count)))
    for more in ({}, {"jobs": 1}, {"jobs": 3}, {"executor": "ray"}, {"executor": "ray", "jobs": 1}):
        monkeypatch.setattr(executors, "problems", lambda name: [])
        ask(card, results, **more)
    assert asked == [("here", 1), ("here", 1), ("local", 3), ("ray", None), ("ray", 1)]
    monkeypatch.undo()
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(task=card, results=results, methods=["goood"], executor="rya"))
    assert "did you mean 'ray'" in str(caught.value) and "'goood'" in str(caught.value)


def test_a_process_that_leaves_no_run(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.Processes, "run", lambda self, command, progress: (0, "all fine"))
    rows = ask(card, results, jobs=2).content["rows"]
    assert all("left no finished run" in row["error"] for row in rows)


def test_a_run_in_progress_elsewhere_is_waited_for_by_the_user(card: str, results: Path) -> None:
    work = planned(card, results)[0]
    assert work.plan is not None
    run = work.plan.store.open(
        "good", "toy", work.plan.identity, card_hash=work.plan.task.hash, seed=0, recipe={}, as_given={}
    )
    with run.lock(), pytest.raises(RequestError, match="is training this run; wait for it"):
        ask(card, results)
    assert [path.parent for path in results.rglob("run.json")] == [run.path], "nothing else was trained meanwhile"


def test_the_record_of_cost_is_taken_over(card: str, results: Path) -> None:
    row = by_label(ask(card, results))["good"]
    record = RunRecord.model_validate_json((Path(row["runs"][0]["run"]) / "run.json").read_text())
    assert row["cost"]["tokens_trained"] == record.cost.tokens_trained == 1000
    assert row["cost"]["peak_memory_bytes"] == record.cost.peak_memory_bytes > 0
    assert row["cost"]["answering"]["tokens_generated"] == 6 * 3 * 40


def test_a_fresh_peak_of_memory() -> None:
    """What an earlier run held is not in the next one's peak (where the system can tell)."""
    from moalign.runs.meter import process_peak_bytes

    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux lets a process begin a new peak")
    block = np.ones(40_000_000)
    high = process_peak_bytes()
    del block
    jobs.fresh_peak()
    assert process_peak_bytes() < high - 200_000_000

"""``compare`` from request to files, on toy methods; no model, no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moalign.comparison import jobs
from moalign.comparison.compare import CompareRequest, compare
from moalign.core.errors import RequestError, WorkError
from moalign.evaluation import evaluate
from moalign.methods import registry
from moalign.tasks.sandbox.task import SandboxTask
from moalign.tasks.task import Task
from tests.comparison.conftest import CARD, ask, by_label, respond

pytestmark = pytest.mark.usefixtures("_toys")


# --- training what is missing ---------------------------------------------------------------------------------------


def test_the_suite_is_trained_and_compared(card: str, results: Path) -> None:
    compared = ask(card, results)
    record = compared.content
    assert [row["method"] for row in record["rows"]] == ["good", "bad"]
    assert record["winner"] == "good" and not compared.failed and record["failed"] == []
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
    assert {"a", "b", "difference", "ci", "share_above_zero"} <= set(record["pairs"][0])
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


@pytest.mark.slow
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
    requested = ask(card, results, methods=["good", "own-only"], samples=3).content
    assert (plain["samples"], requested["samples"]) == (1, 3)
    assert requested["json"] != plain["json"] and "--samples 3" in requested["command"]
    assert [row["runs"][0]["run"] for row in requested["rows"]] == [row["runs"][0]["run"] for row in plain["rows"]]
    for one, other in zip(plain["rows"], requested["rows"], strict=True):
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
    message: list[str] = []
    compare(CompareRequest(task=card, results=results), lambda what, done, total: message.append(what))
    assert all(what.startswith(("good seed 0", "bad seed 0", "preparing")) for what in message)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failed_method_stays_visible(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["bad", "good", "fixed"], overrides=["bad.fail=true"])
    rows = by_label(compared)
    assert rows["bad"]["status"] == "failed" and rows["bad"]["error"] == "the optimiser walked off"
    assert rows["bad"]["runs"][0]["status"] == "failed"
    assert rows["good"]["rank"] == 1 and compared.content["winner"] == "good"
    assert compared.failed and compared.content["failed"] == ["bad"]
    assert "WorkError: the optimiser walked off" in compared.traces[0]
    page = Path(compared.content["markdown"]).read_text()
    assert "bad (failed)" in page and "the optimiser walked off" in page


def test_a_failed_seed_stays_visible(card: str, results: Path) -> None:
    compared = ask(card, results, seeds=2, overrides=["good.fail_seed=1"])
    good = by_label(compared)["good"]
    assert good["status"] == "partial" and good["seeds"] == [0]
    assert [run["status"] for run in good["runs"]] == ["done", "failed"]
    assert compared.content["pairs"][0]["certain"] and compared.content["winner"] is None
    assert compared.failed


def test_everything_failed(card: str, results: Path) -> None:
    compared = ask(card, results, overrides=["fail=true"])
    assert compared.failed and compared.content["figure"] is None
    assert compared.content["verdict"][0] == "No method finished, so there is nothing to compare."
    assert Path(compared.content["markdown"]).is_file()


def test_a_failed_evaluation_fails_its_row(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nan_for_bad(method: Any, *rest: Any) -> Any:
        if method.name == "bad":
            raise WorkError("scorer helpfulness: sample 3: NaN")
        return respond(method, *rest)

    monkeypatch.setattr(evaluate, "respond", nan_for_bad)
    compared = ask(card, results)
    assert by_label(compared)["bad"]["error"] == "scorer helpfulness: sample 3: NaN" and compared.failed


def test_a_method_that_exits_has_failed_and_the_others_go_on(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(self: object, job: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(type(registry.get("bad")), "train", leave)
    compared = ask(card, results)
    assert by_label(compared)["bad"]["error"] == "SystemExit: 0" and compared.failed
    assert by_label(compared)["good"]["status"] == "done"


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
    message = refused(card, results, methods=["goood", "worse", "bad"], seeds=0)
    assert "unknown method 'goood'" in message and "did you mean 'good'" in message and "'worse'" in message
    assert "--seeds 0" in message


def test_every_setting_is_checked_before_anything_is_trained(card: str, results: Path) -> None:
    message = refused(card, results, overrides=["gian=1", "good.gain=much", "bad.fail=perhaps"])
    assert "gian" in message and "did you mean" in message and "much" in message and "perhaps" in message
    assert len(message.splitlines()) == len(set(message.splitlines()))


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("gian=1", ["did you mean 'gain'?"]),
        ("config.gian=1", ["did you mean 'config.gain'?"]),
        ("quick.gian=1", ["did you mean 'quick.gain'?"]),
        ("rounds=1", ["did you mean 'tuning.rounds'?"]),
        ("goood.gain=1", ["did you mean 'good.gain'?"]),
        ("goood.rounds=1", ["did you mean 'good.tuning.rounds'?"]),
        ("sed=1", ["did you mean 'seed'?"]),
        ("foo=1", []),
        ("own-only.gain=1", ["own-only is not among the methods compared (bad, good, fixed); name one"]),
    ],
)
def test_a_setting_that_no_method_has_is_refused_once(card: str, results: Path, option: str, texts: list[str]) -> None:
    message = refused(card, results, methods=["bad", "good", "fixed"], overrides=[option])
    assert len(message.splitlines()) == 1
    assert message.startswith(f"--set {option.split('=')[0]}: ") and all(text in message for text in texts)
    listed = ["gain", "tuning", "policy.KEY", "task.KEY", "METHOD.KEY for one alone (METHOD: bad, good, fixed)"]
    assert "own-only" in option or all(text in message for text in listed)


def test_settings_of_the_quick_budget_go_to_the_methods_that_have_them(card: str, results: Path) -> None:
    compared = ask(card, results, methods=["fixed", "good"], overrides=["quick.gain=0.05"])
    commands = {name: row["runs"][0]["command"] for name, row in by_label(compared).items()}
    assert "--set quick.gain=0.05" in commands["good"] and "--set" not in commands["fixed"]


def test_an_unknown_method_of_the_suite_has_its_line(card: str, results: Path) -> None:
    text = f"{CARD}quick_suite:\n  - good\n  - bda\n".replace("[good, bad]", "[good, goood]")
    Path(card).write_text(text, encoding="utf-8")
    line = len(text.splitlines())
    assert refused(card, results, suite="quick") == (
        f"{card}:{line}: quick_suite.1: unknown method 'bda'; allowed: bad, fixed, good, own-only; did you mean 'bad'?"
    )
    assert refused(card, results).startswith(f"{card}:{line - 3}: suite.1: unknown method 'goood'; ")
    option = ["task.suite=[good, bda]"]
    assert refused(card, results, overrides=option).startswith("--set task.suite: suite.1: unknown method 'bda'; ")


def test_a_malformed_setting(card: str, results: Path) -> None:
    assert "no '='" in refused(card, results, overrides=["gain"])


def test_a_card_without_suite(card: str, results: Path) -> None:
    Path(card).write_text(CARD.replace("suite: [good, bad]", ""), encoding="utf-8")
    assert "--methods" in refused(card, results)


def test_a_card_may_have_a_quick_suite(card: str, results: Path) -> None:
    Path(card).write_text(f"{CARD}quick_suite: [bad]\n", encoding="utf-8")
    quick, full = ask(card, results, suite="quick"), ask(card, results)
    assert (list(by_label(quick)), sorted(by_label(full))) == (["bad"], ["bad", "good"])
    assert "--suite quick" in quick.command and "--suite" not in full.command
    assert quick.card_hash == full.card_hash


def test_a_suite_that_is_none(card: str, results: Path) -> None:
    assert "its card names no quick_suite; name the methods with --methods" in refused(card, results, suite="quick")
    assert "unknown suite 'quik'; allowed: full, quick; did you mean 'quick'?" in refused(card, results, suite="quik")
    assert "--suite quick: --methods says" in refused(card, results, suite="quick", methods=["good"])
    run = ask(card, results).entries[0].runs[0].run
    with pytest.raises(RequestError, match="--suite: finished runs are named"):
        ask(card, results, suite="quick", task=None, runs=[run])


def test_runs_on_bases_of_other_weights_are_refused(card: str, results: Path) -> None:
    """The sandbox's base is trained on each machine: a run that was made on another one answered from another base."""
    first = ask(card, results)
    folders = [Path(run.run) for entry in first.entries for run in entry.runs]
    for folder, base in zip(folders, ("aaaa", "bbbb"), strict=True):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        record["notes"]["base"] = base
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RequestError, match=r"their bases have other weights \(aaaa, bbbb\): each machine trains"):
        ask(card, results)
    record["notes"]["base"] = "aaaa"
    (folders[1] / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert ask(card, results).winner == first.winner


def test_a_run_on_another_machines_base_is_refused_before_the_others_are_trained(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = ask(card, results, methods=["good"]).entries
    path = Path(entry.runs[0].run) / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**record, "notes": {"base": "aaaa"}}), encoding="utf-8")

    def here(self: Task) -> tuple[str, None]:
        self.base_sum = "bbbb"
        return "nowhere", None

    monkeypatch.setattr(SandboxTask, "base_source", here)
    monkeypatch.setattr(jobs, "train_missing", lambda *told: pytest.fail("trained"))
    with pytest.raises(RequestError, match=r"trained on a base of other weights \(aaaa\) than this machine's \(bbbb\)"):
        ask(card, results)


def test_a_figure_of_an_unknown_kind(card: str, results: Path) -> None:
    assert ".png, .pdf, .svg" in refused(card, results, figure=Path("fronts.bmp"))


def test_a_place_that_cannot_be_written_is_refused_before_training(card: str, results: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot write here" in refused(card, results, markdown=tmp_path / "file" / "page.md")
    assert "it is a folder" in refused(card, results, markdown=tmp_path)


def test_one_method_cannot_have_a_task_of_its_own(card: str, results: Path) -> None:
    text = refused(card, results, overrides=["good.task.reference_point=[-2, -2]"])
    assert text == (
        "--set good.task.reference_point=[-2, -2]: the task is one for all methods; write task.reference_point=[-2, -2]"
    )

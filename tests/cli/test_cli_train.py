"""``moalign train`` as typed: plans, outcomes, finding finished runs, and every wrong request."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moalign.runs import record as records
from moalign.runs.store import RunStore

pytestmark = pytest.mark.usefixtures("toys")


def only_run() -> Any:
    (run,) = RunStore("results").runs()
    return run


def test_it_ends_with_folder_rewards_hypervolume_and_next_commands(moalign: Any) -> None:
    ended = moalign("train", "toy")
    assert ended.code == 0
    run = only_run()
    assert "toy on sandbox, seed 0: done" in ended.out
    assert str(run.path) in ended.out
    assert "0.5,0.5" in ended.out and "hypervolume" in ended.out and "optimal share" in ended.out
    assert f"  moalign eval {run.path} --hypervolume\n" in ended.out
    assert "  moalign compare --task sandbox\n" in ended.out
    assert f"  moalign generate {run.path} --prefs 0.3,0.7\n" in ended.out
    assert ended.err.startswith(f"training toy on sandbox, seed 0: {run.path}\n")
    assert "a library that prints" in ended.err and "a library that prints" not in ended.out


def test_json_is_one_object_with_the_contract_s_keys(moalign: Any) -> None:
    content = json.loads(moalign("train", "toy", "--json", "--seed", "4", "--set", "steps=2").out)
    run = only_run()
    assert content["run"] == str(run.path)
    assert (content["method"], content["task"], content["seed"], content["status"]) == ("toy", "sandbox", 4, "done")
    assert set(content["cost"]) == {"tokens_generated", "tokens_trained", "reward_calls", "peak_memory_bytes"}
    assert content["cost"]["tokens_trained"] == 11
    assert content["seconds"] > 0
    assert content["found"] is False
    assert content["notes"]["dropped"] == 2 and set(content["notes"]) <= {"dropped", "base"}
    assert len(content["evaluation"]["points"]) == 11
    assert content["evaluation"]["hypervolume"] > 0


def test_the_same_command_finds_the_finished_run_and_its_evaluation(moalign: Any) -> None:
    first = json.loads(moalign("train", "toy", "--json").out)
    (Path(first["run"]) / "responses.parquet").unlink()  # a second evaluation would need it or make it again
    ended = moalign("train", "toy", "--json")
    again = json.loads(ended.out)
    assert again["found"] is True
    assert again["evaluation"] == first["evaluation"]
    assert ended.err == ""
    assert "found finished, nothing to train" in moalign("train", "toy").out
    assert not (Path(first["run"]) / "responses.parquet").exists()


@pytest.mark.slow
def test_no_eval_trains_only_and_a_later_call_evaluates(moalign: Any) -> None:
    content = json.loads(moalign("train", "toy", "--no-eval", "--json").out)
    assert content["evaluation"] is None
    assert not (Path(content["run"]) / "eval.json").exists()
    assert "moalign eval" in moalign("train", "toy", "--no-eval").out
    later = json.loads(moalign("train", "toy", "--json").out)
    assert later["found"] is True
    assert later["evaluation"] is not None


def test_a_method_with_fixed_preferences_is_evaluated_on_its_own(moalign: Any) -> None:
    ended = moalign("train", "fixed-toy", "--prefs", "0,1", "--prefs", "1,0")
    assert ended.code == 0
    assert "--prefs 1,0\n" in ended.out  # the command offered is one that the run can serve
    content = json.loads(moalign("train", "fixed-toy", "--prefs", "0,1", "--prefs", "1,0", "--json").out)
    assert content["found"] is True
    assert [point["prefs"] for point in content["evaluation"]["points"]] == [[0.0, 1.0], [1.0, 0.0]]


def test_a_task_without_a_suite_names_the_run_as_what_to_compare(moalign: Any) -> None:
    """Its card says of no other method: ``compare --task`` would be refused."""
    ended = moalign("train", "toy", "--set", "task.suite=[]")
    (line,) = [line.strip() for line in ended.out.splitlines() if "moalign compare" in line]
    assert line == f"moalign compare {only_run().path}"
    assert moalign(*line.split()[1:]).code == 0


def test_the_command_that_a_run_records_finds_it(moalign: Any) -> None:
    """It has the seed and the preferences as options, also where ``--set`` gave them."""
    moalign("train", "fixed-toy", "--set", "seed=5", "--set", "prefs=[[1,0]]", "--no-eval")
    run = only_run()
    words = records.again(run.record.as_given, run.record.seed, run.record.preferences, Path("results"))
    assert words[-4:-2] == ["--seed", "5"] and "seed=5" in words
    assert json.loads(moalign(*words, "--no-eval", "--json").out)["found"] is True


def test_zero_below_zero_is_zero(moalign: Any) -> None:
    """One preference is one run."""
    first, second = (
        json.loads(moalign("train", "toy", "--dry-run", "--json", f"--prefs={w},1").out) for w in ("0", "-0.0")
    )
    assert first["run"] == second["run"]


def test_a_home_folder_in_results_is_the_user_s(moalign: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves ``--results=~/x`` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    told = json.loads(moalign("train", "toy", "--dry-run", "--json", "--results=~/x").out)
    assert told["run"].startswith(f"{tmp_path}/home/x/runs/")


def test_commands_to_paste_carry_the_results_folder(moalign: Any) -> None:
    assert "moalign compare --task sandbox --results other" in moalign("train", "toy", "--results", "other").out
    ended = moalign("train", "toy", "--set", "task.grid=3", "--set", "steps=2")  # with another card: another task
    assert "  moalign compare --task sandbox --set task.grid=3\n" in ended.out


# -- the plan --------------------------------------------------------------------------------


def test_dry_run_tells_everything_and_writes_nothing(moalign: Any, tmp_path: Path) -> None:
    ended = moalign("train", "toy", "--dry-run", "--prefs", "0.3,0.7", "--set", "steps=9", "--seed", "5")
    assert ended.code == 0
    for text in ("toy (does nothing, quickly)", "helpfulness, harmlessness", "0.3,0.7", "does not exist yet"):
        assert text in ended.out
    assert any(line.split() == ["config.steps", "9"] for line in ended.out.splitlines())
    assert any(line.split() == ["seed", "5"] for line in ended.out.splitlines())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dry_run_as_json_names_the_folder_that_training_makes(moalign: Any) -> None:
    plan = json.loads(moalign("train", "toy", "--dry-run", "--json").out)
    assert (plan["dry_run"], plan["status"], plan["prefs"]) == (True, None, None)
    assert plan["config"] == {"steps": 3, "fail": ""}
    content = json.loads(moalign("train", "toy", "--json").out)
    assert (content["run"], content["card_hash"]) == (plan["run"], plan["card_hash"])
    assert json.loads(moalign("train", "toy", "--dry-run", "--json").out)["status"] == "done"
    assert "is finished" in moalign("train", "toy", "--dry-run").out


# -- failures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "code", "status", "error"),
    [
        ("work", 1, "failed", ["it broke"]),
        ("bug", 1, "failed", ["ZeroDivisionError: it broke here; the same command with --debug shows where"]),
        ("interrupt", 130, "interrupted", []),
    ],
)
def test_what_goes_wrong_is_told_and_recorded(
    moalign: Any, fail: str, code: int, status: str, error: list[str]
) -> None:
    ended = moalign("train", "toy", "--set", f"fail={fail}", "--json")
    assert (ended.code, ended.out, ended.errors) == (code, "", error)
    assert only_run().status == status
    assert f"resuming the {status} run of toy on sandbox" in moalign("train", "toy", "--set", f"fail={fail}").err


def test_a_request_that_the_method_refuses_leaves_no_run(moalign: Any) -> None:
    ended = moalign("train", "toy", "--set", "fail=request", "--json")
    assert (ended.code, ended.out, ended.errors) == (2, "", ["it broke"])
    assert RunStore("results").runs() == []


def test_a_run_that_another_process_trains_is_refused(moalign: Any) -> None:
    moalign("train", "toy", "--set", "fail=interrupt")
    with only_run().lock():
        ended = moalign("train", "toy", "--set", "fail=interrupt")
    assert ended.code == 2
    assert f"another process (pid {os.getpid()}" in ended.errors[0]


# -- wrong requests --------------------------------------------------------------------------------

NO_MODEL = "{name: harmlessness, kind: hf-classifier, model: nobody/nothing}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefs", "3,7"], "--prefs 3,7: the weights sum to 10, not 1; did you mean --prefs 0.3,0.7?"),
        (["--prefs", "1"], "--prefs 1: 1 weight, but the task has 2 objectives (helpfulness, harmlessness)"),
        (["--prefs", "0.2,0.3,0.5"], "3 weights, but the task has 2 objectives"),
        (["--prefs", "-0.5,1.5"], "the weight of helpfulness is negative"),
        (["--prefs", "a,b"], "'a' is not a number; give 2 weights that sum to 1"),
        (["--prefs", "nan,1"], "the weight of helpfulness is nan; a finite number is needed"),
        (["--prefs", "0_1,0"], "'0_1' is not a number"),
        (["--prefs", "0,1", "--grid", "3"], "--prefs and --grid exclude each other"),
        (["--seed", "3", "--set", "seed=5"], "--seed and --set seed=5 contradict each other; give one of them"),
        (["--prefs", "0,1", "--set", "prefs=[[1,0]]"], "--prefs and --set prefs=[[1,0]] contradict each other"),
        (["--grid", "3", "--set", "prefs=[[1,0]]"], "--grid and --set prefs=[[1,0]] contradict each other"),
        (["--snapshots", "3", "--set", "snapshots=5"], "--snapshots and --set snapshots=5 contradict each other"),
        (["--results", ""], "empty; the name of a folder is needed"),
        (["--results", "r\udcc3"], "not text in this locale; set PYTHONUTF8=1"),
        (["--task", "sandbx"], "unknown task 'sandbx'"),
        (["--task", "nowhere/task.yaml"], "nowhere/task.yaml"),
        (["--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "step=3"], "--set step: unknown setting"),
        (["--set", "step=3"], "did you mean 'steps'?"),
        (["--set", "steps=many"], "--set steps: config.steps: found 'many'; allowed: a whole number"),
        (["--set", "steps"], "--set steps"),
        (["--set", "task.grd=3"], "did you mean 'grid'?"),
        (["--set", f"task.objectives.1={NO_MODEL}"], "hub model 'nobody/nothing' is not in the local cache"),
    ],
)
def test_wrong_requests_are_one_message_and_leave_nothing(
    moalign: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ended = moalign("train", "toy", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert message in ended.err
    assert len(ended.errors) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_method_names_the_nearest(moalign: Any) -> None:
    ended = moalign("train", "rick")
    assert ended.code == 2
    assert ended.errors[0].startswith("unknown method 'rick'; allowed: bapo, best-of-n,")
    assert ended.errors[0].endswith("did you mean 'ric'?")


def test_three_errors_of_a_recipe_come_together_with_their_lines(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "method: toy\ntask: sandbox\nsed: 1\npolicy: {lora: {r: 0}}\nconfig:\n  step: 2\n"
    )
    ended = moalign("train", "toy", "--recipe", "bad.yaml")
    assert ended.code == 2
    assert [problem.split(": ")[0] for problem in ended.errors] == ["bad.yaml:3", "bad.yaml:4", "bad.yaml:6"]
    assert "did you mean 'seed'?" in ended.errors[0]
    assert "did you mean 'steps'?" in ended.errors[2]


def test_a_recipe_of_another_method_is_refused(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("method: ric\ntask: sandbox\n")
    ended = moalign("train", "toy", "--recipe", "r.yaml")
    assert ended.code == 2
    assert "it is a recipe of ric, but the method asked for is toy" in ended.errors[0]


def test_results_below_a_file_are_refused_before_anything_is_trained(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    ended = moalign("train", "toy", "--results", "file/results")
    assert ended.code == 2
    assert "cannot write here" in ended.errors[0] and "--results DIR" in ended.errors[0]
    assert "training 3/3" not in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_results_folder_is_refused(moalign: Any, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    ended = moalign("train", "toy", "--results", "locked")
    folder.chmod(0o700)
    assert ended.code == 2
    assert "locked" in ended.errors[0] and "--results DIR" in ended.errors[0]


def test_a_full_disk_is_a_request_error_that_names_the_folder(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "rename", full)
    monkeypatch.setattr(os, "replace", full)
    results = Path("results").absolute()
    ended = moalign("train", "toy")
    assert ended.code == 2
    assert "No space left on device" in ended.errors[0] and "--results DIR" in ended.errors[0]
    monkeypatch.undo()  # the change of folder, too
    assert list(results.rglob("run.json")) == []


@pytest.mark.slow
def test_a_real_method_end_to_end(moalign: Any) -> None:
    ended = moalign("train", "best-of-n", "--set", "n=2", "--set", "task.evaluation.prompts=32")
    assert ended.code == 0
    assert "best-of-n on sandbox, seed 0: done" in ended.out
    assert "Loading weights" not in ended.err and "Warning" not in ended.err


@pytest.mark.slow
def test_prompts_that_were_cut_are_in_the_record_and_told(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.tasks.task import Task

    cut = {"prompts": 40, "cut": 3, "cut_tokens": 1234}
    monkeypatch.setattr(Task, "overlong_report", lambda self: cut)
    content = json.loads(moalign("train", "toy", "--json").out)
    assert content["notes"]["overlong"] == content["evaluation"]["overlong"] == cut
    shown = "prompts           3 of 40 cut to generation.max_prompt_tokens, 1,234 tokens in all"
    assert " ".join(shown.split()) in " ".join(moalign("train", "toy").out.split())
    assert " ".join(shown.split()) in " ".join(moalign("eval", content["run"]).out.split())
    monkeypatch.setattr(Task, "overlong_report", lambda self: {"prompts": 40, "dropped": 2})
    assert "2 of 40 dropped: longer than generation.max_prompt_tokens" in " ".join(
        moalign("train", "toy", "--seed", "1").out.split()
    )

"""``moalign bench`` as typed: a table or one JSON object, what is refused, and that nothing stays behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from moalign.cli.main import Terminated
from moalign.comparison import bench as workflow
from moalign.comparison.timed import Stamp, Timing, TimingRequest, measured


@pytest.fixture
def nothing_left(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; it is empty again afterwards."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def sets(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


@pytest.mark.slow  # its parts, without processes: tests/comparison/test_bench.py
def test_methods_are_measured_and_one_fails(moalign: Any, small_task: tuple[str, ...], nothing_left: Path) -> None:
    """In earnest, with two processes beside the one that prepares."""
    wanted = sets(*small_task, "mo-odpo.batch=4", "mo-odpo.samples=2", "paretohqd.min_pool=99999")
    ended = moalign("bench", "mo-odpo", "paretohqd", "--steps", "3", *wanted, "--json")
    assert ended.code == 1, ended.err
    content = json.loads(ended.out)
    assert (content["task"], content["steps"], content["failed"]) == ("sandbox", 3, ["paretohqd"])
    assert content["machine"]["cpu"] and content["machine"]["torch"] and content["machine"]["threads"] == 1
    row, failed = content["rows"]
    assert (row["method"], row["status"], row["error"], row["steps_measured"]) == ("mo-odpo", "done", None, 2)
    for key in ("seconds_per_step", "tokens_generated_per_second", "tokens_trained_per_second", "start_seconds"):
        assert row[key] > 0, key
    assert row["responses_scored_per_second"] > 0
    assert row["import_seconds"] < row["start_seconds"] < row["seconds"]
    assert row["peak_memory_bytes"] == row["peak_host_bytes"] > 100 * 2**20 and row["peak_gpu_bytes"] is None
    assert failed["status"] == "failed" and "min_pool = 99999" in failed["error"]
    assert failed["seconds_per_step"] is None
    assert list(Path().iterdir()) == [] and list(nothing_left.iterdir()) == []


@pytest.mark.slow
def test_a_text_task_is_measured(moalign: Any, random_base: Path, nothing_left: Path) -> None:
    Path("task.yaml").write_text(
        f"name: own\nkind: text\ndescription: a test\nmodel: {random_base}\n"
        "data: {prompts: {path: prompts.jsonl}}\n"
        "objectives: [{name: short, kind: rule, rule: brevity}, {name: distinct, kind: rule, rule: distinct-n}]\n"
        "normaliser: {short: {mean: 0, sd: 1, lo: -1, hi: 1}, distinct: {mean: 0, sd: 1, lo: -1, hi: 1}}\n"
        "reference_point: [0, 0]\nsensitivity_point: [-0.1, -0.1]\ngrid: 3\n"
        "generation: {max_new_tokens: 8}\npool: {prompts: 20, per_prompt: 2}\nsuite: [prompting, sft, rewarded-soups]\n"
    )
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {k} ?"}) + "\n" for k in range(60)))
    before = sorted(Path().iterdir())
    wanted = sets("sft.steps=3", "sft.batch=4", "sft.max_tokens=48", "experts.batch=4")
    ended = moalign("bench", "--task", "task.yaml", "--steps", "2", *wanted, "--json")
    assert ended.code == 0, ended.out
    sft, soups = json.loads(ended.out)["rows"]
    assert sft["seconds_per_step"] > 0 and sft["tokens_generated_per_second"] is None
    assert soups["steps_measured"] == 2, "one stretch for each expert"
    assert sorted(Path().iterdir()) == before and list(nothing_left.iterdir()) == []


def answer(request: TimingRequest, title: str, progress: Any) -> Timing:
    """Stands in for a process: RiC has two stages, MOC failed, and prompting trains nothing."""
    if request.method == "moc":
        return Timing(row=request.row(status="failed", error="no room"), trace="Traceback: no room")
    if request.method == "prompting":
        return Timing(row=request.row(status="done", start_seconds=3.0))
    stamps = [
        Stamp(run="a", phase=phase, step=step, at=at, tokens_trained=1500 * step, tokens_generated=0, reward_calls=0)
        for phase, step, at in (("offline", 1, 0.0), ("offline", 2, 0.5), ("round-1", 1, 3.0), ("round-1", 2, 4.0))
    ]
    row = request.row(status="done", **measured(stamps, 2), start_seconds=3.2, peak_host_bytes=600 * 2**20)
    return Timing(row=row)


def test_the_table(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "_timed_apart", answer)
    ended = moalign("bench", "ric", "moc", "prompting")
    assert ended.code == 1
    lines = ended.out.splitlines()
    assert lines[0].split() == ["task", "sandbox,", "8", "steps", "of", "every", "stage"]
    head = next(line for line in lines if line.startswith("method"))
    assert " ".join(head.split()) == "method s/step generated/s trained/s scored/s host peak GPU peak start"
    ric = next(line for line in lines if line.startswith("ric"))
    assert "offline 0.500, round 1.000" in ric and "2.00 k" in ric and "600 MiB" in ric and "3.2 s" in ric
    assert any(line.startswith("moc (failed)") for line in lines)
    assert lines[-1] == "prompting: no update step to measure; it trains nothing (steps: 0?)"
    assert ended.errors == ["moc failed: no room"] and "Traceback" not in ended.err
    assert moalign("bench", "ric", "moc", "--json").errors == ["moc failed: no room"]
    assert "Traceback: no room" in moalign("bench", "ric", "moc", "--debug").err


@pytest.mark.parametrize(
    ("stop", "code", "how"), [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")]
)
def test_an_interruption_says_that_nothing_is_kept(
    moalign: Any, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], code: int, how: str
) -> None:
    def interrupted(*_: Any) -> Any:
        raise stop

    monkeypatch.setattr(workflow, "_timed_apart", interrupted)
    ended = moalign("bench", "ric", "--json")
    assert (ended.code, ended.out, ended.err) == (code, "", f"{how}; a bench keeps nothing\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rick"], "unknown method 'rick'; allowed: bapo, best-of-n,"),
        (["rick"], "did you mean 'ric'?"),
        (["ric", "--task", "sandbx"], "did you mean 'sandbox'?"),
        (["ric", "--steps", "1"], "'--steps'"),
        (["ric", "--set", "offline.stps=3"], "did you mean 'steps'"),
        (["ric", "--step", "3"], "unknown option --step; did you mean '--steps'?"),
    ],
)
def test_wrong_requests_are_one_message(moalign: Any, arguments: list[str], message: str) -> None:
    ended = moalign("bench", *arguments, "--json")
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert message in ended.errors[0]

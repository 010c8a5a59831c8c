"""``moalign compare`` as typed: what is asked for, what is printed, how it ends."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from moalign.comparison import compare as workflow
from moalign.comparison.result import CompareResult, Entry


class Asked:
    """Stands in for the workflow: keeps the request, gives a small answer."""

    def __init__(self, failed: bool = False) -> None:
        self.failed = failed
        self.request: Any = None

    def __call__(self, request: workflow.CompareRequest, progress: Any) -> CompareResult:
        self.request = request
        print("chatter")
        entry = Entry(method="x", label="x", status="failed", seeded=True, runs=[], error="no room")
        return CompareResult(
            task="sandbox",
            card_hash="abc",
            objectives=("a", "b"),
            reference_point=(0.0, 0.0),
            grid=(),
            samples=1,
            draws=100,
            level=0.95,
            entries=[entry] if self.failed else [],
            pairs=[],
            winner=None,
            sensitivity=None,
            optimum=None,
            igd_plus_to="union front",
            failed=["x"] if self.failed else [],
            command="moalign compare",
            traces=["a trace"],
        )


def test_options_become_one_request(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requested = Asked()
    monkeypatch.setattr(workflow, "compare", requested)
    options = "--task sandbox --methods sft,ric,sft --seeds 3 --grid 5 --jobs 2 --set steps=4 --results r --json"
    options += " --executor ray"
    ended = moalign("compare", *options.split(), "--figure", "f.png", "--markdown", "m.md")
    assert ended.code == 0
    printed = json.loads(ended.out)
    assert (printed["task"], printed["failed"]) == ("sandbox", []) and "traces" not in printed
    request = requested.request
    assert (request.task, tuple(request.methods), request.seeds, request.grid, request.jobs) == (
        "sandbox",
        ("sft", "ric"),
        3,
        5,
        2,
    )
    assert request.executor == "ray"
    assert (tuple(request.overrides), request.results) == (("steps=4",), Path("r"))
    assert (request.figure, request.markdown) == (Path("f.png"), Path("m.md"))


def test_where_nothing_is_trained_jobs_change_nothing(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "compare", Asked())
    ended = moalign("compare", "one", "two", "--jobs", "2", "--json")
    assert ended.code == 0 and json.loads(ended.out)["task"] == "sandbox"
    note = "note: --jobs 2: finished runs are named, so nothing is trained; it changes nothing"
    assert ended.err.splitlines() == [note, "chatter"]
    assert "note" not in moalign("compare", "--jobs", "2", "--json").err


def test_a_run_that_failed_makes_the_exit_code_1(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "compare", Asked(failed=True))
    ended = moalign("compare", "--json")
    assert ended.code == 1
    assert json.loads(ended.out)["failed"] == ["x"]
    assert ended.err == "chatter\nerror: x failed: no room\n"
    assert "a trace" in moalign("compare", "--json", "--debug").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sft,,ric"], "--methods sft,,ric: an empty name"),
        (["--methods", "rick"], "did you mean 'ric'?"),
        (["--task", "sandbx"], "did you mean 'sandbox'?"),
        (["nothing"], "unknown run 'nothing'"),
        (["--seeds", "0"], "'--seeds'"),
        (["--executor", "rey"], "unknown executor 'rey'; allowed: local, ray; did you mean 'ray'?"),
        (["--htm", "x.html"], "unknown option --htm"),
    ],
)
def test_wrong_requests(moalign: Any, arguments: list[str], message: str) -> None:
    ended = moalign("compare", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_seeds_go_on_from_the_one_that_is_set(moalign: Any, toys: None) -> None:
    content = json.loads(moalign("compare", "--methods", "toy", "--seeds", "2", "--set", "seed=5", "--json").out)
    runs = content["rows"][0]["runs"]
    assert [run["seed"] for run in runs] == [5, 6]
    for run in runs:  # and the commands that are told find them
        assert json.loads(moalign(*shlex.split(run["command"])[1:], "--json").out)["run"] == run["run"]


def test_two_files_of_one_name_are_refused(moalign: Any, toys: None) -> None:
    run = json.loads(moalign("train", "toy", "--json").out)["run"]
    ended = moalign("compare", run, "--markdown", "same.html", "--html", "./same.html")
    assert ended.code == 2
    assert ended.errors == ["--markdown same.html: --html is to be written there, too; name another"]
    assert not Path("same.html").exists()


def test_without_ray_there_is_one_message(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = moalign("compare", "--methods", "sft", "--executor", "ray")
    assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
    assert ended.errors[0].startswith("--executor ray: the package ray is not installed; pip install ray")
    assert list(Path().iterdir()) == []


def test_toys_are_compared_end_to_end(moalign: Any, toys: None) -> None:
    small = ["--set", "task.evaluation.bootstrap=100"]
    ended = moalign("compare", "--methods", "toy", *small, "--json")
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert {"task", "rows", "pairs", "winner"} <= set(content)
    assert [row["method"] for row in content["rows"]] == ["toy"]
    text = moalign("compare", "--methods", "toy", *small)
    assert text.code == 0
    assert "toy" in text.out
    tail = text.out.split("next:\n")[1]
    best = content["rows"][0]["runs"][0]["run"]
    assert f"moalign generate {best} --prefs 0.3,0.7" in tail
    assert "moalign eval" in tail
    elsewhere = moalign("compare", best, "--results", "elsewhere").out.split("next:\n")[1]
    for line in elsewhere.splitlines()[:3]:
        assert moalign(*line.split()[1:]).code == 0, line

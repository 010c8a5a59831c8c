"""A results folder in which something is damaged or unreadable: one message for what is, all verbs for the rest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DAMAGE: dict[str, bytes | None] = {
    "empty": b"",
    "null": b"null",
    "a list": b"[1, 2]",
    "an object": b"{}",
    "nested deeply": b"[" * 100_000,
    "nested, valid": b'{"a":' * 800 + b"1" + b"}" * 800,
    "a long number": b'{"version": ' + b"9" * 5000 + b"}",
    "binary": bytes(range(256)) * 4,
    "a folder": None,
}


def damage(path: Path, kind: str) -> None:
    """Put something else in the place of ``path``; ``half``: keep the first half, ``dangling``: a link to nothing."""
    content = path.read_bytes() if path.is_file() else b""
    path.unlink(missing_ok=True)
    if kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "a loop":
        path.symlink_to(path.name)
    elif kind == "half":
        path.write_bytes(content[: len(content) // 2])
    elif (new := DAMAGE[kind]) is None:
        path.mkdir()
    else:
        path.write_bytes(new)


KINDS = [*DAMAGE, "half", "dangling", "a loop"]
SMALL = [
    part
    for text in ("grid=3", "evaluation.prompts=8", "evaluation.samples=1", "evaluation.bootstrap=100")
    for part in ("--set", f"task.{text}")
]
SUITE = ("compare", "--methods", "toy", "--seeds", "2", *SMALL)
AGAIN = ("train", "toy", "--seed", "1", *SMALL)
Damaged = Callable[..., Any]


@pytest.fixture
def good(moalign: Any, toys: None) -> str:
    """The identifier of a finished run that nothing happens to; seed 1 is the one that is damaged."""
    made = [json.loads(moalign("train", "toy", "--seed", str(k), "--json", *SMALL).out)["run"] for k in (0, 1)]
    Path("bad").symlink_to(Path(made[1]).absolute())
    shutil.copytree("results", "sound")
    return Path(made[0]).name


@pytest.fixture
def damaged(moalign: Any, good: str) -> Damaged:
    """``damaged("run.json", "half", "show", "BAD")``: how a command ends when one file of the run BAD is damaged."""
    bad = Path("bad").resolve()

    def run(name: str, kind: str, *command: str) -> Any:
        shutil.rmtree("results")
        shutil.copytree("sound", "results")
        damage(bad / name, kind)
        ended = moalign(*({"BAD": bad.name, "GOOD": good}.get(word, word) for word in command))
        assert "--debug shows where" not in ended.err, (name, kind, command)
        return ended

    return run


def refused(ended: Any, file: str) -> None:
    """One message that names the damaged file and what to do; nothing on stdout."""
    assert (ended.code, ended.out, len(ended.errors)) == (2, "", 1), ended
    assert file in ended.errors[0]
    assert any(word in ended.errors[0] for word in ("move", "remove", "delete")), ended.errors[0]


def test_one_damaged_record_is_one_line_and_the_others_are_listed(damaged: Damaged, good: str) -> None:
    for kind in KINDS:
        ended = damaged("run.json", kind, "ls", "runs", "--json")
        assert ended.code == 0, kind
        assert [row["run_id"] for row in json.loads(ended.out)["runs"]] == [good]
        (line,) = ended.err.splitlines()
        assert line.startswith("warning: run left out: ") and "run.json" in line
        refused(damaged("run.json", kind, "show", "BAD"), "run.json")


def test_a_damaged_record_refuses_what_asks_for_its_run_and_nothing_else(damaged: Damaged) -> None:
    prefs = ("--prefs", "1,0")
    for command in (("eval", "BAD"), ("generate", "BAD", "hi ?", *prefs), ("compare", "GOOD", "BAD"), SUITE, AGAIN):
        refused(damaged("run.json", "nested deeply", *command), "run.json")
    refused(damaged("run.json", "half", "export", "BAD", *prefs, "--out", "out"), "run.json")
    ended = damaged("run.json", "null", "eval", "--hypervolume", "--json")
    assert (ended.code, json.loads(ended.out)["seed"]) == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {}},
        {"recipe": {"card": None}},
        {"recipe": {"card": {"name": "x"}, "config": {}, "policy": {}}},
        {"environment": {"gpus": 3, "packages": 3}},
        {"as_given": {}},
    ],
)
def test_a_record_that_lacks_a_part_or_is_an_old_one(damaged: Damaged, moalign: Any, change: dict[str, Any]) -> None:
    """What the layout allows, but this version cannot use: named as the record's fault wherever it is needed."""
    assert damaged("metrics.jsonl", "empty", "ls", "runs").code == 0
    path = Path("bad/run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    listed = json.loads(moalign("ls", "runs", "--json").out)["runs"]
    assert len(listed) == 2
    codes = []
    for command in (("show",), ("eval",), ("generate", "hi ?", "--prefs", "1,0"), ("compare", listed[1]["run_id"])):
        ended = moalign(command[0], path.resolve().parent.name, *command[1:])
        assert "--debug shows where" not in ended.err, command
        codes.append(ended.code)
        if ended.code:
            refused(ended, "run.json")
    assert 2 in codes


def test_a_damaged_evaluation_is_one_line_and_can_be_made_again(damaged: Damaged, moalign: Any) -> None:
    for kind in set(KINDS) - {"a folder", "dangling", "a loop"}:
        ended = damaged("eval.json", kind, "ls", "runs", "--json")
        assert (ended.code, len(json.loads(ended.out)["runs"]), len(ended.err.splitlines())) == (0, 2, 1)
        refused(damaged("eval.json", kind, "show", "BAD"), "moalign eval")
    for command in (("eval", "BAD"), ("compare", "GOOD", "BAD"), SUITE, AGAIN):
        refused(damaged("eval.json", "nested deeply", *command), "eval.json")
    refused(damaged("eval.json", "a folder", "eval", "BAD"), "eval.json")  # before anything is answered
    Path("bad/eval.json").rmdir()
    assert moalign("eval", Path("bad").resolve().name).code == 0


def test_damaged_answers_are_named_with_the_file_that_was_made_from_them(damaged: Damaged, moalign: Any) -> None:
    for kind in ("empty", "binary", "half", "a folder", "dangling"):
        ended = damaged("responses.parquet", kind, "eval", "BAD")
        assert (ended.code, len(ended.errors)) == (2, 1)
        assert "responses.parquet" in ended.errors[0]
    shutil.rmtree("results")
    shutil.copytree("sound", "results")
    table = Path("bad/responses.parquet")
    import pandas as pd

    for change in (lambda frame: frame[:-1], lambda frame: frame.drop(columns="helpfulness"), lambda _: [1]):
        pd.DataFrame(
            change(pd.read_parquet(Path("sound") / table.resolve().relative_to(Path("results").resolve())))
        ).rename(columns=str).to_parquet(table)
        ended = moalign("eval", Path("bad").resolve().name)
        refused(ended, "responses.parquet: not the answers that eval.json was made from")


def test_damaged_metrics_lock_and_owner_stop_nobody_who_reads(damaged: Damaged) -> None:
    for kind in KINDS:
        for name in ("metrics.jsonl", ".lock", ".owner.json"):
            ended = damaged(name, kind, "ls", "runs", "--json")
            assert (ended.code, len(json.loads(ended.out)["runs"])) == (0, 2)
    for kind in ("a folder", "a loop", "binary"):
        ended = damaged("metrics.jsonl", kind, "compare", "GOOD", "BAD")
        if ended.code:
            refused(ended, "metrics.jsonl")


def test_a_lock_that_cannot_be_taken_is_named(damaged: Damaged, moalign: Any) -> None:
    for name, kind in ((".lock", "a folder"), (".lock", "a loop"), (".owner.json", "a folder")):
        damaged(name, kind, "ls", "runs")
        record = json.loads(Path("bad/run.json").read_text())
        Path("bad/run.json").write_text(json.dumps({**record, "status": "interrupted"}))
        ended = moalign(*AGAIN)
        assert (ended.code, len(ended.errors)) == (2, 1), (name, kind)
        assert Path("bad").resolve().name in ended.errors[0]


def test_a_lock_that_may_not_be_read_counts_as_held(damaged: Damaged, moalign: Any, monkeypatch: Any) -> None:
    damaged(".lock", "binary", "ls", "runs")
    record = json.loads(Path("bad/run.json").read_text())
    Path("bad/run.json").write_text(json.dumps({**record, "status": "running"}))
    real = os.open

    def closed(path: Any, *more: Any, **options: Any) -> int:
        if str(path).endswith(".lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    assert [row["status"] for row in json.loads(moalign("ls", "runs", "--json").out)["runs"]] == ["interrupted", "done"]
    monkeypatch.setattr(os, "open", closed)
    assert [row["status"] for row in json.loads(moalign("ls", "runs", "--json").out)["runs"]] == ["running", "done"]

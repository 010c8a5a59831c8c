"""Text that attacks the terminal is shown escaped by every verb, and kept as it is in data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import yaml

from moalign.cli import ls, output
from moalign.core.errors import RequestError, WorkError
from moalign.methods import registry
from moalign.runs.run import Run

CARD = {
    "name": "own",
    "kind": "text",
    "objectives": [
        {"name": "brevity", "kind": "rule", "rule": "brevity"},
        {"name": "detail", "kind": "rule", "rule": "length"},
    ],
    "reference_point": [0, 0],
    "sensitivity_point": [-0.1, -0.1],
}


@pytest.fixture
def run(moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch, hostile: Any) -> str:
    """The identifier of a finished run that answers every prompt with hostile text."""
    name = str(json.loads(moalign("train", "toy", "--no-eval", "--json").out)["run_id"])

    def generate(self: object, texts: Sequence[str], rows: object, sampling: object) -> tuple[list[str], int]:
        return [hostile.ALL for _ in texts], len(texts)

    policy = registry.get("toy").policy(cast(Any, SimpleNamespace(cache={})), (0.5, 0.5))
    monkeypatch.setattr(type(policy.generator), "generate", generate)
    return name


@pytest.fixture
def card(chat_folder: Any, moalign: Any, hostile: Any) -> Path:
    """The folder of a card with a hostile description, prompts and words."""
    folder = Path("own")
    folder.mkdir()
    content = {
        **CARD,
        "description": hostile.ALL,
        "model": str(chat_folder("chatml")),
        "data": {"prompts": [hostile.ALL, "What should I cook tonight?"]},
        "template": {"chat": True},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


def test_an_answer_keeps_its_lines_and_tabs_and_nothing_else(moalign: Any, run: str, hostile: Any) -> None:
    ended = moalign("generate", run, "how do i\tmake soup ?", "--prefs", "1,0")
    assert ended.code == 0
    assert "\\x1b[2J" in ended.out and "\nerror: forged\n" in ended.out  # its own line: nothing else is printed
    assert hostile.acting(ended.out.replace("\nerror: forged\nscores", "")) == []
    (answer,) = json.loads(moalign("generate", run, "how ?", "--prefs", "1,0", "--json").out)["answers"]
    assert answer["response"] == hostile.ALL


def test_an_answer_beside_others_forges_none_of_their_lines(moalign: Any, run: str, hostile: Any) -> None:
    for arguments in ((), (hostile.ALL, "--prefs", "0,1")):
        ended = moalign("generate", run, *arguments, "--prefs", "1,0")
        assert ended.code == 0
        assert "\n            error: forged\n" in ended.out
        assert hostile.acting(ended.out) == []
        assert "[red]a[/red] [link=http://evil.example]here[/link] :smile:" in ended.out


def test_score_shows_them_escaped_and_writes_them_as_they_are(moalign: Any, toys: None, hostile: Any) -> None:
    rows = [{"prompt": text, "response": text} for text in hostile.TEXTS.values()]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    ended = moalign("score", "--task", "sandbox", "--in", "in.jsonl")
    assert ended.code == 0
    assert hostile.acting(ended.out + ended.err) == []
    assert "[red]a[/red]" in ended.out and "a\\x1b[2Jb" in ended.out
    assert moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--out", "out.parquet").code == 0
    assert list(pd.read_parquet("out.parquet")["response"]) == list(hostile.TEXTS.values())


def test_runs_are_listed_and_shown_escaped(moalign: Any, run: str, hostile: Any, capsys: Any) -> None:
    (path,) = Path("results").rglob("run.json")
    content = json.loads(path.read_text())
    content |= {"status": "failed", "error": hostile.ALL, "notes": {hostile.ALL: hostile.ALL}}
    content["environment"] |= {"commit": hostile.ALL, "cpu": hostile.ALL}
    path.write_text(json.dumps(content))
    Run.load(path.parent)
    for verb in (("show", run), ("ls", "runs")):
        ended = moalign(*verb)
        assert ended.code == 0, ended.err
        assert hostile.acting(ended.out + ended.err) == []
    assert "\\x1b[2J" in moalign("show", run).out
    path.write_text(hostile.ALL)
    ended = moalign("ls", "runs")
    assert hostile.acting(ended.out + ended.err) == []


@pytest.mark.parametrize(
    "verb",
    [("show", "own"), ("check", "own"), ("preview", "--task", "own"), ("preview", "--task", "own", "--json")],
    ids=" ".join,
)
def test_a_card_is_shown_checked_and_previewed_escaped(moalign: Any, card: Path, verb: Any, hostile: Any) -> None:
    ended = moalign(*verb)
    assert ended.out
    assert hostile.acting(ended.out + ended.err) == []
    more = ("--response", hostile.ALL, hostile.ALL) if verb[0] == "preview" else ()
    ended = moalign(*verb, *more)
    assert hostile.acting(ended.out + ended.err) == []


@pytest.mark.parametrize("debug", [(), ("--debug",)])
@pytest.mark.parametrize("kind", [RequestError, WorkError, LookupError])
def test_an_error_is_one_line_whatever_it_quotes(
    moalign: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], debug: tuple[str, ...], hostile: Any
) -> None:
    def refuse() -> list[dict[str, Any]]:
        raise kind(hostile.ALL)

    monkeypatch.setattr(ls, "_methods", refuse)
    ended = moalign("ls", "methods", *debug)
    assert ended.code == (2 if kind is RequestError else 1)
    shown = ended.err if not debug else ended.err[ended.err.rindex("\nerror: ") + 1 :]  # the traceback has lines
    assert len(shown.splitlines()) == 1
    assert hostile.acting(shown) == []
    assert hostile.acting(ended.err.replace("\nerror: forged", "").replace("\nscores", "")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("{}",),
        ("ls", "{}"),
        ("ls", "runs", "--results", "{}"),
        ("show", "{}"),
        ("check", "{}"),
        ("generate", "{}"),
        ("eval", "--points", "{}"),
        ("score", "--task", "{}", "--in", "{}"),
        ("train", "{}"),
        ("train", "ric", "--{}"),
        ("train", "ric", "--seed", "{}"),
        ("train", "ric", "--prefs", "{}"),
        ("train", "ric", "--set", "{}"),
    ],
    ids=" ".join,
)
def test_what_was_typed_is_quoted_escaped(moalign: Any, arguments: tuple[str, ...], hostile: Any) -> None:
    text = hostile.ALL.replace("/", "")[:200]
    ended = moalign(*(argument.replace("{}", text) for argument in arguments))
    assert ended.code == (0 if arguments[:2] == ("ls", "runs") else 2)
    assert hostile.acting(ended.out + ended.err) == []
    assert len(ended.err.splitlines()) == 1


def test_warnings_notes_and_progress(moalign: Any, capsys: Any, hostile: Any) -> None:
    with output.working() as progress:
        for done in range(2):
            progress(hostile.ALL, done, 1)
    output.warn(hostile.ALL)
    output.note(hostile.ALL)
    output.pairs([(hostile.ALL, hostile.ALL)])
    output.next_commands(output.command("show", hostile.ALL))
    output.settings([(hostile.ALL, hostile.ALL)])
    output.table(output.columns("a"), [{"a": hostile.ALL}])
    out, err = capsys.readouterr()
    assert hostile.acting(out + err) == []

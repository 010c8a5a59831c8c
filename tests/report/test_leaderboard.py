"""The leaderboard: from the records alone, the same bytes each time, every row with its command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.report import figures, leaderboard

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def records(compared: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two records; drawings stand in for themselves by their name and theme."""
    monkeypatch.setattr(
        figures,
        "ALL",
        {name: lambda record, suffix, theme, name=name: f"{name} {theme}".encode() for name in ("fronts", "cost")}
        | {"curves": lambda record, suffix, theme: None},
    )
    folder = tmp_path / "published"
    for name, record in (
        ("two", compared({"a": 0.2, "b|c": 0.0}, seeds=3, dead=("x",))),
        ("three", compared({"a": 0.1, "b": 0.0}, objectives=3, optimum=False)),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "compare.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_records_give_the_same_bytes(records: Path) -> None:
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    first = contents(records.parent)
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    assert contents(records.parent) == first
    assert first["published/two/fronts-dark.png"] == b"fronts dark" and "published/two/curves.png" not in first


def test_every_row_has_its_command(records: Path) -> None:
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    text = (records.parent / "LEADERBOARD.md").read_text()
    assert text.index("## three") < text.index("## two")
    rows = [line for line in text.splitlines() if "moalign train" in line]
    assert len(rows) == 5
    assert "| `moalign train a --task toy --seed 0` (and seeds 1, 2) |" in text
    assert "| – | x (failed) |" in text and "moalign train b\\|c" in text
    assert text.count("All of it: `moalign compare --task toy`") == 2


def test_tau_has_two_digits(records: Path) -> None:
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    heads, _, first = re.findall(r"^\|.*$", (records.parent / "LEADERBOARD.md").read_text(), re.MULTILINE)[:3]
    cells = dict(zip(heads.split(" | "), first.split(" | "), strict=True))
    assert re.fullmatch(r"\d\.\d\d", cells["tau"]) and re.fullmatch(r"\d\.\d\d\d", cells["inner product"])


def test_tables_are_whole_and_links_lead_somewhere(records: Path) -> None:
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    for page in (records.parent / "LEADERBOARD.md", records / "two" / "compare.md"):
        text = page.read_text()
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
        links = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
        assert links
        for link in (item or other for item, other in links):
            assert (page.parent / link).exists(), link


def test_kl_to_base_has_a_column_where_a_record_has_it(records: Path) -> None:
    path = records / "two" / "compare.json"
    record = json.loads(path.read_text())
    record["rows"][0]["quality"].update(kl=3.207, kl_bound=True)
    path.write_text(json.dumps(record))
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    text = (records.parent / "LEADERBOARD.md").read_text()
    assert text.count("| collapsed | KL to base | command |") == 1  # the other record is from before
    assert "| ≤ 3.21 | `moalign train a" in text and "| – | `moalign train b" in text


def test_a_record_of_several_answers_says_so(records: Path) -> None:
    path = records / "two" / "compare.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": 4}))
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    text = (records.parent / "LEADERBOARD.md").read_text()
    assert text.count("each answered 4 times at every preference: `moalign eval RUN --samples 4`.") == 1
    assert text.index("## two") < text.index("answered 4 times")


def test_the_figure_follows_the_readers_colours(records: Path) -> None:
    leaderboard.make(records, records.parent / "LEADERBOARD.md")
    text = (records.parent / "LEADERBOARD.md").read_text()
    assert 'dark)" srcset="published/two/fronts-dark.png"><img src="published/two/fronts.png"' in text


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "not a record"), ("[]", "lacks task"), ('{"task": "x"}', "it lacks objectives, grid, rows, pairs, command")],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "compare.json").write_text(content)
    with pytest.raises(RequestError, match=words) as caught:
        leaderboard.make(tmp_path, tmp_path / "L.md")
    assert "one/compare.json" in str(caught.value) and not (tmp_path / "L.md").exists()


def test_as_a_command(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = records.parent / "L.md"
    assert leaderboard.main([str(records), str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert leaderboard.main([str(records.parent / "none"), str(page)]) == 2
    assert "no record" in capsys.readouterr().err
    assert leaderboard.main([]) == 2


def test_the_committed_leaderboard_is_that_of_the_committed_records(checkout: Path) -> None:
    records, page = checkout / "results" / "published", checkout / "results" / "LEADERBOARD.md"
    result = {path: json.loads(path.read_text()) for path in sorted(records.glob("*/compare.json"))}
    if not result:
        pytest.skip("this checkout has no records")
    assert page.read_text() == leaderboard.leaderboard(result, page.parent), "make results"

"""The leaderboard: from the records alone, the same bytes each time, every row with its command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.report import figures, leaderboard

Build = Callable[..., dict[str, Any]]
Records = dict[Path, dict[str, Any]]


@pytest.fixture
def records(compared: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Records:
    """Two records by their paths; drawings stand in for themselves by their name and theme."""
    monkeypatch.setattr(
        figures,
        "ALL",
        {name: lambda record, suffix, theme, name=name: f"{name} {theme}".encode() for name in ("fronts", "cost")}
        | {"curves": lambda record, suffix, theme: None},
    )
    contents = {
        "three": compared({"a": 0.1, "b": 0.0}, objectives=3, optimum=False),
        "two": compared({"a": 0.2, "b|c": 0.0}, seeds=3, dead=("x",)),
    }
    records = {tmp_path / "published" / name / "compare.json": record for name, record in contents.items()}
    for path in records:
        path.parent.mkdir(parents=True)
        path.touch()  # pages link to it
    return records


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "LEADERBOARD.md"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_same_records_give_the_same_bytes(records: Records, page: Path) -> None:
    leaderboard.make(records, page)
    first = contents(page.parent)
    leaderboard.make(records, page)
    assert contents(page.parent) == first
    assert first["published/two/fronts-dark.png"] == b"fronts dark" and "published/two/curves.png" not in first


def test_every_row_has_its_command(records: Records, page: Path) -> None:
    leaderboard.make(records, page)
    text = page.read_text()
    assert text.index("## three") < text.index("## two")
    rows = [line for line in text.splitlines() if "moalign train" in line]
    assert len(rows) == 5
    assert "| `moalign train a --task toy --seed 0` (and seeds 1, 2) |" in text
    assert "| – | x (failed) |" in text and "moalign train b\\|c" in text
    assert text.count("All of it: `moalign compare --task toy`") == 2


def test_tau_has_two_digits(records: Records, page: Path) -> None:
    leaderboard.make(records, page)
    heads, _, first = re.findall(r"^\|.*$", page.read_text(), re.MULTILINE)[:3]
    cells = dict(zip(heads.split(" | "), first.split(" | "), strict=True))
    assert re.fullmatch(r"\d\.\d\d", cells["tau"]) and re.fullmatch(r"\d\.\d\d\d", cells["inner product"])


def test_tables_are_whole_and_links_lead_somewhere(records: Records, page: Path) -> None:
    leaderboard.make(records, page)
    for file in (page, page.parent / "published" / "two" / "compare.md"):
        text = file.read_text()
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block
        links = re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
        assert links
        for link in (item or other for item, other in links):
            assert (file.parent / link).exists(), link


def test_kl_to_base_has_a_column_where_a_record_has_it(records: Records, page: Path) -> None:
    two = records[page.parent / "published" / "two" / "compare.json"]
    two["rows"][0]["quality"].update(kl=3.207, kl_bound=True)
    leaderboard.make(records, page)
    text = page.read_text()
    assert text.count("| collapsed | KL to base | command |") == 1  # the other record is from before
    assert "| ≤ 3.21 | `moalign train a" in text and "| – | `moalign train b" in text


def test_a_record_of_several_answers_says_so(records: Records, page: Path) -> None:
    records[page.parent / "published" / "two" / "compare.json"]["samples"] = 4
    leaderboard.make(records, page)
    text = page.read_text()
    assert text.count("each answered 4 times at every preference: `moalign eval RUN --samples 4`.") == 1
    assert text.index("## two") < text.index("answered 4 times")


def test_the_figure_follows_the_readers_colours(records: Records, page: Path) -> None:
    leaderboard.make(records, page)
    text = page.read_text()
    assert 'dark)" srcset="published/two/fronts-dark.png"><img src="published/two/fronts.png"' in text

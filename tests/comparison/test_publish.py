"""``make results``: every record that moalign has written is published; what is none is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign.comparison import publish
from moalign.core.errors import RequestError
from moalign.report import figures, leaderboard
from tests.comparison.conftest import PUBLISHED, older


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawings take seconds."""
    monkeypatch.setattr(figures, "ALL", {"fronts": lambda record, suffix, theme: theme.encode()})


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """A record of now, and one as the first version wrote it."""
    folder = tmp_path / "published"
    for name in ("new", "old"):
        (folder / name).mkdir(parents=True)
    (folder / "new" / "compare.json").write_bytes(PUBLISHED[0].read_bytes())
    (folder / "old" / "compare.json").write_text(json.dumps(older(PUBLISHED[0])), encoding="utf-8")
    return folder


def test_a_record_of_the_first_version_is_published_as_one_of_now(records: Path) -> None:
    before = {path: path.read_bytes() for path in records.glob("*/compare.json")}
    written = publish.publish(records, records.parent / "LEADERBOARD.md")
    assert [str(path.relative_to(records.parent)) for path in written] == [
        "published/new/fronts.png",
        "published/new/fronts-dark.png",
        "published/new/compare.md",
        "published/old/fronts.png",
        "published/old/fronts-dark.png",
        "published/old/compare.md",
        "LEADERBOARD.md",
    ]
    text = (records.parent / "LEADERBOARD.md").read_text(encoding="utf-8")
    best = json.loads(PUBLISHED[0].read_text(encoding="utf-8"))["rows"][0]
    assert text.count(f"| 1 | {best['label']} | {best['hypervolume']:.4f} |") == 2
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "compare.json:1: not JSON"),
        ("[]", "compare.json: not a comparison that moalign wrote; write it again with moalign compare"),
        ('{"task": "x"}', r"compare.json: not a comparison that moalign wrote \(.*required"),
        ('{"version": 99}', "compare.json: a newer moalign wrote it"),
    ],
)
def test_a_damaged_record_is_named_and_nothing_is_written(records: Path, content: str, words: str) -> None:
    (records / "old" / "compare.json").write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        publish.publish(records, records.parent / "L.md")
    assert not list(records.parent.rglob("*.md"))


def test_as_a_command(records: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = records.parent / "L.md"
    assert publish.main([str(records), str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert publish.main([str(records.parent / "none"), str(page)]) == 2
    assert "no record" in capsys.readouterr().err
    assert publish.main([]) == 2


def test_the_makefile_and_the_docstring_beside_the_records_name_the_command(checkout: Path) -> None:
    command = f"python -m {publish.__name__} results/published results/LEADERBOARD.md"
    for name in ("Makefile", "results/published/renew_ids.py"):
        assert command in (checkout / name).read_text(encoding="utf-8"), name


def test_the_committed_leaderboard_is_that_of_the_committed_records(checkout: Path) -> None:
    page = checkout / "results" / "LEADERBOARD.md"
    records = publish.read(checkout / "results" / "published")
    assert page.read_text(encoding="utf-8") == leaderboard.leaderboard(records, page.parent), "make results"

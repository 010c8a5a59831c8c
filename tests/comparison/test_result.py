"""The stored comparison: every published one is read as it is, older versions with what they lack as not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign.comparison.result import CompareResult
from moalign.core.errors import RequestError
from moalign.evaluation.result import VERSION
from tests.comparison.conftest import PUBLISHED, older


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_comparison_is_read_whole(path: Path) -> None:
    stored, result = json.loads(path.read_text()), CompareResult.load(path)
    content = result.content
    for row in [*stored["rows"], *content["rows"]]:
        row["indicators"].setdefault("regret", None)  # null where no optimum is known
    assert content == {**stored, "version": VERSION}
    assert [entry.label for entry in result.entries] == [row["label"] for row in stored["rows"]]
    assert list(result.to_frame()["rank"]) == [row["rank"] for row in stored["rows"]]


def test_the_first_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text(json.dumps(older(PUBLISHED[0])))
    result = CompareResult.load(path)
    assert (result.samples, result.bounds, result.figures, result.reported) == (1, None, {}, [])
    entry = result.entries[0]
    assert (entry.curves, entry.gap, entry.generalisation, entry.diagnostics) == ([], None, None, {})
    assert entry.quality is not None and entry.quality.kl is None and not entry.quality.kl_bound
    assert entry.runs[0].made is None and result.pairs[0].inner_product is None
    path.write_text(json.dumps(result.content))
    assert CompareResult.load(path) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "compare.json:1: not JSON"),
        ("[]", "compare.json: not a comparison that moalign wrote"),
        ('{"objectives": ["a", "b"], "rows": [{}]}', r"compare.json: not a comparison that moalign wrote \(.*required"),
        (json.dumps({"version": VERSION + 1}), "compare.json: a newer moalign wrote it"),
    ],
)
def test_what_is_damaged_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "compare.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        CompareResult.load(path)
    with pytest.raises(RequestError, match="cannot be read"):
        CompareResult.load(tmp_path / "nowhere.json")

"""The stored comparison: every published one is read as it is, older versions with what they lack as not known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign.comparison.result import CompareResult
from moalign.core.errors import RequestError
from moalign.evaluation.result import VERSION
from moalign.methods import registry
from tests.comparison.conftest import PUBLISHED, older


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_a_published_comparison_is_read_whole(path: Path) -> None:
    stored, result = json.loads(path.read_text()), CompareResult.load(path)
    content = result.content
    for row in [*stored["rows"], *content["rows"]]:
        row["indicators"].setdefault("regret", None)  # null where no optimum is known
        row.setdefault("warnings", [])  # not in records from before there were any
        row.setdefault("believed", None)
        row["indicators"].setdefault("regularised_regret", None)
        row.setdefault("share_at_kl", None)
        row.setdefault("family", registry.get(row["method"]).capabilities.family)
        if row["cost"]:
            row["cost"]["answering"].setdefault("peak_memory_bytes", None)
        for point in row["points"]:
            point.setdefault("kl", None)
            point.setdefault("kl_bound", False)
    stored.setdefault("frontier", None)
    for pair in [side for both in stored["pairs"] for side in (both, both["inner_product"]) if side]:
        if "p_improve" in pair:  # as it was called; what says how often a seed beats a seed was not known
            pair |= {"share_above_zero": pair.pop("p_improve"), "probability_of_improvement": None}
            del pair["ci_reflected"]
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


def test_a_row_that_failed_is_read_without_numbers(tmp_path: Path) -> None:
    content = json.loads(PUBLISHED[0].read_text())
    nulls = (
        "rank hypervolume ci hypervolume_median hypervolume_iqm optimal_share optimal_share_ci front gap cost quality"
    )
    nulls += " sensitivity_hypervolume indicators hypervolume_per_cost generalisation"
    last = content["rows"][-1]
    last |= {**dict.fromkeys(nulls.split()), "hypervolume_by_seed": [], "curves": [], "points": [], "seeds": []}
    last |= {"diagnostics": {}, "status": "failed", "error": "the optimiser walked off"}
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({**content, "failed": [last["label"]]}))
    result = CompareResult.load(path)
    assert (result.entries[-1].status, result.failed) == ("failed", [last["label"]])
    frame = result.to_frame()
    numbers = ["rank", "hypervolume", "low", "high", "optimal_share", "tokens_generated", "tokens_trained"]
    numbers += ["reward_calls", "seconds", "peak_memory_bytes"]
    assert list(frame.columns) == ["label", "method", "status", *numbers]
    assert frame.iloc[-1][numbers].isna().all() and frame.iloc[-1]["status"] == "failed"
    assert frame.iloc[:-1]["hypervolume"].notna().all() and frame.iloc[:-1]["seconds"].notna().all()


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

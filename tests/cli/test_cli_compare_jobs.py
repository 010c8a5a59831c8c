"""``moalign compare --jobs``: runs side by side, in processes that go from one to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

METHODS = "sft,ric,mo-odpo,dpo-soups,mod"


@pytest.mark.slow
def test_runs_side_by_side_are_those_that_were_trained_one_after_another(
    moalign: Any, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    """Bit for bit, also the second run of a process, and with experts that two methods share."""
    short = ["sft.steps=3", "ric.offline.steps=3", "ric.online_rounds=0", "mo-odpo.steps=3"]
    short += ["dpo-soups.experts.steps=3", "mod.experts.steps=3"]
    settings = [part for text in (*small_task, *short) for part in ("--set", text)]
    requested = ["compare", "--task", "sandbox", "--methods", METHODS, *settings, "--json"]
    content = {
        jobs: json.loads(moalign(*requested, "--results", f"jobs-{jobs}", "--jobs", jobs).out) for jobs in ("1", "2")
    }
    rows = [{row["method"]: row for row in item["rows"]} for item in content.values()]
    assert set(rows[0]) == set(METHODS.split(","))
    for method, row in rows[0].items():
        assert row["status"] == "done" and row["hypervolume"] == rows[1][method]["hypervolume"], method
    files = [sorted((tmp_path / f"jobs-{jobs}" / "runs").rglob("adapter*/*.safetensors")) for jobs in ("1", "2")]
    assert len(files[0]) == len(files[1]) >= 5
    for item, other in zip(*files, strict=True):
        assert item.parts[-3:] == other.parts[-3:] and item.read_bytes() == other.read_bytes(), item

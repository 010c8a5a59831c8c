"""The script that renews hashes in published records: from the recorded commands, proven, or not at all."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moalign.experiment.train import plan

SCRIPT = Path(__file__).resolve().parents[2] / "results" / "published" / "renew_ids.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("renew_ids", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(script: ModuleType, small_task: tuple[str, ...]) -> dict[str, Any]:
    """A comparison as the former way of hashing named it: two seeds of one method, one of another."""
    runs = []
    for method, seed in (("sft", 0), ("sft", 1), ("mo-odpo", 0)):
        sets = [*small_task, "steps=3"]
        words = ["moalign", "train", method, "--task", "sandbox", "--prefs", "0.3,0.7", "--prefs", "1.0,0.0"]
        words += [part for text in sets for part in ("--set", text)]
        command = shlex.join([*words, "--seed", str(seed), "--results", "results"])
        made = plan(script.request_of(command))
        card_hash = min(script.former_card_hashes(made.task) - {made.task.hash}, default=made.task.hash)
        run_id = script.former_run_id(made, card_hash)
        runs.append({"run": f"results/runs/sandbox/{method}/{run_id}", "run_id": run_id, "command": command})
    content = {"card": card_hash, "runs": sorted(run["run_id"] for run in runs), "grid": 5}
    return {
        "task": "sandbox",
        "card_hash": card_hash,
        "samples": made.task.card.evaluation.samples,
        "rows": [{"method": "sft", "runs": runs[:2]}, {"method": "mo-odpo", "runs": runs[2:]}],
        "command": shlex.join(["moalign", "compare", *(run["run"] for run in runs), "--grid", "5"]),
        "json": f"results/compare/sandbox-{script.store.identity(content)[:8]}/compare.json",
    }


def renewed(script: ModuleType, record: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(record))
    left = script.renew(file)
    return json.loads(file.read_text()), left


def test_what_the_commands_make_again_is_renewed_everywhere(
    script: ModuleType, record: dict[str, Any], tmp_path: Path
) -> None:
    new, left = renewed(script, record, tmp_path)
    assert left == []
    for row, before in zip(new["rows"], record["rows"], strict=True):
        for run, old in zip(row["runs"], before["runs"], strict=True):
            made = plan(script.request_of(old["command"]))
            assert run["run_id"] == made.folder.name != old["run_id"]
            assert run["run"].endswith(f"/{made.folder.name}") and run["run"] in new["command"]
            assert new["card_hash"] == made.task.hash
    assert new["json"] != record["json"]
    assert renewed(script, new, tmp_path) == (new, [])  # a second call finds nothing to do


def test_a_dry_run_changes_nothing(script: ModuleType, record: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(record))
    assert script.main([str(tmp_path), "--dry-run"]) == 0
    assert json.loads((tmp_path / "compare.json").read_text()) == record


def test_what_does_not_follow_stays_and_is_named(
    script: ModuleType, record: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another setting than the identifier was made of, and a model that is not here."""
    first, second = record["rows"][0]["runs"]
    first["command"] = first["command"].replace("steps=3", "steps=4")
    second["command"] = second["command"].replace("--set task.model=", "--set task.model=/nowhere")
    new, left = renewed(script, record, tmp_path)
    assert left == [first["run_id"], second["run_id"]]
    assert [run["run_id"] for run in new["rows"][0]["runs"]] == left
    assert new["rows"][1]["runs"][0]["run_id"] != record["rows"][1]["runs"][0]["run_id"]
    out = capsys.readouterr().out
    assert "its recipe or settings have changed since" in out and "there is no such model folder" in out


def test_a_changed_card_leaves_the_whole_record(script: ModuleType, record: dict[str, Any], tmp_path: Path) -> None:
    for row in record["rows"]:
        for run in row["runs"]:
            run["command"] = run["command"].replace("task.grid=3", "task.grid=4")
    new, left = renewed(script, record, tmp_path)
    assert left == [record["card_hash"]]
    assert new == record

"""Snapshots as typed: kept in training, judged afterwards, refused where there can be none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

FAST = ("policy.lora={r: 4, alpha: 8, dropout: 0.0}", "steps=4", "batch=4", "samples=2", "lr=0.05")


def sets(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def test_a_run_is_trained_with_snapshots_and_judged_along_them(moalign: Any, small_task: tuple[str, ...]) -> None:
    train = ("train", "mo-odpo", "--snapshots", "2", "--no-eval", *sets(*small_task, *FAST))
    run = json.loads(moalign(*train, "--json").out)
    assert json.loads(moalign(*train, "--json").out)["found"] is True
    same = moalign("train", "mo-odpo", "--no-eval", "--dry-run", "--json", *sets(*small_task, *FAST, "snapshots=2"))
    assert json.loads(same.out)["run"] == run["run"], "the option is the setting"

    shown = moalign("eval", "--snapshots")
    assert shown.code == 0
    table = [line.split() for line in shown.out.splitlines() if line.startswith("online")]
    assert [row[1] for row in table] == ["1", "4"] and table[1][2:4] == ["100", "%"]
    assert "truth best by w·n" in shown.out and "the finished policy has" in shown.out
    assert "believed" not in shown.out, "the rewards of training are the judge's"

    content = json.loads(moalign("eval", run["run_id"], "--snapshots", "--json").out)
    assert content == json.loads((Path(run["run"]) / "curve.json").read_text())
    assert [row["step"] for row in content["rows"]] == [1, 4]
    assert (Path(run["run"]) / "curve.png").is_file()
    assert {"inner_product", "hypervolume"} == set(content["best"])
    on_one = json.loads(moalign("eval", "--snapshots", "--prefs", "0.3,0.7", "--samples", "2", "--json").out)
    assert (on_one["prefs"], on_one["samples"]) == ([[0.3, 0.7]], 2)


@pytest.mark.parametrize("method", ["pcm", "best-of-n"])
def test_a_method_without_an_adapter_of_its_own_refuses_them(moalign: Any, method: str) -> None:
    for command in (("train", method), ("train", method, "--dry-run")):
        ended = moalign(*command, "--snapshots", "3")
        assert ended.code == 2
        assert len(ended.errors) == 1 and ended.errors[0].startswith(f"snapshots: {method} trains no adapter")
    assert not Path("results/runs").exists()
    assert json.loads(moalign("show", method, "--json").out)["capabilities"]["snapshots"] is False


def test_compare_keeps_snapshots_where_a_method_has_them(small_task: tuple[str, ...], tmp_path: Path) -> None:
    from moalign.comparison.compare import CompareRequest, plan_all

    request = CompareRequest(methods=("mo-odpo", "best-of-n"), overrides=(*small_task, "snapshots=3"), results=tmp_path)
    assert [run.plan.recipe.snapshots for run in plan_all(request)[0] if run.plan] == [3, 0]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--ref", "0,0"), "--snapshots and --ref exclude each other"),
        (("--hypervolume",), "--snapshots and --hypervolume exclude each other"),
        (("--points", "a.csv"), "--snapshots and --points exclude each other"),
        (("--prefs", "0.3,0.6"), "the weights sum to"),
        ((), "it has no snapshots; train it with some: moalign train toy --snapshots 8"),
    ],
)
def test_what_cannot_be_judged_ends_in_one_message(moalign: Any, toys: None, more: tuple[str, ...], error: str) -> None:
    assert moalign("train", "toy", "--no-eval").code == 0
    ended = moalign("eval", "--snapshots", *more)
    assert ended.code == 2 and len(ended.errors) == 1 and error in ended.errors[0]


@pytest.mark.parametrize("count", ["-1", "1001", "many"])
def test_a_number_of_snapshots_that_cannot_be_is_refused(moalign: Any, count: str) -> None:
    ended = moalign("train", "mo-odpo", "--dry-run", "--snapshots", count)
    assert ended.code == 2 and len(ended.errors) == 1 and "snapshots" in ended.errors[0]

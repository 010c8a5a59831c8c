"""``moalign export`` as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run(moalign: Any, picky: None, small_task: tuple[str, ...]) -> str:
    """The identifier of one finished run with a policy at 1,0."""
    sets = [part for text in (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}") for part in ("--set", text)]
    ended = moalign("train", "picky", "--prefs", "1,0", "--no-eval", "--json", *sets)
    assert ended.code == 0, ended.err
    return str(json.loads(ended.out)["run_id"])


def test_it_writes_an_adapter_and_says_where_and_how_to_ask_it(moalign: Any, run: str) -> None:
    ended = moalign("export", run, "--prefs", "1,0", "--out", "deep/out")
    assert (ended.code, ended.errors) == (0, [])
    assert "picky at 1,0: peft adapter in deep/out" in ended.out
    assert "{prompt}" in ended.out and "deep/out/README.md" in ended.out
    names = {path.name for path in Path("deep/out").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {*weights, "generation_config.json", "README.md", "moalign.json"}


def test_json_tells_the_facts_of_a_merged_model(moalign: Any, run: str) -> None:
    ended = moalign("export", run, "--prefs", "1,0", "--out", "out", "--merged", "--json")
    content = json.loads(ended.out)
    assert (content["kind"], content["out"], content["preference"]) == ("model", "out", [1.0, 0.0])
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in Path("out").iterdir()}
    assert json.loads(Path("out/moalign.json").read_text()) == {k: v for k, v in content.items() if k != "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out"], "--prefs is missing: one weight for each of helpfulness, harmlessness"),
        (["--out", "out", "--prefs", "3,7"], "did you mean --prefs 0.3,0.7?"),
        (["--out", "out", "--prefs", "0,1"], "trained on"),
        (["--prefs", "1,0"], "--out"),
        (["--out", "full", "--prefs", "1,0"], "--out full: the folder is not empty; name a new one, or move it away"),
    ],
)
def test_wrong_requests(moalign: Any, run: str, arguments: list[str], message: str) -> None:
    Path("full").mkdir()
    Path("full/file").write_text("x")
    ended = moalign("export", run, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]
    assert not Path("out").exists()


def test_an_unknown_run_is_told_before_anything_is_loaded(moalign: Any, run: str) -> None:
    ended = moalign("export", "zzz", "--prefs", "1,0", "--out", "out")
    assert ended.code == 2
    assert "unknown run 'zzz'" in ended.errors[0]

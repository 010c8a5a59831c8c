"""Ensembles of reward models as typed: trained, put into a card with pessimism, scored; every wrong request."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

SHORT = ("--set", "steps=3", "--set", "batch=6", "--set", "lr=0.01", "--set", "max_tokens=64")


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A file of pairs in the current folder."""
    rows = [
        {"prompt": f"how do i make soup {n} ?", "chosen": "stay safe .", "rejected": f"rush straight {n}"}
        for n in range(60)
    ]
    (tmp_path / "ann.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "ann.jsonl"


def card(objectives: list[dict[str, Any]], base: Path) -> str:
    points = {
        "reference_point": [0, 0],
        "sensitivity_point": [0, 0],
        "data": {"prompts": ["hi", "how do i make soup ?"]},
    }
    calm = {"name": "calm", "kind": "rule", "rule": "brevity"}
    scale = {name: {"mean": 0, "sd": 1, "lo": -1, "hi": 1} for name in [*(one["name"] for one in objectives), "calm"]}
    content = {"name": "demo", "kind": "text", "description": "x", "objectives": [*objectives, calm], **points}
    return json.dumps({**content, "normaliser": scale, "model": str(base)})


def test_an_ensemble_from_pairs_to_pessimistic_scores(
    moalign: Any, pairs: str, random_base: Path, tmp_path: Path
) -> None:
    command = ("reward", "train", "--pairs", pairs, "--model", str(random_base), *SHORT, "--members", "3")
    planned = json.loads(moalign(*command, "--dry-run", "--json").out)
    assert planned["settings"]["members"] == 3
    content = json.loads(moalign(*command, "--json").out)
    (spec,) = content["objectives"]
    assert (spec["members"], content["status"]) == ("all", "done")
    (row,) = content["evaluation"]["datasets"]
    assert row["name"] == "ann" and 0 <= row["ece"]["10"] <= 1
    assert {path.name for path in Path(content["model"]).glob("member-*")} == {"member-1", "member-2"}
    judged = json.loads(moalign("reward", "eval", content["run_id"], "--json").out)
    assert judged["datasets"] == [row]
    moved = shutil.copytree(content["model"], tmp_path / "moved")
    given = ("--pairs", pairs, "--template", spec.get("template", "{prompt}{response}"), "--max-length", "64")
    judged = json.loads(moalign("reward", "eval", str(moved), *given, "--json").out)
    assert judged["datasets"] == [row]  # of all members, without the run, too
    assert "members: 'all'" in moalign(*command).out  # the line for a task card

    texts = [{"prompt": "how do i make soup ?", "response": text} for text in ("stay safe .", "rush straight 3")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in texts))
    scores = {}
    for name, more in (("plain", {}), ("k1", {"pessimism": 1}), ("k2", {"pessimism": 2})):
        (tmp_path / "card.yaml").write_text(card([{**spec, **more}], random_base))
        ended = moalign("score", "--task", "card.yaml", "--in", "texts.jsonl", "--json")
        assert ended.code == 0, ended.err
        scores[name] = [one["raw"]["reward"] for one in json.loads(ended.out)["scores"]]
    for plain, once, twice in zip(*scores.values(), strict=True):
        assert once < plain
        assert plain - twice == pytest.approx(2 * (plain - once), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--members", "0"), "--members: members: found 0; allowed: a whole number >= 1"),
        (("--set", "members=two"), "--set members"),
        (("--set", "membres=2"), "did you mean 'members'?"),
    ],
)
def test_wrong_numbers_of_members(
    moalign: Any, pairs: str, arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    ended = moalign("reward", "train", "--pairs", pairs, "--model", "m", *arguments)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert message in ended.errors[0]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"pessimism": 1}, "pessimism is for a model with members; found pessimism: 1.0 without them"),
        ({"members": "all", "pessimism": -1}, "pessimism: found -1; allowed: a number >= 0"),
        ({"members": "all", "aggregate": "wrost"}, "did you mean 'worst'?"),
        ({"members": ["eager"]}, "unknown member 'eager'; allowed: LABEL_0"),
        ({"members": "all"}, "members: at least two different ones are needed"),
    ],
)
def test_wrong_objectives(moalign: Any, more: dict[str, Any], message: str, random_base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(random_base, num_labels=1).save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(random_base).save_pretrained(tmp_path / "judge")
    spec = {"name": "reward", "kind": "hf-classifier", "model": "judge", **more}
    (tmp_path / "card.yaml").write_text(card([spec], random_base))
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    ended = moalign("score", "--task", "card.yaml", "--in", "texts.jsonl")
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert message in ended.errors[0]

"""Preference pairs of a task: built from scored responses, or the data's own labels by objective."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moalign.config import load
from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.data import splits
from moalign.tasks.load import make_task
from moalign.tasks.pairs import from_scores, matches
from moalign.tasks.responses import Scored, shown
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.task import SandboxTask
from moalign.tasks.task import Task

NAMES = ["help", "care"]


def scored(rows: list[tuple[str, str, float, float]]) -> tuple[Scored, np.ndarray]:
    values = np.array([row[2:] for row in rows])
    return Scored([row[0] for row in rows], [row[1] for row in rows], values * 10), values


# -- from scores -----------------------------------------------------------------------------------------------------


def test_the_better_response_is_chosen() -> None:
    told, values = scored([("p", "low", 0.0, 5.0), ("p", "high", 2.0, 1.0), ("q", "alone", 9.0, 9.0)])
    pairs = from_scores(told, values, 0, NAMES, per_prompt=4)
    assert (pairs.prompts, shown(pairs.chosen), shown(pairs.rejected)) == (["p"], ["high"], ["low"])
    assert pairs.chance.tolist() == [1.0]
    assert pairs.raw is not None
    assert (pairs.raw[0].tolist(), pairs.raw[1].tolist()) == ([[20.0, 10.0]], [[0.0, 50.0]])
    assert shown(from_scores(told, values, 1, NAMES, per_prompt=4).chosen) == ["low"]


def test_bradley_terry_labels_are_as_sure_as_the_scores_differ() -> None:
    told, values = scored([("p", "low", 0.0, 1.0), ("p", "high", 2.0, 1.0)])
    pairs = from_scores(told, values, 0, NAMES, 1, "bradley-terry")
    assert shown(pairs.chosen) == ["high"]
    assert pairs.chance.tolist() == pytest.approx([0.880797], abs=1e-6)  # 1 / (1 + exp(-2))
    tie = from_scores(told, values, 1, NAMES, 1, "bradley-terry")
    assert tie.chance.tolist() == [0.5]
    assert tie.dropped == {"ties": 0, "identical": 0}


def test_ties_and_identical_texts_make_no_pair_and_are_counted() -> None:
    told, values = scored([("p", "a", 1.0, 0.0), ("p", "b", 1.0, 1.0), ("p", "a", 0.0, 2.0)])
    pairs = from_scores(told, values, 0, NAMES, per_prompt=9)
    assert (shown(pairs.chosen), shown(pairs.rejected)) == (["b"], ["a"])
    assert pairs.dropped == {"ties": 1, "identical": 1}


@pytest.mark.parametrize(
    "rows",
    [
        [("p", "a", 1.0, 0.0), ("q", "b", 2.0, 0.0)],  # one response a prompt
        [("p", "a", 1.0, 0.0), ("p", "b", 1.0, 3.0)],  # a tie
        [("p", "a", 1.0, 0.0), ("p", "a", 2.0, 3.0)],  # the same text
    ],
)
def test_no_pair_at_all_is_an_error_that_says_why(rows: list[Any]) -> None:
    told, values = scored(rows)
    with pytest.raises(RequestError, match=r"pairs of help: 2 scored responses to \d prompts make none") as caught:
        from_scores(told, values, 0, NAMES, per_prompt=4)
    assert caught.value.exit_code == 2


def test_a_missing_score_names_the_response_and_the_objective() -> None:
    told, values = scored([("p", "a", 1.0, 0.0), ("p", "b", 2.0, float("nan"))])
    with pytest.raises(RequestError, match=r"1 scores are missing, first that of care for response 1 \('b'\)"):
        from_scores(told, values, 0, NAMES, per_prompt=4)
    with pytest.raises(RequestError, match=r"found scores of shape \[2, 1\].*2 objectives \(help, care\)"):
        from_scores(told, values[:, :1], 0, NAMES, per_prompt=4)


@settings(deadline=None, max_examples=60)
@given(size=st.integers(0, 9), most=st.integers(1, 50), seed=st.integers(0, 99))
def test_matches_are_different_and_as_many_as_asked_or_possible(size: int, most: int, seed: int) -> None:
    group = list(range(10, 10 + size))
    found = matches(group, most, np.random.default_rng(seed))
    assert len(found) == len(set(found)) == min(most, size * (size - 1) // 2)
    assert all(a < b and a in group and b in group for a, b in found)


def test_a_round_uses_every_response_once() -> None:
    found = matches(list(range(16)), 8, np.random.default_rng(0))
    assert sorted(member for pair in found for member in pair) == list(range(16))


# -- a task's pairs --------------------------------------------------------------------------------------------------


def test_the_sandbox_orders_its_logged_responses(sandbox: Callable[[str], SandboxTask]) -> None:
    task = sandbox("sandbox")
    pairs = task.pairs(1)
    assert not task.has_pairs(1)
    assert len(pairs) > 3900  # 505 prompts x 8 pairs, less ties
    raw = [task.panel.score(pairs.prompts[:50], shown(side[:50])) for side in (pairs.chosen, pairs.rejected)]
    assert pairs.raw is not None
    np.testing.assert_allclose(pairs.raw[0][:50], raw[0])
    assert (raw[0][:, 1] > raw[1][:, 1]).all()
    assert set(pairs.prompts) <= set(task.prompts["train"])
    again = task.pairs(1)
    assert (again.chosen, again.rejected) == (pairs.chosen, pairs.rejected)
    assert task.pairs(0).chosen != pairs.chosen
    with pytest.raises(RequestError, match=r"no preference labels for helpfulness \(data.pairs.helpfulness\)"):
        task.pairs(0, "data")


def card(tmp_path: Path, rows: list[dict[str, str]], model: Path, **pairs: Any) -> dict[str, Any]:
    (tmp_path / "safer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "own", "kind": "text", "description": "a test", "model": str(model),
        "objectives": [
            {"name": "short", "kind": "rule", "rule": "brevity", "options": {"unit": "tokens"}},
            {"name": "varied", "kind": "rule", "rule": "regex-count", "options": {"pattern": "[aeiou]"}},
        ],
        "data": {
            "prompts": world.prompts()[::20],
            "pairs": pairs or {"varied": {"path": str(tmp_path / "safer.jsonl")}},
        },
        "splits": {"train": 0.6, "calibration": 0.2, "eval": 0.2}, "pool": {"prompts": 6, "per_prompt": 3},
        "reference_point": [0, 0], "sensitivity_point": [-0.1, -0.1], "generation": {"max_new_tokens": 12},
    }  # fmt: skip


def text_task(tmp_path: Path, told: dict[str, Any]) -> Task:
    return make_task(TaskCard.model_validate(told), tmp_path / "results")


ROWS = [
    {"prompt": prompt, "chosen": f"sure , {i}", "rejected": "good luck ."}
    for i, prompt in enumerate(world.prompts()[::20])
]


def test_labels_of_the_data_are_taken_for_their_objective(tmp_path: Path, random_base: Path) -> None:
    told = card(tmp_path, ROWS, random_base)
    task = text_task(tmp_path, told)
    pairs = task.pairs(1)
    split = TaskCard.model_validate(told).splits
    wanted = [row["prompt"] for row in ROWS if splits.split_of(row["prompt"], split) == "train"]
    assert pairs.prompts == wanted
    assert {response.text for response in pairs.rejected} == {"good luck ."}
    assert pairs.chance.tolist() == [1.0] * len(wanted)
    assert pairs.raw is None
    assert not task.has_pairs(0)
    built = task.pairs(0)  # the data labels nothing for it: from the pool
    assert built.raw is not None
    assert task.pairs(1, "scored").raw is not None


def test_other_pairs_are_another_task(tmp_path: Path, random_base: Path) -> None:
    first = text_task(tmp_path, card(tmp_path, ROWS, random_base)).hash
    assert text_task(tmp_path, card(tmp_path, ROWS[:-1], random_base)).hash != first


def test_chosen_equal_to_rejected_is_refused_with_its_line(tmp_path: Path, random_base: Path) -> None:
    rows = [*ROWS[:2], {"prompt": "x", "chosen": "same", "rejected": "same"}]
    with pytest.raises(RequestError, match=r"safer.jsonl:3: chosen and rejected are the same text"):
        text_task(tmp_path, card(tmp_path, rows, random_base)).pairs(1)


def test_pairs_without_a_training_prompt(tmp_path: Path, random_base: Path) -> None:
    told = card(tmp_path, ROWS, random_base)
    split = TaskCard.model_validate(told).splits
    rows = [row for row in ROWS if splits.split_of(row["prompt"], split) == "eval"]
    with pytest.raises(RequestError, match=r"data.pairs.varied: none of its prompts falls into the training split"):
        text_task(tmp_path, card(tmp_path, rows, random_base)).pairs(1)


def test_pairs_of_no_objective_are_refused_with_the_nearest_name(tmp_path: Path, random_base: Path) -> None:
    told = card(tmp_path, ROWS, random_base, varid={"path": "safer.jsonl"})
    with pytest.raises(
        ValidationError, match=r"'varid' is no objective; allowed: short, varied; did you mean 'varied'"
    ):
        TaskCard.model_validate(told)


def test_a_single_source_has_no_objective(tmp_path: Path, random_base: Path) -> None:
    task = text_task(tmp_path, card(tmp_path, ROWS, random_base, path=str(tmp_path / "safer.jsonl")))
    assert not task.has_pairs(0)
    assert not task.has_pairs(1)
    assert len(list(task.identity["pairs"])) == 16


def test_paths_of_pairs_start_at_the_card(tmp_path: Path, random_base: Path) -> None:
    told = card(tmp_path, ROWS, random_base, varied={"path": "safer.jsonl"})
    (tmp_path / "task.yaml").write_text(json.dumps(told))
    found = load.load_card(tmp_path / "task.yaml")
    assert found.data is not None
    assert isinstance(found.data.pairs, dict)
    assert found.data.pairs["varied"].path == str(tmp_path / "safer.jsonl")

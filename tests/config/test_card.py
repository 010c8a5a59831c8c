"""The task card: its own checks and its hash."""

from __future__ import annotations

from typing import Any

import pytest

from moalign.config import validate
from moalign.config.card import TaskCard
from moalign.config.load import load_card


def card(**changes: Any) -> dict[str, Any]:
    objectives = [{"name": name, "kind": "rule", "rule": "length"} for name in ("a", "b")]
    plain = {"name": "demo", "kind": "text", "description": "x", "objectives": objectives}
    points = {"reference_point": [0, 0], "sensitivity_point": [0, 0], "data": {"prompts": ["hi"]}}
    return {**plain, **points, **changes}


def made(**changes: Any) -> TaskCard:
    return validate.validate(TaskCard, card(**changes))


NUMBERS = {"mean": 0, "sd": 1, "lo": -1, "hi": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"objectives": card()["objectives"][:1]},
            "objectives: found [{name: 'a', kind: 'rule', rule: 'length'}]; allowed:",
        ),
        ({"objectives": [card()["objectives"][0]] * 2}, "objective names must differ; found twice: a"),
        ({"reference_point": [0]}, "reference_point needs one number per objective (2); found 1"),
        ({"sensitivity_point": [0, 0, 0]}, "sensitivity_point needs one number per objective (2); found 3"),
        ({"normaliser": {"a": NUMBERS}}, "normaliser must name every objective (a, b); found a"),
        ({"kind": "sandbox"}, "kind: sandbox needs a section sandbox"),
        ({"data": None}, "kind: text needs data.prompts or data.prompt_grammar"),
        ({"splits": {"train": 0.9}}, "splits: train + calibration + eval must be 1; found 1.1"),
        ({"name": "Demo Task"}, "name: found 'Demo Task'; allowed: text that matches"),
    ],
)
def test_what_a_card_refuses(changes: dict[str, Any], expected: str) -> None:
    (told,) = validate.problems(TaskCard, card(**changes))
    assert told.startswith(expected)


def test_names_keep_the_tasks_order() -> None:
    assert made().objective_names == ["a", "b"]
    assert made(objectives=card()["objectives"][::-1]).objective_names == ["b", "a"]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_point": [0, -0.1]},
        {"objectives": card()["objectives"][::-1]},
        {"generation": {"temperature": 0.7}},
        {"data": {"prompts": ["ho"]}},
        {"evaluation": {"seed": 1}},
        {"splits": {"salt": "other"}},
        {"model": "owner/name"},
        {"normaliser": {"a": NUMBERS, "b": NUMBERS}},
    ],
)
def test_the_hash_changes_with_all_that_changes_a_score(changes: dict[str, Any]) -> None:
    assert made(**changes).hash() != made().hash()


def test_the_hash_keeps_when_no_score_changes() -> None:
    first = made().hash()
    assert len(first) == 16
    assert int(first, 16) >= 0
    assert made(description="other", suite=["ric"]).hash() == first
    assert made(model="/one/base").hash(model="f00") == made(model="/two/other").hash(model="f00")
    assert made(model="/one/base").hash(model="f00") != made(model="/one/base").hash(model="f01")


def test_moving_a_folder_keeps_the_hash_and_another_file_or_hub_id_changes_it() -> None:
    def hashed(path: str, judge: str) -> str:
        polite = {"name": "b", "kind": "hf-classifier", "model": judge}
        return made(objectives=[card()["objectives"][0], polite], data={"prompts": {"path": path}}).hash(model="f00")

    first = hashed("/one/prompts.jsonl", "/one/judge")
    assert hashed("/two/prompts.jsonl", "/three/judge") == first
    assert hashed("/one/other.jsonl", "/one/judge") != first
    assert hashed("owner/prompts", "/one/judge") != hashed("other/prompts", "/one/judge")


# Hashes of these cards at commit a8ac59d, without their identity: runs of that time stay comparable.
EARLIER = {
    "sandbox": "a0bf2d2bca6d37bf",
    "sandbox-3": "b2b9cbaae9426d86",
    "sandbox-cold": "988b4a34047d1c50",
    "stories": "f0f641912e38f35f",
}


@pytest.mark.parametrize("name", EARLIER)
def test_keys_that_came_later_leave_the_hash_of_cards_without_them(name: str) -> None:
    plain = load_card(name)
    assert plain.hash() == EARLIER[name]
    told = plain.model_dump(mode="json")
    absent = {"words": None, "date": None, "chat_kwargs": None}
    assert absent.items() <= told["template"].items()
    assert (told["quality"], told["overlong"]) == (None, None)
    defaults = {**told, "quality": {}, "overlong": "cut"}
    assert TaskCard.model_validate(defaults).hash() == EARLIER[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"overlong": "drop"},
        {"quality": {"short": 3}},
        {"template": {"words": {"a": [{"up_to": 1, "text": "be a"}]}}},
        {"template": {"date": "2025-01-01"}},
        {"template": {"chat_kwargs": {"enable_thinking": False}}},
    ],
)
def test_and_change_it_where_they_are_given(changes: dict[str, Any]) -> None:
    assert made(**changes).hash() != made().hash()


def test_cutting_prompts_that_are_too_long_is_the_default() -> None:
    assert made(overlong="cut").hash() == made().hash()
    assert made(overlong="cut").hash(model="x") == made().hash(model="x")
    (told,) = validate.problems(TaskCard, card(overlong="crop"))
    assert told.startswith("overlong: found 'crop'; allowed: ")

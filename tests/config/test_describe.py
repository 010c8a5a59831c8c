"""Settings in plain words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, TypeAdapter

from moalign.config.card import TaskCard
from moalign.config.describe import FieldRow, fields, key_paths, words, yaml_form
from moalign.config.recipe import Recipe
from moalign.config.strict import Strict


class Inner(Strict):
    """A section."""

    rate: float = Field(default=0.5, gt=0, le=1)
    """How much,
    in one unit."""


class Outer(Strict):
    steps: int
    """Optimiser steps."""
    inner: Inner = Inner()
    names: list[str] = Field(default_factory=lambda: ["a"])
    mode: Literal["x", "y"] | None = Field(default=None, description="said in the field")


class Child(Outer):
    more: bool = True
    """Its own."""


def test_one_row_per_setting_with_type_default_and_text() -> None:
    assert fields(Outer) == [
        FieldRow("steps", "a whole number", "required", "Optimiser steps."),
        FieldRow("inner.rate", "a number > 0 and <= 1", "0.5", "How much, in one unit."),
        FieldRow("names", "a list of text", "['a']", ""),
        FieldRow("mode", "'x', 'y' or null", "null", "said in the field"),
    ]


def test_inherited_settings_keep_their_text() -> None:
    rows = {row.name: row for row in fields(Child)}
    assert rows["steps"].doc == "Optimiser steps."
    assert rows["more"] == FieldRow("more", "true or false", "true", "Its own.")


@pytest.mark.slow
def test_the_real_card_and_recipe_can_be_described() -> None:
    rows = {row.name: row for row in fields(TaskCard) + fields(Recipe)}
    assert rows["policy.lora.r"].type == "a whole number >= 1 and <= 65536"
    assert rows["generation.temperature"].doc == "0 is greedy."
    assert rows["objectives"].type == (
        "a list of a section with kind 'hf-classifier', 'judge', 'lm', 'python', 'rule' or 'sandbox' "
        "(at least 2 and at most 31)"
    )
    assert not [row for row in rows.values() if "typing" in row.type or "class" in row.type.replace("hf-class", "")]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str, "text"),
        (Any, "any value"),
        (dict[str, Any], "a section"),
        (dict[str, float], "a section of a number"),
        (list, "a list"),
        (list[int] | None, "a list of a whole number or null"),
        (tuple[float, ...], "a list of a number"),
        (tuple[int, str], "a list of 2: a whole number, text"),
        (int | float, "a whole number or a number"),
        (Literal[1, "a"] | None, "1, 'a' or null"),
        (Annotated[int, Field(ge=0, multiple_of=4)], "a whole number >= 0 and a multiple of 4"),
        (Annotated[str, Field(min_length=2, max_length=2)], "text (exactly 2)"),
        (Annotated[list[str], Field(min_length=1, max_length=3)], "a list of text (at least 1 and at most 3)"),
        (Annotated[list[str], Field(max_length=3)], "a list of text (at most 3)"),
    ],
)
def test_words(annotation: Any, expected: str) -> None:
    assert words(TypeAdapter(annotation).json_schema()) == expected


def test_yaml_form() -> None:
    value = {"a": [None, True, "b", 1.5], "c": Inner()}
    assert yaml_form(value) == "{a: [null, true, 'b', 1.5], c: {rate: 0.5}}"


def test_a_model_without_source_is_described_without_texts() -> None:
    made = type("Made", (Strict,), {"__annotations__": {"a": int}, "a": 3, "__module__": __name__})
    assert fields(made) == [FieldRow("a", "a whole number", "3", "")]


def test_every_key_path_sections_that_may_be_null_included() -> None:
    class Holder(Strict):
        inner: Inner | None = None
        free: dict[str, int] = Field(default_factory=dict)

    assert key_paths(Holder) == ["inner", "inner.rate", "free"]
    assert key_paths(Outer) == ["steps", "inner", "inner.rate", "names", "mode"]

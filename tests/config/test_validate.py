"""Every problem at once, with file, line, key path, what was found, what is allowed and the nearest name."""

from __future__ import annotations

import copy
import re
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from moalign.config import validate, yaml_lines
from moalign.config.card import TaskCard
from moalign.config.recipe import Recipe
from moalign.config.strict import Strict
from moalign.core.errors import RequestError

PYDANTIC = re.compile(r"Input should|Extra inputs|Field required|validation error|pydantic|Value error|type=|union_tag")
"""pydantic's own wording, which must not reach a person."""


class Circle(Strict):
    kind: Literal["circle"]
    radius: float = Field(gt=0)


class Square(Strict):
    kind: Literal["square"]
    side: float = Field(default=1, gt=0, le=10)
    square: bool = False
    """Named like its tag: the tag must not be taken for the key."""


class Source(Strict):
    path: str
    limit: int | None = Field(default=None, ge=1)


class Inner(Strict):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _ordered(self) -> Inner:
        if self.low > self.high:
            raise ValueError(f"low must not be above high; found {self.low} > {self.high}")
        return self


class Outer(Strict):
    steps: int = Field(default=10, ge=1)
    lr: float = 1e-4
    mode: Literal["soft", "switch"] = "soft"
    shapes: list[Annotated[Circle | Square, Field(discriminator="kind")]] = Field(default_factory=list, max_length=4)
    inner: Inner = Inner()
    source: list[str] | Source | None = None
    pair: tuple[int, float] = (0, 0.0)
    table: dict[str, float] = Field(default_factory=dict)
    label: int | str | None = None
    word: str = Field(default="a", pattern="^[a-z]+$")

    @field_validator("word")
    @classmethod
    def _no_zebra(cls, word: str) -> str:
        if word == "zebra":
            raise ValueError("no zebras; allowed: any other animal")
        return word


KEYS_OF_OUTER = "allowed: steps, lr, mode, shapes, inner, source, pair, table, label, word"


def origin(document: yaml_lines.Document) -> validate.Origin:
    return validate.Origin(document.source, document)


def checked(text: str, model: type[Strict] = Outer) -> list[str]:
    document = yaml_lines.parse(text, "r.yaml")
    return validate.check(model, document.data, origin(document))[1]


def test_right_data_becomes_a_model() -> None:
    document = yaml_lines.parse("steps: 3\nlr: 1e-5\npair: [1, 2]\nshapes: [{kind: square, side: 2}]\n", "r.yaml")
    value, problems = validate.check(Outer, document.data, origin(document))
    assert value is not None and problems == []
    assert (value.steps, value.lr, value.pair) == (3, 1e-5, (1, 2.0))
    assert value.shapes == [Square(kind="square", side=2)]


def test_three_errors_are_all_shown_in_the_order_of_their_lines() -> None:
    text = "steps: many\n\nlr: 1e-5\nmode: sotf\ninner:\n  hihg: 3\n"
    expected = [
        "r.yaml:1: steps: found 'many'; allowed: a whole number >= 1",
        "r.yaml:4: mode: found 'sotf'; allowed: 'soft' or 'switch'; did you mean 'soft'?",
        "r.yaml:6: inner.hihg: unknown key; allowed: low, high; did you mean 'high'?",
    ]
    assert checked(text) == expected


def test_the_data_that_was_checked_is_as_it_was() -> None:
    """Also where misspelt keys and kinds are put right to look behind them."""
    document = yaml_lines.parse("inner: {hihg: 3}\nshapes: [{kind: cirlce, radius: -1}]\nstpes: 2\n", "r.yaml")
    before = copy.deepcopy(document.data)
    assert len(validate.check(Outer, document.data, origin(document))[1]) == 4
    assert document.data == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 0", "steps: found 0; allowed: a whole number >= 1"),
        ("steps: 2.5", "steps: found 2.5; allowed: a whole number >= 1"),
        ("steps: true", "steps: found true; allowed: a whole number >= 1"),
        ("steps: '3'", "steps: found '3'; allowed: a whole number >= 1"),
        ("steps:", "steps: found null; allowed: a whole number >= 1"),
        ("lr: .nan", "lr: found nan; allowed: a finite number"),
        ("lr: 1" + "0" * 400, "lr: found 1" + "0" * 76 + "...; allowed: a number"),
        ("lr: [1, 2]", "lr: found [1, 2]; allowed: a number"),
        ("inner: 3", "inner: found 3; allowed: a section (keys low, high)"),
        ("inner: {low: x}", "inner.low: found 'x'; allowed: a whole number"),
        ("pair: [1]", "pair.1: missing; allowed: a number"),
        ("pair: [1, 2, 3]", "pair: found [1, 2, 3]; allowed: a list of 2: a whole number, a number"),
        ("table: {a: x}", "table.a: found 'x'; allowed: a number"),
        ("label: [1]", "label: found [1]; allowed: a whole number, text or null"),
        ("word: A1", "word: found 'A1'; allowed: text that matches ^[a-z]+$"),
        ("word: zebra", "word: no zebras; allowed: any other animal"),
        ("wrod: a", f"wrod: unknown key; {KEYS_OF_OUTER}; did you mean 'word'?"),
        ("qqqqq: a", f"qqqqq: unknown key; {KEYS_OF_OUTER}"),
    ],
)
def test_one_wrong_value(text: str, expected: str) -> None:
    assert checked("# header\n" + text) == [f"r.yaml:2: {expected}"]


def test_objectives_of_several_kinds() -> None:
    # A misspelt kind does not hide what is wrong with the other keys of its section.
    text = """\
shapes:
  - kind: cirlce
    radius: -1
  - kind: square
    sdie: 2
    square: 3
  - {radius: 2}
  - circle
"""
    assert checked(text) == [
        "r.yaml:2: shapes.0.kind: found 'cirlce'; allowed: circle, square; did you mean 'circle'?",
        "r.yaml:3: shapes.0.radius: found -1; allowed: a number > 0",
        "r.yaml:5: shapes.1.sdie: unknown key; allowed: kind, side, square; did you mean 'side'?",
        "r.yaml:6: shapes.1.square: found 3; allowed: true or false",
        "r.yaml:7: shapes.2.kind: missing; allowed: circle, square",
        "r.yaml:8: shapes.3: found 'circle'; allowed: a section with kind 'circle' or 'square'",
    ]
    assert checked("shapes: [{kind: {}}]") == [
        "r.yaml:1: shapes.0.kind: found an empty section; allowed: circle, square"
    ]
    assert checked("shapes: [{kind: hexagon}]") == ["r.yaml:1: shapes.0.kind: found 'hexagon'; allowed: circle, square"]


def test_too_many_items() -> None:
    (text,) = checked("shapes: [" + ", ".join(["{kind: square, side: 2.5}"] * 5) + "]")
    allowed = "a list of a section with kind 'circle' or 'square' (at most 4)"
    assert text == f"r.yaml:1: shapes: found a list of 5; allowed: {allowed}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source: [a, 3]", "source.1: found 3; allowed: text"),
        ("source: {path: 3}", "source.path: found 3; allowed: text"),
        ("source: {pth: a}", "source.pth: unknown key; allowed: path, limit; did you mean 'path'?"),
        ("source: {path: a, limit: 0}", "source.limit: found 0; allowed: a whole number >= 1 or null"),
        ("source: {}", "source.path: missing; allowed: text"),
        ("source: a", "source: found 'a'; allowed: a list of text, a section (keys path, limit) or null"),
    ],
)
def test_of_a_union_only_the_branch_that_was_meant_is_told(text: str, expected: str) -> None:
    assert checked(text) == [f"r.yaml:1: {expected}"]


def test_of_several_sections_the_one_with_the_fewest_problems_was_meant() -> None:
    class Either(Strict):
        first: Circle | Inner
        second: Inner | Circle

    assert checked("first: {kind: circle, radius: 0}\nsecond: {kind: circle, radius: 0}\n", Either) == [
        "r.yaml:1: first.radius: found 0; allowed: a number > 0",
        "r.yaml:2: second.radius: found 0; allowed: a number > 0",
    ]


def test_a_key_that_is_itself_wrong() -> None:
    class Table(Strict):
        shares: dict[Annotated[str, Field(pattern="^[a-z]+$")], float]

    assert checked("shares:\n  a: 1\n  B2: 2\n  c: x\n", Table) == [
        "r.yaml:3: shares.B2: found the key 'B2'; allowed: text that matches ^[a-z]+$",
        "r.yaml:4: shares.c: found 'x'; allowed: a number",
    ]


def test_a_misspelt_required_key_is_one_problem_and_its_section_is_checked() -> None:
    class Needs(Strict):
        source: Source

    assert checked("sorce:\n  path: 3\n", Needs) == [
        "r.yaml:1: sorce: unknown key; allowed: source; did you mean 'source'?",
        "r.yaml:2: sorce.path: found 3; allowed: text",
    ]
    assert checked("other: 1\n", Needs) == [
        "r.yaml:1: source: missing; allowed: a section (keys path, limit)",
        "r.yaml:1: other: unknown key; allowed: source",
    ]


def test_misspelt_keys_do_not_hide_a_check_over_several_fields() -> None:
    assert checked("stpes: 3\ninner:\n  low: 4\n  hgih: 2\n") == [
        f"r.yaml:1: stpes: unknown key; {KEYS_OF_OUTER}; did you mean 'steps'?",
        "r.yaml:3: inner: low must not be above high; found 4 > 2",
        "r.yaml:4: inner.hgih: unknown key; allowed: low, high; did you mean 'high'?",
    ]


def test_a_second_spelling_of_a_key_that_is_there_is_only_unknown() -> None:
    assert checked("steps: 3\nstep: x\n") == [f"r.yaml:2: step: unknown key; {KEYS_OF_OUTER}; did you mean 'steps'?"]


def test_checks_over_several_fields_point_to_the_line_of_the_field_they_name() -> None:
    card = (
        "name: demo\nkind: text\ndescription: x\nobjectives:\n  - {name: a, kind: rule, rule: length}\n"
        "  - {name: b, kind: rule, rule: length}\nreference_point: [0]\n"
        "sensitivity_point: [0, 0]\ndata: {prompts: [hi]}\n"
    )
    assert checked(card, TaskCard) == ["r.yaml:7: reference_point needs one number per objective (2); found 1"]
    assert checked(card.replace("[0]", "[0, 0]"), TaskCard) == []


def test_plain_data_is_named_by_its_source() -> None:
    assert validate.check(Inner, {"lwo": 1}, validate.Origin("objective 'a'", prefix=("options",)))[1] == [
        "objective 'a': options.lwo: unknown key; allowed: low, high; did you mean 'low'?"
    ]
    assert validate.check(Inner, {"lwo": 1})[1] == ["lwo: unknown key; allowed: low, high; did you mean 'low'?"]


def test_a_section_of_a_document_has_that_documents_lines() -> None:
    document = yaml_lines.parse("method: x\ntask: y\nconfig:\n  steps: 1\n  lr: fast\n", "r.yaml")
    place = validate.Origin("r.yaml", document, ("config",))
    assert validate.check(Outer, document.data["config"], place)[1] == [
        "r.yaml:5: config.lr: found 'fast'; allowed: a number"
    ]


def test_a_value_given_by_an_option_is_named_by_the_option() -> None:
    document = yaml_lines.parse("steps: 1\ninner:\n  low: 1\n", "r.yaml")
    data = {"steps": "x", "inner": {"low": 1, "hihg": 2}, "source": {"limit": 3}, "label": []}
    given = {
        ("steps",): "--set steps",
        ("inner", "hihg"): "--set config.inner.hihg",
        ("source", "limit"): "--set source.limit",
    }
    place = validate.Origin("r.yaml", document, given=given | {("label",): "--set l"})
    assert sorted(validate.check(Outer, data, place)[1]) == [
        "--set config.inner.hihg: unknown key; allowed: low, high; did you mean 'high'?",
        "--set l: label: found []; allowed: a whole number, text or null",
        "--set source.limit: source.path: missing; allowed: text",
        "--set steps: found 'x'; allowed: a whole number >= 1",
    ]


def test_of_two_options_the_later_one_is_named() -> None:
    given = {("inner",): "--set inner", ("inner", "low"): "--set inner.low"}
    assert validate.check(Outer, {"inner": {"low": "x", "high": "y"}}, validate.Origin(given=given))[1] == [
        "--set inner.low: found 'x'; allowed: a whole number",
        "--set inner: inner.high: found 'y'; allowed: a whole number",
    ]


def test_a_request_error_of_a_models_own_check_is_placed() -> None:
    class Own(Strict):
        a: int = 0

        @model_validator(mode="after")
        def _refuse(self) -> Own:
            raise RequestError("first thing", "second thing")

    assert checked("a: 1", Own) == ["r.yaml:1: first thing", "r.yaml:1: second thing"]
    assert checked("b: 1", Own) == ["r.yaml:1: b: unknown key; allowed: a"]  # told, not hidden, not raised


def test_long_values_are_cut() -> None:
    (text,) = checked(f"steps: '{'x' * 500}'")
    assert len(text) < 160
    assert "..." in text
    (text,) = checked("steps: {a: 1, b: 2}")
    assert text == "r.yaml:1: steps: found a section with keys a, b; allowed: a whole number >= 1"


KEYS = ["kind", "path", "side", "radius", "low", "x"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=6,
)
cards = st.dictionaries(st.sampled_from([*TaskCard.model_fields, "objectivs", "x"]), values, max_size=8)
recipes = st.dictionaries(st.sampled_from([*Recipe.model_fields, "confg", "x"]), values, max_size=8)
outers = st.dictionaries(st.sampled_from([*Outer.model_fields, "stpes", "x"]), values, max_size=8)
pairs = st.tuples(st.just(TaskCard), cards) | st.tuples(st.just(Recipe), recipes) | st.tuples(st.just(Outer), outers)


@settings(deadline=None, max_examples=150)
@given(data=pairs)
def test_any_data_is_accepted_or_refused_in_plain_words(data: tuple[type[Strict], dict[str, Any]]) -> None:
    model, plain = data
    value, messages = validate.check(model, plain, validate.Origin("r.yaml"))
    assert not [text for text in messages if PYDANTIC.search(text)]
    assert all(text.startswith("r.yaml: ") for text in messages)
    assert len(set(messages)) == len(messages)
    assert value is None if messages else isinstance(value, model)


@settings(deadline=None, max_examples=60)
@given(
    wrong=st.sets(st.sampled_from(["steps", "lr", "mode", "table", "word"]), min_size=1),
    unknown=st.sets(st.text("qxz", min_size=6, max_size=9), max_size=3),
)
def test_every_wrong_key_is_told_on_its_own_line(wrong: set[str], unknown: set[str]) -> None:
    keys = sorted(wrong | unknown)
    messages = checked("".join(f"{key}: [[]]\n" for key in keys))
    assert [text.split(": ")[:2] for text in messages] == [
        [f"r.yaml:{line}", key] for line, key in enumerate(keys, start=1)
    ]

"""``--set a.b=c``: typed values, deep copies, and every malformed form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config import overrides
from moalign.core.errors import RequestError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=c", (("a", "b"), "c")),
        ("lr=1e-4", (("lr",), 1e-4)),
        ("steps=20", (("steps",), 20)),
        ("label=null", (("label",), None)),
        ("marker=''", (("marker",), "")),
        ("prefs=[[0.3, 0.7], [1, 0]]", (("prefs",), [[0.3, 0.7], [1, 0]])),
        ("a={b: 1}", (("a",), {"b": 1})),
        ("template.plain=Q: {prompt} = A", (("template", "plain"), "Q: {prompt} = A")),
        (" a . b = 3 ", (("a", "b"), 3)),
    ],
)
def test_parse(text: str, expected: Any) -> None:
    assert overrides.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps", "--set steps: no '=' found; write --set key=value"),
        ("", "--set : no '=' found"),
        ("=3", "--set =3: found an empty key"),
        ("a..b=3", "--set a..b=3: found an empty key"),
        ("a.b.=3", "--set a.b.=3: found an empty key"),
        ("a=", "--set a=: no value after '='; write null for nothing and '' for empty text"),
        ("a.b=[1, 2", "--set a.b: broken YAML"),
        ("a={b: 1, b: 2}", "--set a: the key 'b' stands twice"),
    ],
)
def test_malformed(text: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        overrides.parse(text)
    assert str(caught.value).startswith(expected)


def test_put_makes_sections_and_reaches_into_lists() -> None:
    data: dict[str, Any] = {"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}], "empty": None}
    value = [1]
    sets = [(("a", "c", "d"), value), (("list", "1", "x"), 5), (("empty", "k"), 1), (("a", "b"), 2), (("a", "b"), 3)]
    assert [overrides.put(data, keys, given) for keys, given in sets] == [None] * len(sets)
    assert data == {"a": {"b": 3, "c": {"d": [1]}}, "list": [{"x": 1}, {"x": 5}], "empty": {"k": 1}}
    value.append(2)
    assert data["a"]["c"]["d"] == [1]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (("seed", "x"), "seed is 3, not a section; it has no key 'x'"),
        (("list", "2"), "list is a list; found position '2'; allowed: 0 to 1"),
        (("list", "first", "x"), "list is a list; found position 'first'; allowed: 0 to 1"),
        (("none", "0"), "none is a list; found position '0'; allowed: none, the list is empty"),
        (("ok",), None),
    ],
)
def test_a_path_that_leads_nowhere(keys: tuple[str, ...], problem: str | None) -> None:
    assert overrides.put({"seed": 3, "list": [1, 2], "none": []}, keys, 1) == problem


names = st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=100)
@given(keys=names, value=values)
def test_what_is_set_is_read_back(keys: tuple[str, ...], value: Any) -> None:
    parsed = overrides.parse(f"{'.'.join(keys)}={json.dumps(value)}")
    assert parsed == (keys, value)
    place: Any = {}
    overrides.put(place, *parsed)
    for key in keys:
        place = place[key]
    assert place == value
    assert type(place) is type(value)


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        keys, _ = overrides.parse(text)
    except RequestError as error:
        assert str(error).startswith("--set ")
    else:
        assert keys
        assert all(keys)


OWN = ["steps", "first", "first.lr", "first.batch", "second", "second.lr", "second.deep", "second.deep.batch"]
CARD = [
    "task.pool",
    "task.pool.batch",
    "task.grid",
    "task.a.top",
    "task.b.top",
    "task.c.top",
    "task.d.top",
    "task.a.b.kilogram",
]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("stepz", "; did you mean 'steps'?"),
        ("lr", "; did you mean 'first.lr' or 'second.lr'?"),
        ("batch", "; did you mean 'first.batch' or 'second.deep.batch'?"),  # the card's only where no other has it
        ("grid", "; did you mean 'task.grid'?"),
        ("deep.batch", "; did you mean 'second.deep.batch'?"),
        ("frist.lrr", "; did you mean 'first.lr'?"),
        ("frist.zzz", ""),
        ("grid.0.x", "; did you mean 'task.grid.0.x'?"),
        ("grdi.0.x", ""),
        ("kilogrm", ""),  # what only looks like a name deep in a section,
        ("tsk.grid", "; did you mean 'task.grid'?"),
        ("top", "; did you mean 'task.a.top', 'task.b.top' or 'task.c.top'?"),
        ("zzz.lr", "; did you mean 'first.lr' or 'second.lr'?"),
        ("qqqq", ""),
    ],
)
def test_the_nearest_settings_are_offered_with_their_sections(keys: str, expected: str) -> None:
    assert overrides.did_you_mean(tuple(keys.split(".")), OWN, CARD) == expected

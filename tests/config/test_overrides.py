"""``--set a.b=c``: typed values, deep copies, and every malformed form."""

from __future__ import annotations

import copy
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


def test_apply_makes_sections_reaches_into_lists_and_changes_nothing_it_was_given() -> None:
    data = {"a": {"b": 1}, "list": [{"x": 1}, {"x": 2}], "empty": None}
    before = copy.deepcopy(data)
    value = [1]
    result = overrides.apply(
        data, [(("a", "c", "d"), value), (("list", "1", "x"), 5), (("empty", "k"), 1), (("a", "b"), 2), (("a", "b"), 3)]
    )
    assert result == {"a": {"b": 3, "c": {"d": [1]}}, "list": [{"x": 1}, {"x": 5}], "empty": {"k": 1}}
    assert data == before
    value.append(2)
    assert result["a"]["c"]["d"] == [1]


def test_apply_names_every_path_that_leads_nowhere() -> None:
    data = {"seed": 3, "list": [1, 2], "none": []}
    wrong = [("seed", "x"), ("list", "2"), ("list", "first", "x"), ("none", "0"), ("ok",)]
    with pytest.raises(RequestError) as caught:
        overrides.apply(data, [(keys, 1) for keys in wrong])
    assert caught.value.problems == (
        "--set seed.x: seed is 3, not a section; it has no key 'x'",
        "--set list.2: list is a list; found position '2'; allowed: 0 to 1",
        "--set list.first.x: list is a list; found position 'first'; allowed: 0 to 1",
        "--set none.0: none is a list; found position '0'; allowed: none, the list is empty",
    )


names = st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=100)
@given(keys=names, value=values)
def test_what_is_set_is_read_back(keys: tuple[str, ...], value: Any) -> None:
    parsed = overrides.parse(f"{'.'.join(keys)}={json.dumps(value)}")
    assert parsed == (keys, value)
    place: Any = overrides.apply({}, [parsed])
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

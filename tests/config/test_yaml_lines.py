"""YAML with line numbers: scalars as people mean them, lines, and every kind of broken file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config import yaml_lines
from moalign.core.errors import RequestError


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RequestError) as caught:
        yaml_lines.parse(text, "r.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("10", 10),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),  # YAML 1.1 reads 8
        ("1:30", "1:30"),  # YAML 1.1 reads 90
        ("1_000", "1_000"),
        ("no", "no"),  # YAML 1.1 reads false
        ("yes", "yes"),
        ("2026-01-01", "2026-01-01"),  # YAML 1.1 reads a date
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'1e-5'", "1e-5"),
        ("=", "="),
        ("nan", "nan"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: Any) -> None:
    result = yaml_lines.parse(f"key: {text}", "r.yaml").data["key"]
    assert result == value
    assert type(result) is type(value)
    assert yaml_lines.parse_value(text, "--set key") == value


def test_nan_and_nothing() -> None:
    data = yaml_lines.parse("a: .nan\nb:\n", "r.yaml").data
    assert math.isnan(data["a"])
    assert data["b"] is None


TEXT = """\
# a header
name: demo

objectives:
  - name: a
    kind: rule
  -
    name: b
data: {prompts: {path: x}}
"""


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("name",), 2),
        (("objectives",), 4),
        (("objectives", 0), 5),
        (("objectives", 0, "kind"), 6),
        (("objectives", "1", "name"), 8),
        (("data", "prompts", "path"), 9),
        (("objectives", 0, "missing"), 5),
        (("objectives", 5, "name"), 4),
        (("objectives", "x"), 4),
        (("name", "deeper"), 2),
        (("missing",), 2),
        ((), 2),
    ],
)
def test_lines_of_keys_and_of_the_nearest_parent(keys: tuple[str | int, ...], line: int) -> None:
    assert yaml_lines.parse(TEXT, "r.yaml").line(*keys) == line


def test_has_tells_what_stands_in_the_file() -> None:
    document = yaml_lines.parse(TEXT, "r.yaml")
    assert document.has("objectives", 1, "name")
    assert document.has()
    assert not document.has("objectives", 2)
    assert not document.has("data", "pairs")


def test_every_duplicate_key_is_named_with_both_lines() -> None:
    assert problems("a: 1\nb: {c: 1, d: 2, c: 3}\na: 2\n") == (
        "r.yaml:3: the key 'a' stands twice (first on line 1)",
        "r.yaml:2: the key 'c' stands twice (first on line 2)",
    )


def test_keys_are_text() -> None:
    assert problems("1: a\n? [x]\n: b\ntrue: c\n") == (
        "r.yaml:1: the key '1' is not text; put it in quotes",
        "r.yaml:2: found a list as a key; a key is text",
        "r.yaml:4: the key 'true' is not text; put it in quotes",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml: is empty"),
        ("# only a comment\n", "r.yaml: is empty"),
        ("- a\n- b\n", "r.yaml:1: found a list; a section of keys"),
        ("\n\njust text\n", "r.yaml:3: found the value 'just text'"),
        ("a: 1\nb: [1, 2\nc: 3\n", "r.yaml:3: broken YAML"),
        ("a: 1\n\tb: 2\n", "indent with spaces, not tabs"),
        ("a: 1\nb: Q: {prompt}\n", "r.yaml:2: broken YAML: a second ':' in one value; put the value in quotes"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: broken YAML"),
        ("a: *nowhere\n", "r.yaml:1: broken YAML"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "r.yaml:2: found the tag !!python/object/apply:os.system"),
        ("!!binary a: 1\n", "r.yaml:1: the key 'a' is not text"),
        ("a: !!binary aGk=\n", "r.yaml:1: found the tag !!binary"),
        ("a: 1\nb: !!int abc\n", "r.yaml:2: found the tag !!int"),
        ("a: 1\nb: !!bool abc\n", "r.yaml:2: found the tag !!bool"),
        ("a: 1\nb: !!map [1]\n", "r.yaml:2: found the tag !!map"),
        ('a: 1\nb: "\\ud800"\n', "r.yaml:2: broken YAML: an escape of half a character"),
        ("a: 1\nb: \x00\n", "r.yaml:2: the character U+0000 is not allowed"),
        ("a: &a [1, *a]\n", "r.yaml:1: an alias that names its own parent"),
        ("b: 1\na: &a {<<: *a}\n", "r.yaml:2: an alias that names its own parent"),
        ("b: 1\na: &a {<<: [*a, *a]}\n", "r.yaml:2: an alias that names its own parent"),
        ("b: 1\na: &a {<<: {c: 1, <<: *a}}\n", "r.yaml:2: an alias that names its own parent"),
        ("b: 1\na: &a {c: {<<: *a}}\n", "r.yaml:2: an alias that names its own parent"),
        ("a0: &a0 {b: 1}\n" + "".join(f"a{i}: &a{i} {{<<: *a{i - 1}}}\n" for i in range(1, 500)), "r.yaml:2: nested"),
        ("a: &a 1\nb: *a\nc: &a 2\n", "r.yaml:3: broken YAML: the anchor 'a' stands twice (first on line 1)"),
        ("a: 1\nb: [1,\n\t2]\n", "r.yaml:3: broken YAML: found character '\\t' that cannot start any token (indent w"),
        ("a: 1\nb: {c: 1,\n \t d: 2}\n", "r.yaml:3: broken YAML: found character '\\t' that cannot start any token"),
        ("a: {\n\t}\n", "r.yaml:2: broken YAML: found character '\\t' that cannot start any token"),
        ("a: 1\nb: x\x85y\n", "r.yaml:2: broken YAML: the character U+0085 outside quotes"),
        ("a: 1\nb: x\u2028\n", "r.yaml:2: broken YAML: the character U+2028 outside quotes"),
        ("{a: 1} {b: 2}\n", "r.yaml:1: broken YAML: expected '<document start>', but found '{'"),
        ("a: 1\n... ]\n", "r.yaml:2: broken YAML: found non-comment content after document end marker, ']'"),
        ("a: 1\nb: !!str [1]\n", "r.yaml:2: found the tag !!str on a list"),
        ("a: 1\nb: !!map [1]\n", "r.yaml:2: found the tag !!map on a list"),
        ("a: 1\nb: !!seq {c: 1}\n", "r.yaml:2: found the tag !!seq on a section"),
        ('a: 1\nb: "\\U00110000"\n', "r.yaml:2: broken YAML: an escape beyond U+10FFFF"),
        ('a: 1\nb: "\\Uffffffff"\n', "r.yaml:2: broken YAML: an escape beyond U+10FFFF"),
        ("a: 1\nb: {<<: 3}\n", "r.yaml:2: broken YAML: '<<' takes a section"),
        ("a: 1\nb: !!int 3\n", "r.yaml:2: found the tag !!int"),
        ("a: " + "[" * 2000, "r.yaml:1: nested more than 50 levels deep"),
        ("a: " + "[" * 60 + "]" * 60, "r.yaml:1: nested more than 50 levels deep"),
        ("a: 0x" + "f" * 5000, "r.yaml:1: broken YAML: Exceeds the limit"),
        ("a: " + "9" * 5000, "r.yaml:1: broken YAML: Exceeds the limit"),
    ],
)
def test_broken_files_are_one_request_error_with_a_line(text: str, expected: str) -> None:
    assert expected in problems(text)[0]


def test_aliases_that_expand_to_billions_are_refused_quickly() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    result = problems("\n".join(rows))
    assert "once aliases are expanded" in result[0]
    assert result[0].startswith("r.yaml:5:")
    assert not any(text.startswith("r.yaml:6:") for text in result)  # named where it starts, not at every level


def test_a_merged_section_keeps_its_lines() -> None:
    document = yaml_lines.parse("base: &base\n  a: 1\n  b: 2\nmine:\n  <<: *base\n  b: 3\n", "r.yaml")
    assert document.data["mine"] == {"a": 1, "b": 3}
    assert document.line("mine", "b") == 6
    assert document.line("mine", "a") == 2


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"^none.yaml: cannot be read: No such file"):
        yaml_lines.load("none.yaml")
    with pytest.raises(RequestError, match=r"cannot be read: Is a directory"):
        yaml_lines.load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(RequestError, match=r"^latin.yaml: byte 3 is not UTF-8"):
        yaml_lines.load(tmp_path / "latin.yaml")


def test_load_shows_a_short_path_and_skips_a_byte_order_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_bytes("\ufeffa: ü\n".encode())
    monkeypatch.chdir(tmp_path)
    document = yaml_lines.load(tmp_path / "r.yaml")
    assert document.source == "r.yaml"
    assert document.data == {"a": "ü"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Q: {prompt}", "Q: {prompt}"),
        ("a # b", "a # b"),
        ("[1, 1e-3, null]", [1, 1e-3, None]),
        ("{a: 1}", {"a": 1}),
        ("''", ""),
        ('"a: b"', "a: b"),
        ("<<", "<<"),
        ("*x", "*x"),
        ("../models/base", "../models/base"),
    ],
)
def test_one_value_from_the_command_line(text: str, value: Any) -> None:
    assert yaml_lines.parse_value(text, "--set k") == value


def test_a_broken_value_names_its_option() -> None:
    with pytest.raises(RequestError, match=r"^--set k: broken YAML"):
        yaml_lines.parse_value("[1, 2", "--set k")
    with pytest.raises(RequestError, match=r"^--set k: broken YAML: an escape beyond U\+10FFFF"):
        yaml_lines.parse_value('"\\Uffffffff"', "--set k")


def test_half_a_character_is_refused_on_the_command_line_too() -> None:
    half = r"^--set k: broken YAML: an escape of half a character \(U\+D800 to U\+DFFF\)$"
    for text in ("\udcff", "x\ud800", '"\\ud800"'):
        with pytest.raises(RequestError, match=half):
            yaml_lines.parse_value(text, "--set k")


@pytest.mark.parametrize("text", ["a: [\t1,\t2 ]\n", "a: [1, # one\tthing\n 2]\n"])
def test_tabs_that_indent_nothing_are_read(text: str) -> None:
    assert yaml_lines.parse(text, "r.yaml").data == {"a": [1, 2]}


def test_quoted_text_keeps_its_line_separator() -> None:
    assert yaml_lines.parse("a: 'x\u2028y'\n", "r.yaml").data == {"a": "x\u2028y"}


plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(data=st.dictionaries(st.text(max_size=8), trees, min_size=1, max_size=4))
def test_json_is_read_back_unchanged(data: dict[str, Any]) -> None:
    assert yaml_lines.parse(json.dumps(data), "r.yaml").data == data


names = st.text("abcd", min_size=1, max_size=3)
shapes = st.recursive(
    st.integers(0, 9),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(names, inner, min_size=1, max_size=3),
    max_leaves=12,
)


def written(value: Any, keys: tuple[str | int, ...], rows: list[str], lines: dict[tuple[str | int, ...], int]) -> None:
    """An emitter of its own: every key and every item on a new line, its line noted."""
    indent = "  " * len(keys)
    if isinstance(value, dict):
        for key, item in value.items():
            rows.append(f"{indent}{key}:")
            lines[(*keys, key)] = len(rows)
            written(item, (*keys, key), rows, lines)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            rows.append(f"{indent}-")
            written(item, (*keys, index), rows, lines)
    else:
        rows.append(f"{indent}{value}")


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(data=st.dictionaries(names, shapes, min_size=1, max_size=4))
def test_the_line_of_every_key_is_the_one_it_was_written_on(data: dict[str, Any]) -> None:
    rows: list[str] = []
    lines: dict[tuple[str | int, ...], int] = {}
    written(data, (), rows, lines)
    document = yaml_lines.parse("\n".join(rows), "r.yaml")
    assert document.data == data
    assert {keys: document.line(*keys) for keys in lines} == lines
    assert all(document.line(*keys, "absent") == line for keys, line in lines.items())


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        document = yaml_lines.parse(text, "r.yaml")
    except RequestError as error:
        assert str(error).startswith("r.yaml")
    else:
        assert isinstance(document.data, dict)


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="[]{}:,'\"#&*!|>-? ab1.e\n\t", max_size=40))
def test_any_value_is_read_or_refused(text: str) -> None:
    try:
        yaml_lines.parse_value(text, "--set k")
        yaml_lines.parse(text, "--set k")
    except RequestError as error:
        assert str(error).startswith("--set k")

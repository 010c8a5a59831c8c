"""``--set a.b=c``: one setting changed from the command line, typed as if it stood in the file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from moalign.config.describe import either
from moalign.config.yaml_lines import parse_value
from moalign.core.errors import RequestError, nearest


def parse(text: str) -> tuple[tuple[str, ...], Any]:
    """Split ``a.b=c`` into its key path and its value.

    The value is read as YAML: ``1e-4`` is a number, ``null`` nothing, ``[1, 2]`` a list, ``''`` empty text.

    >>> parse("config.lr=1e-4")
    (('config', 'lr'), 0.0001)

    Raises:
        RequestError: no ``=``, an empty key, no value, or a value that is broken YAML.
    """
    name, equals, value = text.partition("=")
    keys = tuple(key.strip() for key in name.split("."))
    if not equals:
        raise RequestError(f"--set {text}: no '=' found; write --set key=value, like --set seed=3")
    if not all(keys):
        raise RequestError(f"--set {text}: found an empty key; write --set key.key=value, like --set policy.lora.r=8")
    if not value.strip():
        raise RequestError(f"--set {text}: no value after '='; write null for nothing and '' for empty text")
    return keys, parse_value(value, f"--set {'.'.join(keys)}")


def put(target: Any, keys: tuple[str, ...], value: Any) -> str | None:
    """Set a copy of ``value`` inside ``target``, missing sections are made; return what is wrong, or None.

    A key that meets a list is a position, counted from 0 (``objectives.0.maximise``). The path must not lead through a
    plain value, or to a position that the list does not have.
    """
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        slot: Any = key
        if isinstance(target, list):
            if not key.isdecimal() or int(key) >= len(target):
                listed = f"0 to {len(target) - 1}" if target else "none, the list is empty"
                return f"{'.'.join(keys[:depth])} is a list; found position {key!r}; allowed: {listed}"
            slot = int(key)
        elif not isinstance(target, dict):
            return f"{'.'.join(keys[:depth])} is {target!r}, not a section; it has no key {key!r}"
        if last:
            target[slot] = copy.deepcopy(value)
        else:
            if (target.get(slot) if isinstance(target, dict) else target[slot]) is None:
                target[slot] = {}
            target = target[slot]
    return None


def did_you_mean(keys: tuple[str, ...], *groups: Sequence[str]) -> str:
    """Return ``; did you mean 'first.lr' or 'second.lr'?`` for a setting that there is not; empty when none is near.

    ``groups`` are key paths, those of a group preferred to those of the next. A setting of the very name, in whatever
    section, is preferred to one of a similar name; of more than three the three nearest to the top are offered.
    """
    found = list(map(repr, _near(keys, groups)))
    return f"; did you mean {either(found)}?" if found else ""


def _near(keys: tuple[str, ...], groups: Sequence[Sequence[str]]) -> list[str]:
    if found := _ending(keys, groups):
        return found
    if len(keys) == 1:
        near_top = [[path for path in group if path.count(".") < 2] for group in groups]  # a chance likeness is no hint
        name = nearest(keys[0], [path.rpartition(".")[2] for group in near_top for path in group])
        return _ending((name,), near_top) if name else []
    rest: list[str] = []
    for head in _near(keys[:1], [_with_sections(group) for group in groups])[:1]:
        below = [[path.removeprefix(f"{head}.") for path in group if path.startswith(f"{head}.")] for group in groups]
        if any(below):
            rest = _near(keys[1:], below)
        elif head.rpartition(".")[2] == keys[0]:  # a list, or a section of any keys
            rest = [".".join(keys[1:])]
        if rest:
            return [f"{head}.{path}" for path in rest]
    return _ending(keys[-1:], groups)


def _ending(keys: tuple[str, ...], groups: Sequence[Sequence[str]]) -> list[str]:
    """Return the key paths that end with these keys, of the first group that has any: the one at the top, or three."""
    for group in groups:
        found = [path for path in group if tuple(path.split("."))[-len(keys) :] == keys]
        found.sort(key=lambda path: path.count("."))
        if found:
            return found[:3] if "." in found[0] else found[:1]
    return []


def _with_sections(paths: Sequence[str]) -> list[str]:
    """Return the key paths and those of the sections that hold them, each once."""
    parts = [path.split(".") for path in paths]
    return list(dict.fromkeys(".".join(keys[:length]) for keys in parts for length in range(1, len(keys) + 1)))

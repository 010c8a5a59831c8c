"""``--set a.b=c``: one setting changed from the command line, typed as if it stood in the file."""

from __future__ import annotations

import copy
from typing import Any

from moalign.config.yaml_lines import parse_value
from moalign.core.errors import RequestError


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

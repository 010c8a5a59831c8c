"""From Python values to the texts of the command line, so that both are read, checked and recorded in one place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference

Vector = str | Sequence[float]
"""One number per objective, in the task's order; or the same as text, like ``"0.3,0.7"``."""
Settings = Mapping[str, Any] | Sequence[str]
"""``{"policy.lora.r": 4}`` or ``{"policy": {"lora": {"r": 4}}}``; or texts like ``"policy.lora.r=4"``."""


def vector_text(vector: Vector) -> str:
    """Return a vector as an option's text; numbers are written so that they read back as they are.

    >>> vector_text([0.3, 0.7])
    '0.3,0.7'
    """
    return vector if isinstance(vector, str) else ",".join(str(number) for number in _items(vector))


def vector_texts(vectors: Vector | Iterable[Vector] | None) -> tuple[str, ...]:
    """Return one vector or several as texts, none for None.

    >>> vector_texts((0.3, 0.7)), vector_texts([(0.3, 0.7), (1, 0)])
    (('0.3,0.7',), ('0.3,0.7', '1,0'))
    """
    if vectors is None or isinstance(vectors, str):
        return () if vectors is None else (vectors,)
    items = _items(vectors)
    if items and not any(isinstance(item, Iterable) for item in items):
        return (vector_text(items),)
    return tuple(vector_text(item) for item in items)


def _items(values: Any) -> list[Any]:
    """Return what a sequence or an array holds, arrays as plain numbers."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def setting_texts(settings: Settings | None) -> tuple[str, ...]:
    """Return settings as the texts of ``--set``, in order; texts are returned as they are.

    Raises RequestError for a key that is not a name.

    >>> setting_texts({"steps": 2, "task": {"grid": 3, "template.words": None}})
    ('steps=2', 'task.grid=3', 'task.template.words=null')
    """
    if settings is None or isinstance(settings, str):
        return () if settings is None else (settings,)
    if not isinstance(settings, Mapping):
        return tuple(settings)
    return tuple(f"{key}={_value(key, value)}" for key, value in _flat(settings, ""))


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if not isinstance(key, str) or "=" in key:
            raise RequestError(f"settings: found the key {key!r}; allowed: names like 'steps' or 'policy.lora.r'")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(key: str, value: Any) -> str:
    """Return a value as the YAML that ``--set`` reads it from: JSON is YAML."""

    def plain(other: Any) -> Any:
        if isinstance(other, Path):
            return str(other)
        if hasattr(other, "tolist"):  # an array or a number of numpy
            return other.tolist()
        if isinstance(other, set | frozenset):
            return sorted(other)
        raise RequestError(
            f"settings: {key}: found {type(other).__name__}; allowed: numbers, texts, paths, None, lists, mappings"
        )

    return json.dumps(value, default=plain, ensure_ascii=False)


def refuse_both(prefs: object, grid: int | None) -> None:
    """Raise RequestError when preferences are named and a grid is requested, too."""
    if prefs and grid is not None:
        raise RequestError("--prefs and --grid exclude each other: name the vectors, or the size of a grid")


def is_set(key: str, settings: Sequence[str]) -> str | None:
    """Return the ``--set`` text that gives a key, the last of several; None where there is none."""
    return next((text for text in reversed(settings) if text.partition("=")[0].strip() == key), None)


def refuse_contradiction(option: str, key: str, settings: Sequence[str]) -> None:
    """Raise RequestError when ``--set`` gives the key that an option gives otherwise."""
    if (text := is_set(key, settings)) is not None:
        raise RequestError(f"{option} and --set {text} contradict each other; give one of them")


Objectives = Sequence[str] | Mapping[str, Sequence[str]]
"""Names, or by name the words that name each."""


def requested(vectors: Sequence[str], grid: int | None, objectives: Objectives) -> list[Preference] | None:
    """Return the preferences that were named or make up the grid, each once; None where neither was given."""
    if vectors:
        return list(dict.fromkeys(preferences.parse(text, objectives) for text in vectors))
    return None if grid is None else preferences.grid_of(len(objectives), grid)


def required(vectors: Sequence[str], objectives: Objectives) -> list[Preference]:
    """Return the preferences that were named, each once; RequestError where there is none."""
    return list(dict.fromkeys(preferences.required(text, objectives) for text in vectors or (None,)))


def reference_point(text: str, objectives: Sequence[str]) -> tuple[float, ...]:
    """Return a reference point, one number per objective; RequestError for another length or what is no number."""
    from moalign.pareto.points import parse_ref

    corner, count = parse_ref(text), len(objectives)
    if len(corner) != count:
        raise RequestError(
            f"--ref {text}: found {len(corner)} number{'s' if len(corner) != 1 else ''}; the task has {count} "
            f"objectives ({', '.join(objectives)}), so give {count}, like --ref {','.join(['0'] * count)}"
        )
    return corner


def refuse_unequal(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise RequestError unless both are lists of one length that hold texts."""

    def count(texts: Sequence[str], noun: str) -> str:
        if isinstance(texts, str):
            return f"one text for the {noun}s"
        return f"{len(texts)} {noun}{'s' if len(texts) != 1 else ''}"

    if isinstance(prompts, str) or isinstance(responses, str) or len(prompts) != len(responses):
        raise RequestError(
            f"found {count(prompts, 'prompt')} and {count(responses, 'response')}; allowed: lists of one length, "
            "a prompt for each response"
        )
    require_texts("prompt", prompts)
    require_texts("response", responses)


def require_texts(noun: str, texts: Iterable[object]) -> None:
    """Raise RequestError for the first value that is no text, as an empty cell of a table is in pandas."""
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise RequestError(f"{noun} {number}: found {text!r} ({type(text).__name__}); a text is needed")

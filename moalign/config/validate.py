"""One check for task cards, recipes and methods' configs: every problem at once, in plain words.

pydantic finds the errors; this module turns them into messages: file and line (or the ``--set`` option), key path, what
was found, what is allowed, the nearest valid name. An unknown key does not hide other problems: the data is repaired
with the nearest key and checked again.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moalign.config.describe import Schema, bare, schema_of, tags, words, yaml_form
from moalign.config.strict import Strict
from moalign.config.yaml_lines import Document, Key
from moalign.core.errors import RequestError, did_you_mean, nearest

Path = tuple[Key, ...]
Model = TypeVar("Model", bound=Strict)

_MISSING = object()


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a line of a file or a ``--set`` option."""

    source: str = ""
    """The file (or anything else that names where the data stands)."""
    lines: Document | None = None
    prefix: Path = ()
    """Key path of the data inside the document, such as ``("config",)``."""
    given: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """Key path in the document -> label such as ``--set config.lr`` of every value set by an option."""

    def option(self, path: Path) -> str | None:
        """Return the label of the option that set the value at ``path`` (below ``prefix``), or None."""
        keys = tuple(map(str, (*self.prefix, *path)))
        return next((text for key, text in reversed(list(self.given.items())) if keys[: len(key)] == key), None)

    def at(self, path: Path) -> str:
        """Return ``FILE:LINE`` or ``--set key`` for the value at ``path``, or for its nearest parent."""
        if label := self.option(path):
            return label
        for length in range(len(path), -1, -1):
            keys = tuple(map(str, (*self.prefix, *path[:length])))
            if self.lines is not None and keys in self.lines.lines:
                return f"{self.source}:{self.lines.lines[keys]}"
            inside = (label for key, label in self.given.items() if length and key[: len(keys)] == keys)
            if label := next(inside, None):
                return label
        return self.source

    def sentence(self, path: Path, text: str, anchor: Path | None = None) -> str:
        """Return ``FILE:LINE: key.path: text``; ``anchor`` is where the line is looked up instead of at ``path``."""
        place, keys = self.at(path if anchor is None else anchor), ".".join(map(str, (*self.prefix, *path)))
        # "--set a.b" already ends with the key path, unless the problem is deeper.
        if place.startswith("--set ") and place.endswith((f" {keys}", f".{keys}")):
            keys = ""
        return ": ".join(part for part in (place, keys, text) if part)


class _Union(NamedTuple):
    """A value that may be one of several kinds, and the kind whose problem is reported."""

    path: Path
    schema: Schema
    label: str
    branch: Schema


@dataclass(frozen=True)
class _Problem:
    path: Path
    text: str
    union: _Union | None = None
    """The outermost union on the way."""
    anchor: Path | None = None
    """Where the line is looked up, when it differs from ``path``."""
    unknown: bool = False
    """The key is unknown; otherwise its value is wrong or missing."""
    nearest: str | None = None
    """For an unknown key the nearest key, for an unknown tag the nearest tag."""


def check(model: type[Model], data: Mapping[str, Any], origin: Origin | None = None) -> tuple[Model | None, list[str]]:
    """Return the checked section and no problems, or None and every problem in the order of the lines.

    A problem is ``FILE:LINE: key.path: found X; allowed: Y; did you mean 'z'?``; ``origin`` is where the data stands.
    """
    value, placed = check_places(model, data, origin)
    return value, list(dict.fromkeys(text for _, text in placed))


def check_places(
    model: type[Model], data: Mapping[str, Any], origin: Origin | None = None
) -> tuple[Model | None, list[tuple[Path, str]]]:
    """Check as :func:`check` does; every problem comes with its key path, which is empty for one of the whole."""
    origin = origin or Origin()
    problems: list[_Problem] = []
    renamed: dict[Path, Path] = {}  # as repaired -> as written
    repaired: Any = copy.deepcopy(dict(data))
    value = None
    try:
        value, errors = _parse(model, repaired)
        while repairable := [problem for problem in errors if problem.unknown or problem.nearest is not None]:
            problems += [_as_written(problem, renamed) for problem in repairable]
            for problem in repairable:
                _repair(repaired, problem, renamed)
            errors = _parse(model, repaired)[1]
        problems += [_as_written(problem, renamed) for problem in errors]
    except RequestError as error:  # of a model's own validator; shown once the keys are right
        problems = problems or [_Problem((), text) for text in error.problems]
    if not problems:
        return value, []
    problems.sort(key=lambda problem: problem.unknown)  # of one line, what is wrong before what is unknown
    texts = [origin.sentence(problem.path, problem.text, problem.anchor) for problem in problems]
    placed = zip((problem.path for problem in problems), texts, strict=True)
    return None, sorted(placed, key=lambda problem: _line(problem[1]))


def _parse(model: type[Model], data: Any) -> tuple[Model | None, list[_Problem]]:
    try:
        # JSON is pydantic's strict yet sensible mode: no "yes" for true, no 3.0 for 3, but lists for tuples.
        return model.model_validate_json(json.dumps(data), strict=True), []
    except ValidationError as error:
        schema, details = schema_of(model), error.errors(include_url=False)
        return None, _of_meant_branches([_problem(schema, data, detail) for detail in details], data)


def _line(text: str) -> int:
    number = text.split(": ", 1)[0].rpartition(":")[2]
    return int(number) if number.isdecimal() else 0


def _repair(data: Any, problem: _Problem, renamed: dict[Path, Path]) -> None:
    *parents, key = problem.path
    section = _value(data, tuple(parents))
    if not problem.unknown:
        section[key] = problem.nearest
        return
    value = section.pop(key)
    if problem.nearest is not None and problem.nearest not in section:
        section[problem.nearest] = value
        renamed[(*parents, problem.nearest)] = problem.path


def _as_written(problem: _Problem, renamed: Mapping[Path, Path]) -> _Problem:
    def written(path: Path) -> Path:
        heads = [path[: length + 1] for length in range(len(path))]
        return tuple(renamed.get(head, head)[-1] for head in heads)

    return replace(problem, path=written(problem.path), anchor=problem.anchor and written(problem.anchor))


def _value(data: Any, path: Path) -> Any:
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return _MISSING
        data = data[key]
    return data


def _shown(value: Any) -> str:
    """Describe a value briefly: a short one as written in YAML, a long one by its kind."""
    if isinstance(value, dict):
        return f"a section with keys {', '.join(map(str, value))}" if value else "an empty section"
    text = yaml_form(value)
    if isinstance(value, list):
        return text if len(text) <= 60 else f"a list of {len(value)}"
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- from pydantic's errors to problems -------------------------------------------------------------------------


def _problem(schema: Schema, data: Any, details: ErrorDetails) -> _Problem:
    loc, kind = details["loc"], details["type"]
    if loc and loc[-1] == "[key]":  # pydantic's mark for a key that is itself wrong
        path, place, _, union = _follow(schema, loc[:-2])
        keys = words(bare(place).get("propertyNames", {"type": "string"}))
        return _Problem((*path, loc[-2]), f"found the key {loc[-2]!r}; allowed: {keys}", union)
    path, place, owner, union = _follow(schema, loc)
    if kind == "extra_forbidden":
        name, allowed = str(path[-1]), list(owner.get("properties", {}))
        text = f"unknown key; allowed: {', '.join(allowed) or 'none'}{did_you_mean(name, allowed)}"
        return _Problem(path, text, union, unknown=True, nearest=nearest(name, allowed))
    if kind == "missing":
        return _Problem(path, f"missing; allowed: {words(place)}", union)
    if kind in {"value_error", "assertion_error"}:
        text = str(details["ctx"]["error"])
        head = text.split(" ", 1)[0].rstrip(":,").split(".")
        # A check over several fields reports the section; the line of the field that it names is more helpful.
        named = (*path, *(int(key) if key.isdecimal() else key for key in head))
        return _Problem(path, text, union, named if head[0] in bare(place).get("properties", {}) else None)
    if kind in {"union_tag_invalid", "union_tag_not_found"}:
        name, allowed = bare(place)["discriminator"]["propertyName"], sorted(tags(bare(place)))
        tag = _value(data, (*path, name))
        near = nearest(tag, allowed) if isinstance(tag, str) else None
        state = "missing" if tag is _MISSING else f"found {_shown(tag)}"
        hint = f"; did you mean {near!r}?" if near else ""
        return _Problem((*path, name), f"{state}; allowed: {', '.join(allowed)}{hint}", union, nearest=near)
    return _Problem(path, _mismatch(place, _value(data, path)), union)


def _mismatch(schema: Schema, value: Any) -> str:
    options = schema.get("anyOf", [schema])
    choices = [text for option in options for text in option.get("enum", [option.get("const")]) if type(text) is str]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    allowed = words(schema)
    if isinstance(value, float) and not math.isfinite(value):
        allowed = allowed.replace("a number", "a finite number", 1)
    return f"found {'nothing' if value is _MISSING else _shown(value)}; allowed: {allowed}{hint}"


def _follow(schema: Schema, loc: Sequence[Key]) -> tuple[Path, Schema, Schema, _Union | None]:
    """Turn pydantic's location, which mixes keys with names of union branches, into a key path.

    Returns the path, what is allowed there, the section or list that holds it, and the first union passed.
    """
    path: Path = ()
    owner: Schema = {}
    union: _Union | None = None
    for key in loc:
        place = bare(schema)
        if sections := tags(place):
            schema = sections.get(str(key), {})
        elif "anyOf" in place:
            label = str(key)
            schema = next((option for option in place["anyOf"] if _is_branch(option, label)), {})
            union = union or _Union(path, place, label, schema)
        else:
            path, owner, schema = (*path, key), place, _below(place, key)
    return path, schema, owner, union


def _is_branch(option: Schema, label: str) -> bool:
    """Return whether pydantic calls a union's branch so: ``list[x]``, ``Circle``, ``function-after[f(), Circle]``."""
    title: str = option.get("title", "")
    if title:
        return label == title or label.endswith(f"(), {title}]")
    starts = {"array": ("list[", "tuple[", "set["), "object": ("dict[",)}
    return label.startswith(starts.get(option.get("type", ""), ()))


def _below(place: Schema, key: Key) -> Schema:
    """Return what is allowed at a key of a section or a position of a list."""
    if "prefixItems" in place:
        items: list[Schema] = place["prefixItems"]
        return items[key] if isinstance(key, int) and key < len(items) else {}
    named = place.get("properties", {}).get(key)
    inner = named or place.get("items") or place.get("additionalProperties")
    return inner if isinstance(inner, dict) else {}


def _of_meant_branches(problems: Sequence[_Problem], data: Any) -> list[_Problem]:
    """Of a value that fits no branch of a union, keep only the problems of the branch that was meant."""
    result = [problem for problem in problems if problem.union is None]
    branches: dict[Path, dict[str, list[_Problem]]] = {}
    unions = {problem.union.path: problem.union for problem in problems if problem.union is not None}
    for problem in problems:
        if problem.union is not None:
            value = _value(data, problem.union.path)
            kind = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else ""
            if problem.union.branch.get("type") == kind:
                branches.setdefault(problem.union.path, {}).setdefault(problem.union.label, []).append(problem)
    for path, union in unions.items():
        meant = sorted(branches.get(path, {}).values(), key=len)
        result += meant[0] if meant else [_Problem(path, _mismatch(union.schema, _value(data, path)))]
    return result

"""One validator for task cards, recipes and methods' configs: every problem at once, in plain words.

pydantic finds the errors; this module turns them into messages: file and line (or the ``--set`` option), key path, what
was found, what is allowed, the nearest valid name. An unknown key does not hide other problems: the data is repaired
with the nearest key and validated again.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moalign.config.describe import Slot, is_model, words, yaml_form
from moalign.config.strict import Strict
from moalign.config.yaml_lines import Document, Key
from moalign.core.errors import RequestError, did_you_mean, nearest

Path = tuple[Key, ...]
Model = TypeVar("Model", bound=Strict)

_MISSING = object()
_REPAIRABLE = {"extra_forbidden", "union_tag_invalid"}


@dataclass(frozen=True)
class Origin:
    """Where a value came from: a line of a file or a ``--set`` option."""

    source: str = ""
    """The file (or anything else that names where the data stands)."""
    lines: Document | None = None
    prefix: Path = ()
    """Key path of the data inside the document, such as ``("config",)``."""
    given: Mapping[tuple[str, ...], str] = field(default_factory=dict)
    """Key path (below ``prefix``) -> label such as ``--set config.lr`` of every value set by an option."""

    def option(self, path: Path) -> str | None:
        """Return the label of the option that set the value at ``path``, or None."""
        keys = tuple(map(str, path))
        return next((text for key, text in reversed(list(self.given.items())) if keys[: len(key)] == key), None)

    def at(self, path: Path) -> str:
        """Return ``FILE:LINE`` or ``--set key`` for the value at ``path``, or for its nearest parent."""
        if label := self.option(path):
            return label
        for length in range(len(path), -1, -1):
            part = path[:length]
            if self.lines is not None and self.lines.has(*self.prefix, *part):
                return f"{self.source}:{self.lines.line(*self.prefix, *part)}"
            keys = tuple(map(str, part))
            for key, label in self.given.items():
                if keys and key[: len(keys)] == keys:
                    return label
        return self.source

    def sentence(self, path: Path, text: str, anchor: Path | None = None) -> str:
        """Return ``FILE:LINE: key.path: text``; ``anchor`` is where the line is looked up instead of at ``path``."""
        place, keys = self.at(path if anchor is None else anchor), ".".join(map(str, (*self.prefix, *path)))
        # "--set a.b" already ends with the key path, unless the problem is deeper.
        if place.startswith("--set ") and place.endswith((f" {keys}", f".{keys}")):
            keys = ""
        return ": ".join(part for part in (place, keys, text) if part)


@dataclass(frozen=True)
class _Problem:
    path: Path
    text: str
    kind: str
    union: tuple[Path, Slot, str] | None = None
    """The outermost plain union on the way: its path, its slot and the branch that reported this."""
    repair: str | None = None
    """For an unknown key the valid one, for an unknown tag the nearest tag."""
    anchor: Path | None = None
    """Where the line is looked up, when it differs from ``path``."""


def validate(
    model: type[Model],
    data: Document | Mapping[str, Any],
    source: str = "",
    lines: Document | None = None,
    prefix: Path = (),
    given: Mapping[tuple[str, ...], str] | None = None,
) -> Model:
    """Return ``data`` as a checked ``model``.

    Args:
        model: the typed section.
        data: a document, or the plain data of a section with text keys.
        source: what messages start with; a document names itself.
        lines: the document in which ``data`` stands, for line numbers.
        prefix: key path of ``data`` in that document.
        given: key path -> label of values set by an option; they are named instead of a line.

    Raises:
        RequestError: every problem, ``FILE:LINE: key.path: found X; allowed: Y; did you mean 'z'?``.
    """
    value, problems = check(model, data, _origin(data, source, lines, prefix, given))
    if value is None:
        raise RequestError(*problems)
    return value


def problems(
    model: type[Strict],
    data: Document | Mapping[str, Any],
    source: str = "",
    lines: Document | None = None,
    prefix: Path = (),
    given: Mapping[tuple[str, ...], str] | None = None,
) -> list[str]:
    """Return every problem of ``data`` instead of raising; arguments as :func:`validate`."""
    return check(model, data, _origin(data, source, lines, prefix, given))[1]


def _origin(
    data: Document | Mapping[str, Any],
    source: str,
    lines: Document | None,
    prefix: Path,
    given: Mapping[tuple[str, ...], str] | None,
) -> Origin:
    lines = data if isinstance(data, Document) else lines
    return Origin(source or (lines.source if lines else ""), lines, prefix, given or {})


def check(model: type[Model], data: Document | Mapping[str, Any], origin: Origin) -> tuple[Model | None, list[str]]:
    """Return the checked model and no problems, or None and every problem."""
    plain: Any = data.data if isinstance(data, Document) else dict(data)
    try:
        return _parse(model, plain), []
    except ValidationError as error:
        first = error
    except RequestError as error:  # raised by a model's own validator
        return None, [origin.sentence((), text) for text in error.problems]
    problems = _merge_unions(_translate(model, plain, first), plain)
    renamed: dict[Path, Path] = {}
    problems += _hidden(model, plain, problems, renamed)
    texts = []
    for problem in problems:
        # A required key that is there under a misspelt name is one problem, not two.
        if problem.kind != "missing" or problem.path not in renamed:
            anchor = None if problem.anchor is None else _as_written(problem.anchor, renamed)
            texts.append(origin.sentence(_as_written(problem.path, renamed), problem.text, anchor))
    return None, _in_line_order(list(dict.fromkeys(texts)))


def _parse(model: type[Model], plain: Any) -> Model:
    # JSON is pydantic's strict yet sensible mode: no "yes" for true, no 3.0 for 3, but lists for tuples.
    return model.model_validate_json(json.dumps(plain), strict=True)


def _in_line_order(texts: list[str]) -> list[str]:
    def line(text: str) -> int:
        number = text.split(": ", 1)[0].rpartition(":")[2]
        return int(number) if number.isdecimal() else 0

    return sorted(texts, key=line)


def _hidden(model: type[Strict], plain: Any, problems: Sequence[_Problem], renamed: dict[Path, Path]) -> list[_Problem]:
    """Return what misspelt keys hid: problems of the data with the nearest keys and tags put in their place.

    ``renamed`` receives valid path -> path as written.
    """
    uncovered: list[_Problem] = []
    seen = {(problem.path, problem.kind) for problem in problems}
    repaired = copy.deepcopy(plain)
    todo = [problem for problem in problems if problem.kind in _REPAIRABLE]
    while todo:
        for problem in todo:
            _repair(repaired, problem, renamed)
        try:
            _parse(model, repaired)
            break
        except ValidationError as error:
            later = _merge_unions(_translate(model, repaired, error), repaired)
        except RequestError:  # raised by a model's own validator; shown once the keys are right
            break
        later = [problem for problem in later if (problem.path, problem.kind) not in seen]
        seen |= {(problem.path, problem.kind) for problem in later}
        uncovered += later
        todo = [problem for problem in later if problem.kind in _REPAIRABLE]
    return uncovered


def _repair(data: Any, problem: _Problem, renamed: dict[Path, Path]) -> None:
    *parents, key = problem.path
    section = _value(data, tuple(parents))
    if not isinstance(section, dict) or key not in section:
        return
    if problem.kind == "union_tag_invalid":
        if problem.repair is not None:
            section[key] = problem.repair
        return
    value = section.pop(key)
    if problem.repair is not None and problem.repair not in section:
        section[problem.repair] = value
        renamed[(*parents, problem.repair)] = problem.path


def _as_written(path: Path, renamed: Mapping[Path, Path]) -> Path:
    heads = [path[: length + 1] for length in range(len(path))]
    return tuple(renamed.get(head, head)[-1] for head in heads)


def _value(data: Any, path: Path) -> Any:
    for key in path:
        inside = key in data if isinstance(data, dict) else isinstance(data, list) and key in range(len(data))
        if not inside:
            return _MISSING
        data = data[key]
    return data


def found_words(value: Any) -> str:
    """Describe a value briefly: a short one as written in YAML, a long one by its kind."""
    if isinstance(value, dict):
        return f"a section with keys {', '.join(map(str, value))}" if value else "an empty section"
    if isinstance(value, list):
        text = yaml_form(value)
        return text if len(text) <= 60 else f"a list of {len(value)}"
    text = yaml_form(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- from pydantic's errors to problems -------------------------------------------------------------------------


def _translate(model: type[Strict], data: Any, error: ValidationError) -> list[_Problem]:
    return [_problem(model, data, details) for details in error.errors(include_url=False)]


def _problem(model: type[Strict], data: Any, details: ErrorDetails) -> _Problem:
    *above, mark = details["loc"] or ("",)
    if mark == "[key]":  # pydantic's mark for a key that is itself wrong
        path, slot, owner, union = _follow(model, above[:-1])
        keys = words(Slot(get_args(slot.bare().annotation)[0]))
        return _Problem((*path, above[-1]), f"found the key {above[-1]!r}; allowed: {keys}", "key", union)
    path, slot, owner, union = _follow(model, details["loc"])
    kind = details["type"]
    if kind == "extra_forbidden" and owner is not None:
        name, allowed = str(path[-1]), list(owner.model_fields)
        listed = ", ".join(allowed) or "none"
        text = f"unknown key; allowed: {listed}{did_you_mean(name, allowed)}"
        return _Problem(path, text, kind, union, nearest(name, allowed))
    if kind == "missing":
        return _Problem(path, f"missing; allowed: {words(slot)}", kind, union)
    if kind in {"value_error", "assertion_error"}:
        text = str(details["ctx"]["error"])
        head = text.split(" ", 1)[0].rstrip(":,")
        # A check over several fields reports the section; the line of the field that it names is more helpful.
        names_field = is_model(slot.bare().annotation) and head in slot.bare().annotation.model_fields
        return _Problem(path, text, f"{kind} {text}", union, anchor=(*path, head) if names_field else None)
    if kind in {"union_tag_invalid", "union_tag_not_found"} and slot.tags():
        tags, name = sorted(slot.tags()), slot.bare().discriminator or ""
        tag = _value(data, (*path, name))
        if tag is _MISSING:
            return _Problem((*path, name), f"missing; allowed: {', '.join(tags)}", kind, union)
        near = nearest(tag, tags) if isinstance(tag, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        text = f"found {found_words(tag)}; allowed: {', '.join(tags)}{hint}"
        return _Problem((*path, name), text, kind, union, near)
    return _Problem(path, _mismatch(slot, _value(data, path)), kind, union)


def _mismatch(slot: Slot, value: Any) -> str:
    hint = did_you_mean(value, slot.literals()) if isinstance(value, str) else ""
    shown = "nothing" if value is _MISSING else found_words(value)
    allowed = words(slot)
    if isinstance(value, float) and not math.isfinite(value):
        allowed = allowed.replace("a number", "a finite number", 1)
    return f"found {shown}; allowed: {allowed}{hint}"


def _follow(
    model: type[Strict], loc: Sequence[Key]
) -> tuple[Path, Slot, type[Strict] | None, tuple[Path, Slot, str] | None]:
    """Turn pydantic's location, which mixes keys with names of union branches, into a key path.

    Returns the path, what is allowed there, the model whose key the last one is, and the first plain union passed.
    """
    slot, path, rest = Slot(model), list[Key](), list(loc)
    owner: type[Strict] | None = None
    union: tuple[Path, Slot, str] | None = None
    while rest:
        bare = slot.bare()
        if tags := bare.tags():
            slot = Slot(tags.get(str(rest.pop(0)), Any))
        elif bare.branches():
            label = str(rest.pop(0))
            union = union or (tuple(path), slot, label)
            slot = _branch(bare, label)
        else:
            key = rest.pop(0)
            owner = bare.annotation if is_model(bare.annotation) else None
            path.append(key)
            slot = _below(bare, key)
    return tuple(path), slot, owner, union


def _branch(bare: Slot, label: str) -> Slot:
    for branch in bare.branches():
        name = getattr(get_origin(branch) or branch, "__name__", str(branch))
        if label.casefold() == name.casefold() or label.casefold().startswith(f"{name.casefold()}["):
            return Slot(branch)
    return Slot(Any)


def _below(bare: Slot, key: Key) -> Slot:
    if is_model(bare.annotation):
        entry = bare.annotation.model_fields.get(key)
        return Slot.of(entry) if entry is not None else Slot(Any)
    origin, args = get_origin(bare.annotation), get_args(bare.annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(args) == 2:
        return Slot(args[1])
    if origin is tuple and args and args[-1] is not Ellipsis:
        return Slot(args[int(key)]) if isinstance(key, int) and key < len(args) else Slot(Any)
    return Slot(args[0]) if args else Slot(Any)


def _merge_unions(problems: list[_Problem], data: Any) -> list[_Problem]:
    """Of a value that fits no branch of a union, keep only the problems of the branch that was meant."""
    result: list[_Problem] = []
    groups: dict[Path, list[_Problem]] = {}
    for problem in problems:
        if problem.union is None:
            result.append(problem)
        else:
            groups.setdefault(problem.union[0], []).append(problem)
    for path, group in groups.items():
        slot = next(problem.union[1] for problem in group if problem.union)
        value = _value(data, path)
        meant = [problem for problem in group if problem.union and _fits(slot, problem.union[2], value)]
        by_branch: dict[str, list[_Problem]] = {}
        for problem in meant:
            if problem.union:
                by_branch.setdefault(problem.union[2], []).append(problem)
        if by_branch:
            fewest = min(by_branch.values(), key=len)
            result.extend(fewest)
        else:
            result.append(_Problem(path, _mismatch(slot, value), "union"))
    return result


def _fits(slot: Slot, label: str, value: Any) -> bool:
    """Return whether a branch takes values of this shape: a section for a model, a list for a list."""
    branch = _branch(slot.bare(), label).bare().annotation
    origin = get_origin(branch) or branch
    if isinstance(value, dict):
        return is_model(branch) or (isinstance(origin, type) and issubclass(origin, Mapping))
    if isinstance(value, list):
        return isinstance(origin, type) and issubclass(origin, Sequence | set) and origin is not str
    return False

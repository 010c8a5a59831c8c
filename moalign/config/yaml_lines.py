"""YAML files with line numbers: what is read, and on which line each key stands.

Only plain data is accepted. Scalars follow the YAML 1.2 core schema, because PyYAML's own YAML 1.1
reads ``1e-5`` as text, ``010`` as 8, ``1:30`` as 90, ``no`` as false and ``2026-01-01`` as a date.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moalign.core.errors import RequestError

Key = str | int

MOST_VALUES = 100_000
"""Upper bound of values in one file once aliases are expanded: a few lines of aliases can name billions."""

MOST_LEVELS = 50
"""Upper bound of sections inside sections, aliases expanded."""

_PLAIN = "tag:yaml.org,2002:"
_TAGS = {_PLAIN + name for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of the YAML 1.2 core schema."""


_Loader.yaml_implicit_resolvers = {}  # forget those of YAML 1.1


def _resolver(name: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(_PLAIN + name, re.compile(rf"^(?:{pattern})\Z"), list(first))


_resolver("null", r"~|null|Null|NULL|", "~nN")
_Loader.yaml_implicit_resolvers.setdefault("", []).append((_PLAIN + "null", re.compile(r"^\Z")))
_resolver("bool", r"true|True|TRUE|false|False|FALSE", "tTfF")
_resolver("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolver(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)
_resolver("merge", r"<<", "<")


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        value = int(node.value, 0) if node.value.startswith(("0x", "0o")) else int(node.value)
        str(value)  # Python reads and writes at most 4300 digits; hexadecimal ones it reads without that limit
        return value
    except ValueError as error:
        raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text: str = loader.construct_scalar(node)
    try:  # JSON writes a character beyond U+FFFF as two escapes; PyYAML leaves them apart
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        half = "an escape of half a character (U+D800 to U+DFFF)"
        raise yaml.constructor.ConstructorError(None, None, half, node.start_mark) from error


_Loader.add_constructor(_PLAIN + "int", _construct_int)
_Loader.add_constructor(_PLAIN + "str", _construct_text)
_Loader.add_constructor(_PLAIN + "merge", _construct_text)  # "<<" as a value is text


def _scalar_tag(text: str) -> str:
    """Return the tag of an unquoted scalar."""
    patterns = _Loader.yaml_implicit_resolvers.get(text[:1], [])
    return next((tag for tag, pattern in patterns if pattern.match(text)), _PLAIN + "str")


class Document:
    """One YAML file: its data and the line of every key.

    ``data`` is a plain dict (text keys; values are dict, list, str, int, float, bool or None), ``source`` the
    path as it is shown to a person.
    """

    def __init__(self, data: dict[str, Any], root: yaml.Node | None, source: str) -> None:
        self.data = data
        self.source = source
        self._root = root

    def line(self, *keys: Key) -> int:
        """Return the 1-based line of the key path ``keys``; of its nearest parent when there is no such key.

        List positions are given as int (or as digits): ``line("objectives", 0, "kind")``.
        """
        return self._walk(keys)[0]

    def has(self, *keys: Key) -> bool:
        """Return whether the key path ``keys`` stands in the file."""
        return self._walk(keys)[1]

    def _walk(self, keys: tuple[Key, ...]) -> tuple[int, bool]:
        node, line = self._root, 0 if self._root is None else self._root.start_mark.line
        for key in keys:
            child = _child(node, key)
            if child is None:
                return line + 1, False
            line, node = child
        return line + 1, True


def _child(node: yaml.Node | None, key: Key) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        # From the end: a merged section (<<) stands before the keys that overrule it.
        for name, value in reversed(node.value):
            if name.value == str(key):
                return name.start_mark.line, value
    if isinstance(node, yaml.SequenceNode) and str(key).isdecimal() and int(key) < len(node.value):
        item = node.value[int(key)]
        return item.start_mark.line, item
    return None


def shown(path: Path | str) -> str:
    """Return ``path`` as messages show it: relative when it lies in the current directory."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def load(path: Path | str) -> Document:
    """Read a YAML file whose top level is a section of keys.

    Raises:
        RequestError: the file cannot be read, is not UTF-8, is not YAML, is empty, has a key twice, a key
            that is not text, a tag, or more values than any recipe needs. Names file and line.
    """
    source = shown(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{source}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from error
    return parse(text, source)


def parse(text: str, source: str) -> Document:
    """Read YAML text whose top level is a section; ``source`` names it in messages. Raises as :func:`load`."""

    def at(line: int) -> str:
        return f"{source}:{line}"

    root, data = _read(text, at)
    if root is None or data is None:
        raise RequestError(f"{source}: is empty; a section of keys such as 'name: value' is needed")
    if not isinstance(data, dict):
        raise RequestError(
            f"{at(root.start_mark.line + 1)}: found {_kind(data)}; a section of keys such as 'name: value' is needed"
        )
    return Document(data, root, source)


def parse_value(text: str, where: str) -> Any:
    """Read one value as it may stand after ``key:`` in a file; ``where`` names the option in messages.

    Text that opens a list, a section or a quote is read as YAML; everything else is one scalar, so that
    ``Q: {prompt} # 1`` stays text.
    """
    text = text.strip()
    if text[:1] in {"[", "{", '"', "'"}:
        return _read(text, lambda line: where)[1]
    return _construct(yaml.ScalarNode(_scalar_tag(text), text), lambda line: where)


def _read(text: str, at: Callable[[int], str]) -> tuple[yaml.Node | None, Any]:
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise RequestError(_broken(error, at)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(f"{at(line)}: the character U+{ord(text[error.position]):04X} is not allowed") from error
    except RecursionError as error:
        raise RequestError(f"{at(1)}: broken YAML: nested too deeply") from error
    if root is None:
        return None, None
    problems: list[str] = []
    _check(root, at, problems, {}, ())
    if problems:
        raise RequestError(*problems)
    return root, _construct(root, at)


def _construct(node: yaml.Node, at: Callable[[int], str]) -> Any:
    try:
        return _Loader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise RequestError(_broken(error, at)) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{at(node.start_mark.line + 1 if node.start_mark else 1)}: broken YAML: {error}") from error


def _broken(error: yaml.MarkedYAMLError, at: Callable[[int], str]) -> str:
    mark = error.problem_mark or error.context_mark
    problem = f"{error.problem or error.context}"
    if "'\\t'" in problem:
        problem += " (indent with spaces, not tabs)"
    elif "mapping values are not allowed" in problem:
        problem = "a second ':' in one value; put the value in quotes"
    context = f", {error.context}" if error.context and error.problem else ""
    opened = error.context_mark
    if context and opened and mark and opened.line != mark.line:
        context += f" that starts on line {opened.line + 1}"
    return f"{at(mark.line + 1 if mark else 1)}: broken YAML: {problem}{context}"


def _check(
    node: yaml.Node,
    at: Callable[[int], str],
    problems: list[str],
    seen: dict[int, tuple[int, int]],
    above: tuple[int, ...],
) -> tuple[int, int]:
    """Add what is wrong below ``node`` to ``problems``; return its values and levels, aliases expanded."""
    line = node.start_mark.line + 1
    if id(node) in above:
        problems.append(f"{at(line)}: an alias that names its own parent")
        return 0, 0
    if id(node) in seen:
        return seen[id(node)]
    odd = isinstance(node, yaml.ScalarNode) and node.tag != _PLAIN + "str" and node.tag != _scalar_tag(node.value)
    if odd or node.tag not in _TAGS:
        problems.append(f"{at(line)}: found the tag {node.tag.replace(_PLAIN, '!!')}; only plain values are allowed")
    below: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        below = node.value
    elif isinstance(node, yaml.MappingNode):
        below = [value for _, value in node.value]
        problems.extend(_key_problems(node, at))
    children = [_check(child, at, problems, seen, (*above, id(node))) for child in below]
    values = 1 + sum(child[0] for child in children)
    levels = 1 + max((child[1] for child in children), default=0)
    # Named once, at the lowest place that is too large.
    if values > MOST_VALUES and all(child[0] <= MOST_VALUES for child in children):
        problems.append(f"{at(line)}: holds {values} values once its aliases are expanded; allowed: {MOST_VALUES}")
    if levels == MOST_LEVELS + 1:
        problems.append(f"{at(line)}: nested more than {MOST_LEVELS} levels deep")
    seen[id(node)] = values, levels
    return values, levels


def _key_problems(node: yaml.MappingNode, at: Callable[[int], str]) -> list[str]:
    problems = []
    first: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag == _PLAIN + "merge":
            continue
        if not isinstance(key, yaml.ScalarNode):
            problems.append(f"{at(line)}: found {_kind(key)} as a key; a key is text")
        elif key.tag != _PLAIN + "str":
            problems.append(f"{at(line)}: the key {key.value!r} is not text; put it in quotes")
        elif key.value in first:
            problems.append(f"{at(line)}: the key {key.value!r} stands twice (first on line {first[key.value]})")
        else:
            first[key.value] = line
    return problems


def _kind(value: Any) -> str:
    if isinstance(value, list | yaml.SequenceNode):
        return "a list"
    return "a section" if isinstance(value, dict | yaml.MappingNode) else f"the value {value!r}"

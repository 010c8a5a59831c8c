"""YAML files with line numbers: what is read, and on which line each key stands.

ruamel.yaml parses. Values are made here from its nodes: its own loader stops at the first wrong key, reads ``1_000`` as
a number and ``2026-01-01`` as a date, and shares the objects of aliases without bounding what they expand to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError, MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import VersionedResolver
from ruamel.yaml.scanner import Scanner, ScannerError
from ruamel.yaml.tag import Tag

from moalign.core.errors import RequestError
from moalign.core.paths import shown

Key = str | int

MOST_VALUES = 100_000
"""Upper bound of values in one file once aliases are expanded: a few lines of aliases can name billions."""

MOST_LEVELS = 50
"""Upper bound of sections inside sections, aliases expanded."""

# The scalars of the YAML 1.2 core schema.
_CONSTANTS = {form: None for form in ("", "~", "null", "Null", "NULL")} | {
    form: value for value in (True, False) for form in (str(value), str(value).lower(), str(value).upper())
}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)

_PREFIX = "tag:yaml.org,2002:"
_UNQUOTED = Tag(suffix="unquoted")
_TAGS = {ScalarNode: {"unquoted", f"{_PREFIX}str"}, SequenceNode: {f"{_PREFIX}seq"}, MappingNode: {f"{_PREFIX}map"}}
_KINDS = {ScalarNode: "one value", SequenceNode: "a list", MappingNode: "a section"}


class _Resolver(VersionedResolver):
    """Marks unquoted scalars, whose text decides their type."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        return _UNQUOTED if kind is ScalarNode and implicit[0] else super().resolve(kind, value, implicit)


class _Scanner(Scanner):
    """Refuses what would be read as something else than a person sees, and names a wrong escape."""

    def scan_to_next_token(self) -> None:
        start = self.reader.pointer
        super().scan_to_next_token()
        if re.search(r"[\r\n] *\t[ \t]*\Z", self.reader.buffer[start : self.reader.pointer]):
            problem = "found character '\\t' that cannot start any token"
            raise ScannerError("while scanning for the next token", None, problem, self.reader.get_mark())

    def scan_plain(self) -> Any:
        start, mark = self.reader.pointer, self.reader.get_mark()
        token = super().scan_plain()
        if odd := re.search("[\x85\u2028\u2029]", self.reader.buffer[start : self.reader.pointer]):
            code = f"{ord(odd[0]):04X}"
            problem = f'the character U+{code} outside quotes; leave it out, or write it as "\\u{code}"'
            raise ScannerError(None, None, problem, mark)
        return token

    def scan_flow_scalar_non_spaces(self, double: Any, start_mark: Any) -> Any:
        try:
            return super().scan_flow_scalar_non_spaces(double, start_mark)
        except (ValueError, OverflowError) as error:  # of chr
            raise ScannerError(None, None, "an escape beyond U+10FFFF", self.reader.get_mark()) from error


class _Composer(Composer):
    """Refuses an anchor that stands twice: a slip of copy and paste, whose aliases would mean one or the other."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        if not isinstance(event, AliasEvent) and event.anchor in self.anchors:
            first = self.anchors[event.anchor].start_mark.line + 1
            problem = f"the anchor {event.anchor!r} stands twice (first on line {first})"
            raise ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML file: ``data`` is plain (text keys; values are dict, list, str, int, float, bool or None)."""

    data: dict[str, Any]
    source: str
    """The path as it is shown to a person."""
    lines: dict[tuple[str, ...], int]
    """Key path, list positions as digits -> the 1-based line of the key or list item."""

    def line(self, *keys: Key) -> int:
        """Return the line of the key path ``keys``; of its nearest parent when there is no such key."""
        paths = (tuple(map(str, keys[:length])) for length in range(len(keys), -1, -1))
        return next(self.lines[path] for path in paths if path in self.lines)

    def has(self, *keys: Key) -> bool:
        """Return whether the key path ``keys`` stands in the file."""
        return tuple(map(str, keys)) in self.lines


def load(path: Path | str) -> Document:
    """Read a YAML file whose top level is a section of keys.

    Raises RequestError, with file and line, for a file that cannot be read, is not UTF-8, is not YAML, is empty, has a
    key twice, a key that is not text, a tag, or more values than any recipe needs.
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
    data, lines = _read(text, lambda line: f"{source}:{line}")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else f"the value {data!r}"
        found = f"{source}: is empty" if data is None else f"{source}:{lines[()]}: found {kind}"
        raise RequestError(f"{found}; a section of keys such as 'name: value' is needed")
    return Document(data, source, lines)


def parse_value(text: str, where: str) -> Any:
    """Read one value as it may stand after ``key:`` in a file; ``where`` names the option in messages.

    Text that opens a list, a section or a quote is read as YAML; everything else is one scalar, so that
    ``Q: {prompt} # 1`` stays text.
    """
    text = text.strip()
    if text[:1] in {"[", "{", '"', "'"}:
        return _read(text, lambda line: where)[0]
    try:
        return _scalar(text)
    except ValueError as error:
        raise RequestError(f"{where}: broken YAML: {error}") from error


def _scalar(text: str) -> Any:
    """Return what an unquoted scalar means."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        value = int(text, 0 if text.startswith(("0x", "0o")) else 10)
        str(value)  # Python reads and writes at most 4300 digits; hexadecimal ones it reads without that limit
        return value
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return _joined(text)


def _joined(text: str) -> str:
    """Join the halves of characters beyond U+FFFF: JSON writes two escapes, which ruamel.yaml leaves apart."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise ValueError("an escape of half a character (U+D800 to U+DFFF)") from error


def _read(text: str, at: Callable[[int], str]) -> tuple[Any, dict[tuple[str, ...], int]]:
    yaml = YAML(typ="safe", pure=True, plug_ins=[])  # none are searched for
    yaml.Resolver, yaml.Scanner, yaml.Composer = _Resolver, _Scanner, _Composer
    yaml.max_depth = MOST_LEVELS
    try:
        root = yaml.compose(text)
        reader = _Reader(at)
        data = None if root is None else reader.read(root)
    except (MaxDepthExceededError, RecursionError) as error:
        line = error.problem_mark.line + 1 if isinstance(error, MaxDepthExceededError) else 1
        raise RequestError(f"{at(line)}: nested more than {MOST_LEVELS} levels deep") from error
    except MarkedYAMLError as error:
        raise RequestError(_broken(error, at)) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RequestError(f"{at(line)}: the character U+{ord(text[error.position]):04X} is not allowed") from error
    if reader.problems:
        raise RequestError(*reader.problems)
    return data, reader.lines


def _broken(error: MarkedYAMLError, at: Callable[[int], str]) -> str:
    line = error.problem_mark.line + 1
    problem = re.sub(r"\(('[^']*'),\)", r"\1", str(error.problem))  # it prints tuples of one
    if "'\\t'" in problem:
        problem += " (indent with spaces, not tabs)"
    elif "mapping values are not allowed" in problem:
        problem = "a second ':' in one value; put the value in quotes"
    if error.context:
        problem += f", {error.context}"
        if error.context_mark is not None and error.context_mark.line + 1 != line:
            problem += f" that starts on line {error.context_mark.line + 1}"
    return f"{at(line)}: broken YAML: {problem}"


class _Reader:
    """Makes plain data of nodes, aliases expanded; notes the line of every key and every problem."""

    def __init__(self, at: Callable[[int], str]) -> None:
        self.lines: dict[tuple[str, ...], int] = {}
        self.problems: dict[str, None] = {}  # a section that aliases repeat has its problems once
        self._at = at
        self._values = 0

    def read(self, node: Node, path: tuple[str, ...] = (), above: tuple[int, ...] = ()) -> Any:
        """Return the value of a node at a key path, inside the nodes ``above`` (their ids)."""
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self._count(path)
        if node.tag not in _TAGS[type(node)]:
            tag = str(node.tag).replace(_PREFIX, "!!")
            self._refuse(line, f"found the tag {tag} on {_KINDS[type(node)]}; only plain values are allowed")
        elif not self._may_stand(node, above, line):
            return None
        elif isinstance(node, ScalarNode):
            return self._text(node)
        elif isinstance(node, SequenceNode):
            items = enumerate(node.value)
            return [self.read(item, (*path, str(index)), (*above, id(node))) for index, item in items]
        elif isinstance(node, MappingNode):
            entries = self._entries(node, path, above)
            self.lines |= {(*path, name): line for name, (line, _) in entries.items()}
            return {name: self.read(value, (*path, name), (*above, id(node))) for name, (_, value) in entries.items()}
        return None

    def _may_stand(self, node: Node, above: tuple[int, ...], line: int) -> bool:
        """Return whether a node may stand inside the nodes ``above``; notes why it may not."""
        if id(node) in above:
            self._refuse(line, "an alias that names its own parent")
        elif len(above) == MOST_LEVELS:
            self._refuse(line, f"nested more than {MOST_LEVELS} levels deep")
        else:
            return True
        return False

    def _refuse(self, line: int, problem: str) -> None:
        self.problems[f"{self._at(line)}: {problem}"] = None

    def _count(self, path: tuple[str, ...]) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            problem = f"more than {MOST_VALUES} values are read here once aliases are expanded"
            raise RequestError(*self.problems, f"{self._at(self.lines[path[:1]])}: {problem}")

    def _text(self, node: ScalarNode) -> Any:
        try:
            return _scalar(node.value) if node.ctag is _UNQUOTED else _joined(node.value)
        except ValueError as error:
            return self._refuse(node.start_mark.line + 1, f"broken YAML: {error}")

    def _entries(
        self, section: MappingNode, path: tuple[str, ...], above: tuple[int, ...]
    ) -> dict[str, tuple[int, Node]]:
        """Return key -> its line and its value; merged sections (<<) come first, so that own keys overrule them."""
        inside = (*above, id(section))
        merged: dict[str, tuple[int, Node]] = {}
        own: dict[str, tuple[int, Node]] = {}
        for key, value in section.value:
            line = key.start_mark.line + 1
            name = self._text(key) if isinstance(key, ScalarNode) else None
            if not isinstance(key, ScalarNode):
                kind = "a list" if isinstance(key, SequenceNode) else "a section"
                self._refuse(line, f"found {kind} as a key; a key is text")
            elif not isinstance(name, str) or key.tag not in _TAGS[ScalarNode]:
                self._refuse(line, f"the key {key.value!r} is not text; put it in quotes")
            elif name == "<<" and key.ctag is _UNQUOTED:
                for lender in reversed(value.value) if isinstance(value, SequenceNode) else [value]:
                    self._count(path)
                    if not isinstance(lender, MappingNode):
                        self._refuse(line, "broken YAML: '<<' takes a section or a list of sections")
                    elif self._may_stand(lender, inside, line):
                        merged |= self._entries(lender, path, inside)
            elif name in own:
                self._refuse(line, f"the key {name!r} stands twice (first on line {own[name][0]})")
            else:
                own[name] = line, value
        return merged | own

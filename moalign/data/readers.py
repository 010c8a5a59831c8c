"""Readers: JSONL, CSV, Parquet, dataset folders and hub data sets as a stream of checked rows.

:func:`read` never holds more than one line (or one batch of Parquet rows) in memory. Whatever is
wrong with the data raises RequestError that begins with ``file:line:`` (``file: row N:`` where a
format has no lines), says what was found and, for a column, which name is nearest.

| path | read as |
|---|---|
| ``*.jsonl``, ``*.json`` | one JSON object a line; blank lines are skipped |
| ``*.csv`` | comma separated with a header line; quoted cells may hold commas, quotes, line ends |
| ``*.jsonl.gz``, ``*.json.gz``, ``*.csv.gz`` | the same, compressed |
| ``*.parquet`` | Parquet, in batches, only the columns needed |
| a folder | ``datasets``: data files in it, or what ``save_to_disk`` wrote |
| ``owner/name`` | ``datasets``: a hub data set, or its cached copy when offline |
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from moalign.config.card import SourceSpec
from moalign.core.errors import MoalignError, RequestError, WorkError, did_you_mean, nearest, unknown
from moalign.core.paths import shown
from moalign.data.dialogue import shorten
from moalign.runs.checkpoint import file_sum

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
LINE_LIMIT = 16 * 2**20
"""Bytes; a longer line is refused, so that a file without line ends cannot fill the memory."""
BATCH_ROWS = 256
"""Rows of Parquet held at a time."""
NAMES_SHOWN = 20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Located = tuple[str, Mapping[str, Any]]
"""Where a record stands (``file:line``) and its columns."""


class Field(NamedTuple):
    """What a reader expects of one field: text, or true, false (also 1, 0) or nothing."""

    name: str
    truth: bool = False
    required: bool = True
    """A record without its column is refused; an optional one must be there only when ``columns`` names its column."""
    blank: bool = True
    """Whether a text may be empty or white space only."""
    in_place_of: str | None = None
    """A field before it, of which this one takes the place: where that one has a value it is not looked at."""


class Row(NamedTuple):
    """One checked record: ``values`` has every requested field, None where an optional one is absent."""

    where: str
    values: dict[str, Any]
    columns: Sequence[str]
    """All column names of the record in the source, for messages."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read and under which names."""

    place: Path | str
    shown: str
    """The source as messages name it."""
    local: str
    """Where a local file or folder would be; named when a hub id cannot be reached."""
    source: SourceSpec
    columns: Mapping[Field, str]

    def require(self, where: str, available: Sequence[str]) -> None:
        """Refuse a record or header without a needed column."""
        for field, column in self.columns.items():
            if (field.required or field.name in self.source.columns) and column not in available:
                raise missing_column(where, field.name, column, available)

    def choose(self, where: str, header: Sequence[str]) -> list[str]:
        """Return the columns to read; refuse a header that lacks a needed one or has one of ours twice."""
        for column in self.columns.values():
            if header.count(column) > 1:
                raise RequestError(
                    f"{where}: column {column!r} is there {header.count(column)} times; every name must be unique"
                )
        self.require(where, header)
        return [column for column in dict.fromkeys(self.columns.values()) if column in header]


def read(source: SourceSpec, fields: Sequence[Field], base_dir: Path | str = ".") -> Iterator[Row]:
    """Stream the records of a source, relative to the folder ``base_dir``.

    ``source.columns`` renames columns, ``source.limit`` stops early. Raises RequestError at once for a source that does
    not exist or names unknown fields, while streaming for the first bad record, at the end when there was no record.
    """
    names = [field.name for field in fields]
    for name in source.columns:
        if name not in names:
            raise unknown("field", name, names, f"{source.path}: columns")
    place = locate(source, base_dir)
    local = shown(Path(base_dir) / source.path)
    columns = {field: source.columns.get(field.name, field.name) for field in fields}
    return _rows(_Plan(place, place if isinstance(place, str) else shown(place), local, source, columns))


def locate(source: SourceSpec, base_dir: Path | str = ".") -> Path | str:
    """Return the file or folder that a source means, or the hub id as a string; reads nothing.

    Raises RequestError for a path that does not exist (naming the nearest file), an unknown kind of
    file, or a ``split`` or ``revision`` given to a plain file, which has neither.
    """
    if not source.path.strip() or "\0" in source.path:
        raise RequestError(f"data source: path {source.path!r} is not a file, a folder or a hub id (owner/name)")
    path = Path(base_dir) / source.path
    if not os.path.exists(path):  # a Path's own raises for a name that is too long
        if not HUB_ID.fullmatch(source.path) or _suffix(path) is not None:
            raise RequestError(_no_such_file(path))
        # datasets itself would quietly prefer a folder of that name in the current directory.
        if os.path.exists(source.path):
            raise RequestError(
                f"{source.path}: found in the current folder, but a relative path starts at the task card's folder "
                f"({shown(path)} is not there); give the whole path {Path(source.path).resolve()}"
            )
        return source.path
    if not path.is_dir() and _suffix(path) is None:
        raise RequestError(f"{shown(path)}: unknown kind of data file; allowed: {', '.join(SUFFIXES)}, or a folder")
    folder = path.is_dir()
    use = "hub data sets, but this is a local folder" if folder else "hub data sets and folders, but this is one file"
    for option, is_set in (
        ("split", not folder and source.split != "train"),
        ("revision", source.revision is not None),
    ):
        if is_set:
            raise RequestError(f"{shown(path)}: {option} {getattr(source, option)!r} is for {use}; leave it out")
    return path


def fingerprint(source: SourceSpec, base_dir: Path | str = ".") -> str:
    """Return 16 hex digits that change when a byte of the data changes, but not when it is moved.

    A hub data set is not read: its id and revision stand for it.
    """
    place = locate(source, base_dir)
    digest = hashlib.sha256()
    if isinstance(place, str):
        digest.update(f"hub\0{place}\0{source.revision}".encode())
        return digest.hexdigest()[:16]
    # Names inside a folder count (they decide the split), the name of a single file does not.
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    for file in files:
        name = file.relative_to(place).as_posix() if place.is_dir() else ""
        try:
            content = file_sum(file)
        except OSError as error:
            raise RequestError(f"{shown(file)}: cannot be read: {error.strerror or error}") from error
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()[:16]


def missing_column(where: str, field: str, column: str, available: Sequence[str]) -> RequestError:
    """Build the error for a column that a record lacks; ``available`` are the columns it has."""
    listed = ", ".join(available[:NAMES_SHOWN]) + (", ..." if len(available) > NAMES_SHOWN else "")
    near = nearest(column, available)
    role, hint = "" if field == column else f" (for the field {field!r})", ""
    if available and (near or not role):
        rename = f"; did you mean {near!r}? (rename it" if near else " (rename one"
        hint = f"{rename}, or where a task card names this file: columns: {{{field}: {near or 'NAME'}}})"
    return RequestError(f"{where}: no column {column!r}{role}; found: {listed or 'none'}{hint}")


def _rows(plan: _Plan) -> Iterator[Row]:
    records = _open(plan)
    from_text = isinstance(plan.place, Path) and _suffix(plan.place) == ".csv"
    count = 0
    for where, record in islice(records, plan.source.limit):
        count += 1
        columns = tuple(record)
        plan.require(where, columns)
        values: dict[str, Any] = {}
        for field, column in plan.columns.items():
            unused = field.in_place_of is not None and values[field.in_place_of] is not None
            values[field.name] = None if unused else _value(where, field, column, record.get(column), from_text)
        yield Row(where, values, columns)
    if not count:
        empty = isinstance(plan.place, Path) and plan.place.is_file() and plan.place.stat().st_size == 0
        reason = "the file is empty" if empty else "no records in it"
        raise RequestError(f"{plan.shown}: {reason}; at least one record is needed")


def _open(plan: _Plan) -> Iterator[Located]:
    if isinstance(plan.place, str) or plan.place.is_dir():
        return _dataset(plan)
    kind = {".parquet": _parquet, ".csv": _csv}.get(_suffix(plan.place) or "", _jsonl)
    return kind(plan, plan.place)


# Values


def _value(where: str, field: Field, column: str, value: Any, from_text: bool) -> str | bool | None:
    """Return the checked value of a field; ``from_text``: all values stand as text in the source."""
    if field.truth:
        if value is None or (from_text and not value.strip()):
            return None
        return _truth(where, column, value)
    if value is None and not field.required:
        return None
    if not isinstance(value, str):
        raise RequestError(f"{where}: column {column!r} must be text; found {_kind(value)}")
    if not field.blank and not value.strip():
        raise RequestError(f"{where}: column {column!r} is empty; a text is needed")
    check_text(value, f"{where}: column {column!r}")
    return value


def check_text(text: str, where: str) -> None:
    """Raise RequestError when a text cannot be written as UTF-8.

    It holds half of an emoji, as ``"\\ud83d"`` in JSON, or bytes of a command line that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} holds half a character ({text[error.start]!r} at position {error.start}), which is no valid text"
        ) from error


def _truth(where: str, column: str, value: Any) -> bool:
    word = str(value).strip().casefold() if isinstance(value, str | int) else ""
    if word not in ("true", "false", "1", "0"):
        raise RequestError(f"{where}: column {column!r} must be true, false or nothing; found {_kind(value)}")
    return word in ("true", "1")


def _kind(value: object) -> str:
    if value is None:
        return "nothing (null)"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return f"{names.get(type(value), type(value).__name__)} {shorten(value)}"


# Text files


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end); lines end at a line feed and nowhere else."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as handle:
            while raw := handle.readline(LINE_LIMIT + 1):
                number += 1
                if len(raw) > LINE_LIMIT:
                    raise RequestError(
                        f"{name}:{number}: a line longer than {LINE_LIMIT // 2**20} MiB; one record a line is needed"
                    )
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise RequestError(
                        f"{name}:{number}: not UTF-8 text (0x{raw[error.start]:02x} at byte {error.start + 1} of the "
                        "line); save the file as UTF-8"
                    ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise RequestError(f"{name}:{number + 1}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise RequestError(f"{name}:{number + 1}: cannot be read: {error.strerror or error}") from error


def _jsonl(plan: _Plan, path: Path) -> Iterator[Located]:
    for number, line in _lines(path, plan.shown):
        if not line.strip():
            continue
        where = f"{plan.shown}:{number}"
        try:
            record = json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else _first_line(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} (character {error.pos + 1})"
            rule = f"each line must be one whole JSON object; found {shorten(line.strip())}"
            raise RequestError(f"{where}: broken JSON: {reason}; {rule}") from error
        if not isinstance(record, dict):
            raise RequestError(f"{where}: each line must be one JSON object; found {_kind(record)}")
        yield where, record


def _csv(plan: _Plan, path: Path) -> Iterator[Located]:
    # The csv module's own limit (128 KiB a cell) is one for the whole process: raise it, never lower it.
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    table = csv.reader((line for _, line in _lines(path, plan.shown)), strict=True)
    header: list[str] | None = None
    while True:
        # A record may span lines; the line where it begins is the one that people look for.
        where = f"{plan.shown}:{table.line_num + 1}"
        try:
            cells = next(table, None)
        except csv.Error as error:
            raise RequestError(f"{where}: broken CSV: {error} (the record begins on this line)") from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = cells
            plan.choose(where, header)
        elif len(cells) != len(header):
            listed = ", ".join(header[:NAMES_SHOWN])
            raise RequestError(f"{where}: {len(cells)} cells, but the header has {len(header)} columns ({listed})")
        else:
            yield where, dict(zip(header, cells, strict=True))


# Parquet and datasets


def _parquet(plan: _Plan, path: Path) -> Iterator[Located]:
    parquet = import_module("pyarrow.parquet")
    row = 0
    try:
        # A buffer makes pyarrow stream the pages of a row group instead of reading the group whole.
        with parquet.ParquetFile(path, buffer_size=2**20) as file:
            names = list(file.schema_arrow.names)
            columns, unread = plan.choose(plan.shown, names), dict.fromkeys(names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{plan.shown}: row {row}", unread | record
    except (MoalignError, MemoryError):
        raise
    except Exception as error:  # pyarrow's own, and what a damaged page leads to: no UTF-8, dates out of range
        raise RequestError(f"{plan.shown}: not a whole Parquet file (after row {row}): {_first_line(error)}") from error


def _dataset(plan: _Plan) -> Iterator[Located]:
    datasets = import_module("datasets")
    split = plan.source.split
    row = 0
    try:
        if isinstance(plan.place, Path):
            splits = _open_folder(datasets, plan.place)
        else:
            splits = _open_hub(datasets, plan.place, plan.source)
        data = _choose_split(datasets, splits, split, plan.shown)
        names = data.column_names
        if names is not None:
            # Images and the like in other columns would be decoded for nothing.
            data = data.select_columns(plan.choose(f"{plan.shown}: split {split}", names))
        unread = dict.fromkeys(names or ())
        for record in data:
            row += 1
            yield f"{plan.shown}: split {split}, row {row}", unread | record
    except ConnectionError as error:
        if row:
            raise WorkError(f"{plan.shown}: the connection broke after row {row}: {_first_line(error)}") from error
        raise RequestError(
            f"{plan.shown}: this hub data set could not be reached (offline?), is not in the cache, and there is no "
            f"local file or folder {plan.local} ({_first_line(error)}); to work offline, point path to a local file "
            f"({', '.join(SUFFIXES)}) or to a data set folder"
        ) from error
    except (MoalignError, MemoryError):
        raise
    except Exception as error:  # of datasets, pyarrow, and of whatever reads a damaged file
        at = f" after row {row} of split {split}" if row else ""
        raise RequestError(f"{plan.shown}: cannot be read as a data set{at}: {_first_line(error)}") from error


def _open_folder(datasets: Any, path: Path) -> Any:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    # Streaming reads the folder's files in place; otherwise a second copy goes to the cache.
    return datasets.load_dataset(str(path.resolve()), streaming=True)


def _open_hub(datasets: Any, name: str, source: SourceSpec) -> Any:
    builder = datasets.load_dataset_builder(name, revision=source.revision)
    # Whatever goes wrong on the way to the hub, datasets takes the newest cached copy, and with it
    # possibly another revision than requested.
    cached = type(builder).__module__.endswith(".cache.cache")
    if cached and source.revision is not None and not str(builder.hash).startswith(source.revision):
        raise RequestError(
            f"{name}: revision {source.revision!r} could not be fetched from the hub, and the cached copy is revision "
            f"{builder.hash}; go online, or give a local file or folder as path"
        )
    if source.limit is not None:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _choose_split(datasets: Any, splits: Any, split: str, where: str) -> Any:
    if isinstance(splits, datasets.Dataset):
        # save_to_disk of one split: it may have kept the split's name.
        if splits.split is None or str(splits.split) == split:
            return splits
        splits = {str(splits.split): splits}
    if split not in splits:
        names = [str(name) for name in splits]
        raise RequestError(f"{where}: no split {split!r}; found: {', '.join(names)}{did_you_mean(split, names)}")
    return splits[split]


# Paths


def _suffix(path: Path) -> str | None:
    """Return the kind of file without ``.gz``, or None for an unknown one."""
    name = path.name.lower()
    return next((suffix.removesuffix(".gz") for suffix in SUFFIXES if name.endswith(suffix)), None)


def stem(path: str) -> str:
    """Return the name of a file without the suffix of its kind, or that of a data set on the hub.

    >>> stem("data/hh.v1.jsonl.gz"), stem("Anthropic/hh-rlhf")
    ('hh.v1', 'hh-rlhf')
    """
    name = Path(path).name
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)] or name


def _no_such_file(path: Path) -> str:
    if not os.path.isdir(path.parent):
        return f"{shown(path)}: no such file; the folder {shown(path.parent)} does not exist"
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    hint = f"; did you mean {near!r}?" if near else ""
    allowed = f"{', '.join(SUFFIXES)}, a data set folder or a hub id (owner/name)"
    return f"{shown(path)}: no such file or folder; allowed: {allowed}{hint}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

"""The calculator over a table of reward vectors: ``moalign eval --points FILE.csv --hypervolume``.

Standard library and numpy only: no model, no torch, no pandas.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moalign.core import preferences as prefs
from moalign.core.errors import RequestError
from moalign.pareto.front import Array, check_ref, nondominated
from moalign.pareto.hypervolume import adds_nothing, hypervolume
from moalign.pareto.indicators import expected_utility

Row = tuple[int, list[str]]
"""Line number (from 1) and the cells on it."""


def read_points(path: str | os.PathLike[str]) -> tuple[list[str], Array]:
    """Read a CSV table whose header row names the objectives: names ``[m]``, points ``[n, m]``.

    Raises:
        RequestError: no such file, not UTF-8, no or a faulty header, no rows, a missing or extra
            value, text, NaN or infinity; every message names the file and, where there is one, the
            line and the row (rows are counted from 1 after the header, blank lines are skipped).
            All faulty rows are reported at once, the first ten in full.
    """
    source = str(path)
    rows = _rows(Path(path), source)
    if not rows:
        raise RequestError(f"{source}: empty file; needed: a header row of objective names, then one row per point")
    names = _names(rows[0], source)
    values: list[list[float]] = []
    problems: list[str] = []
    for number, (line, cells) in enumerate(rows[1:], start=1):
        where = f"{source}:{line}: row {number}"
        if len(cells) != len(names):
            problems.append(f"{where}: found {_count(len(cells), 'value')}; needed: {len(names)} ({', '.join(names)})")
            continue
        row_problems = [fault for name, cell in zip(names, cells, strict=True) if (fault := _fault(cell, where, name))]
        problems.extend(row_problems)
        if not row_problems:
            values.append([float(cell) for cell in cells])
    if problems:
        more = [f"{source}: {len(problems) - 10} more problems"] if len(problems) > 10 else []
        raise RequestError(*problems[:10], *more)
    if not values:
        raise RequestError(f"{source}: no rows after the header ({', '.join(names)}); at least one point is needed")
    return names, np.array(values, dtype=np.float64)


def parse_ref(text: str) -> tuple[float, ...]:
    """Parse ``--ref 0,0`` into finite numbers; RequestError names the option and the bad part.

    >>> parse_ref("0,-0.1")
    (0.0, -0.1)
    """
    numbers = []
    for part in text.split(","):
        number = _number(part)
        if number is None or not math.isfinite(number):
            raise RequestError(
                f"--ref {text}: {part.strip()!r} is not a finite number; give one per objective, like --ref 0,0"
            )
        numbers.append(number)
    return tuple(numbers)


def calculate(
    path: str | os.PathLike[str],
    ref: Sequence[float] | None,
    minimise: bool = False,
    preferences: Sequence[Sequence[float]] = (),
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Return what ``moalign eval --points`` prints: hypervolume, number of points, size of the front.

    Args:
        path: CSV table (:func:`read_points`).
        ref: one number per objective, in the table's order and sign.
        minimise: smaller is better; table and ``ref`` are both negated.
        preferences: when given, their expected utility is added (of the negated table with
            ``minimise``).
        notify: called with one sentence when points add nothing because of ``ref``.

    Raises:
        RequestError: a faulty table, ``ref`` missing, of wrong length or not finite (names ``--ref``),
            or a wrong preference (names ``--prefs``).
    """
    names, points = read_points(path)
    example = ",".join(["0"] * len(names))
    if ref is None:
        raise RequestError(
            "--ref is missing: a hypervolume needs a reference point, "
            f"one number for each of {', '.join(names)}, like --ref {example}"
        )
    numbers = [float(number) for number in ref]
    option = "--ref " + ",".join(f"{number:g}" for number in numbers)
    if len(numbers) != len(names):
        raise RequestError(
            f"{option}: found {_count(len(numbers), 'number')}; {path} has {_count(len(names), 'objective')} "
            f"({', '.join(names)}), so give {len(names)}, like --ref {example}"
        )
    sign = -1.0 if minimise else 1.0
    points, corner = sign * points, sign * check_ref(numbers, len(names), option)
    weights = [prefs.validate(list(preference), names) for preference in preferences]
    outside = adds_nothing(points, corner)
    if outside and notify is not None:
        better = "below" if minimise else "above"
        notify(f"{path}: {outside} of {len(points)} points add nothing: not {better} {option} in every objective")
    result: dict[str, Any] = {
        "hypervolume": hypervolume(points, corner),
        "points": len(points),
        "front": int(nondominated(points).sum()),
        "objectives": names,
        "ref": numbers,
    }
    if weights:
        result["expected_utility"] = expected_utility(weights, points)
    return result


def _rows(path: Path, source: str) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            return list(_filled(handle, source))
    except FileNotFoundError:
        raise RequestError(f"{source}: no such file; --points needs a CSV table with a header row") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{source}: not UTF-8 text ({error.reason}); save the table as CSV in UTF-8") from None
    except OSError as error:
        raise RequestError(f"{source}: cannot be read ({error.strerror}); --points needs a CSV table") from None


def _filled(handle: Iterator[str], source: str) -> Iterator[Row]:
    reader = csv.reader(handle, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if len(stripped) > 1 or any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise RequestError(f"{source}:{reader.line_num}: broken CSV ({error})") from None


def _names(header: Row, source: str) -> list[str]:
    line, names = header
    where = f"{source}:{line}: header"
    if all(_number(name) is not None for name in names):
        raise RequestError(f"{where}: found only numbers ({', '.join(names)}); the first row must name the objectives")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise RequestError(f"{where}: found {names[0]!r} as one column; columns must be separated by commas")
    if "" in names:
        raise RequestError(f"{where}: column {names.index('') + 1} has no name; every column must name an objective")
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise RequestError(f"{where}: found the name {odd[0]!r}; line breaks and control characters are not allowed")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RequestError(f"{where}: found {', '.join(twice)} more than once; every column needs its own name")
    return names


def _fault(cell: str, where: str, name: str) -> str | None:
    number = _number(cell)
    if number is None:
        shown = repr(cell) if cell else "an empty cell"
        return f"{where}, column {name}: found {shown}; needed: a finite number"
    if not math.isfinite(number):
        return f"{where}, column {name}: found {cell}; NaN and infinity are not allowed"
    return None


def _number(text: str) -> float | None:
    # float() also reads 1_000, which no spreadsheet writes and which is more often a slip than a number.
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"

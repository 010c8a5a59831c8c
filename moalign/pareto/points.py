"""The calculator over a table of reward vectors: ``moalign eval --points FILE.csv --hypervolume``.

Standard library and numpy only: no model, no torch, no pandas.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moalign.core import preferences as prefs
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.pareto.front import check_ref, nondominated
from moalign.pareto.hypervolume import adds_nothing, hypervolume
from moalign.pareto.indicators import expected_utility


def read_points(path: str | os.PathLike[str]) -> tuple[list[str], Matrix]:
    """Read a CSV table whose header row names the objectives: names ``[m]``, points ``[n, m]``.

    Raises RequestError for no such file, not UTF-8, no or a faulty header, no rows, a missing or extra value, text, NaN
    or infinity; every message names the file and, where there is one, the line and the row (rows are counted from 1
    after the header, blank lines are skipped). All faulty rows are reported at once, the first ten in full.
    """
    rows = _rows(path)
    if not rows:
        raise RequestError(f"{path}: empty file; needed: a header row of objective names, then one row per point")
    line, names = rows[0]
    _check_names(names, f"{path}:{line}: header")
    values: list[list[float]] = []
    problems: list[str] = []
    for number, (line, cells) in enumerate(rows[1:], start=1):
        where = f"{path}:{line}: row {number}"
        if len(cells) != len(names):
            problems.append(f"{where}: found {_count(len(cells), 'value')}; needed: {len(names)} ({', '.join(names)})")
            continue
        numbers = [_number(cell) for cell in cells]
        values.append([math.nan if value is None else value for value in numbers])
        for name, cell, value in zip(names, cells, numbers, strict=True):
            if value is None:
                shown = repr(cell) if cell else "an empty cell"
                problems.append(f"{where}, column {name}: found {shown}; needed: a finite number")
            elif not math.isfinite(value):
                problems.append(f"{where}, column {name}: found {cell}; NaN and infinity are not allowed")
    if problems:
        more = [f"{path}: {len(problems) - 10} more problems"] if len(problems) > 10 else []
        raise RequestError(*problems[:10], *more)
    if not values:
        raise RequestError(f"{path}: no rows after the header ({', '.join(names)}); at least one point is needed")
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
    preferences: Sequence[Sequence[float] | str] = (),
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Return what ``moalign eval --points`` prints: hypervolume, number of points, size of the front.

    ``ref`` has one number per objective, in the table's order and sign. With ``minimise`` smaller is better: table and
    ``ref`` are both negated. Of ``preferences``, as numbers or as they are typed, the expected utility is added.
    ``notify`` gets one sentence when points add nothing because of ``ref``. The file is read once: it may be a pipe.

    Raises RequestError for a faulty table, a ``ref`` that is missing, of wrong length or not finite (names ``--ref``),
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
    weights = [prefs.parse(w, names) if isinstance(w, str) else prefs.validate(list(w), names) for w in preferences]
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


def _rows(path: str | os.PathLike[str]) -> list[tuple[int, list[str]]]:
    """Return line number (from 1) and stripped cells of every row that is not blank."""
    rows = []
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.reader(handle, strict=True, skipinitialspace=True)
            for cells in reader:
                stripped = [cell.strip() for cell in cells]
                if len(stripped) > 1 or any(stripped):
                    rows.append((reader.line_num, stripped))
    except csv.Error as error:
        raise RequestError(f"{path}:{reader.line_num}: broken CSV ({error})") from None
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; --points needs a CSV table with a header row") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text ({error.reason}); save the table as CSV in UTF-8") from None
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); --points needs a CSV table") from None
    return rows


def _check_names(names: list[str], where: str) -> None:
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

"""``make results``: the leaderboard and its figures, made from the committed records alone.

A record is the ``compare.json`` of one comparison, kept as ``results/published/<name>/compare.json``; those of older
versions are read, too. :mod:`moalign.report.leaderboard` says what is made of them.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moalign.comparison.result import CompareResult
from moalign.core.errors import MoalignError, RequestError
from moalign.core.text import visible
from moalign.report import leaderboard, verdict


def read(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the records below ``folder`` by their paths, in order, with the verdict as it is worded today.

    Raises RequestError when there is none, or naming one that is damaged or of a newer version.
    """
    records = {path: CompareResult.load(path).content for path in sorted(folder.glob("*/compare.json"))}
    if not records:
        raise RequestError(f"{folder}: no record; each is a file NAME/compare.json, as moalign compare writes it")
    for record in records.values():
        record["verdict"] = verdict.sentences(record)
    return records


def publish(folder: Path, page: Path) -> list[Path]:
    """Make figures, ``compare.md`` and the leaderboard ``page`` from the records below ``folder``.

    Returns the files written; none is before all records have been read. Raises as :func:`read` does.
    """
    return leaderboard.make(read(folder), page)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as ``python -m moalign.comparison.publish RECORDS PAGE``; prints the files written."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if len(given) != 2:
            raise RequestError(f"found {shlex.join(given) or 'nothing'}; needed: the folder of records, and the page")
        for path in publish(Path(given[0]), Path(given[1])):
            print(visible(str(path)))
    except MoalignError as error:
        print(visible(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The leaderboard and its figures, made from records of comparisons alone.

From each record, the figures beside it (light and dark) and its ``compare.md`` are made again, and from all of them one
``LEADERBOARD.md``. The same records give the same bytes: nothing is trained or measured, and no date is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moalign.report import figures, markdown, tables
from moalign.report.record import Row, judged
from moalign.report.tables import METHODS, Column, select
from moalign.report.templates import code, render
from moalign.runs import atomic


def make(records: Mapping[Path, Row], page: Path) -> list[Path]:
    """Make figures and ``compare.md`` beside each record, and the leaderboard ``page``; return the files written.

    ``records`` are the contents, at least one, by the paths of their files.
    """
    written: list[Path] = []
    for path, record in records.items():
        drawn = _draw(record, path.parent)
        light = {name: str(files[0]) for name, files in drawn.items()}
        text = markdown.page({**record, "figure": light.get("fronts"), "figures": light, "html": None}, path.parent)
        atomic.write_text(path.with_suffix(".md"), text)
        written += [*(file for files in drawn.values() for file in files), path.with_suffix(".md")]
    atomic.write_text(page, leaderboard(records, page.parent))
    return [*written, page]


def _draw(record: Row, folder: Path) -> dict[str, list[Path]]:
    """Draw every figure that applies, light and dark, beside the record; return its files by name."""
    drawn: dict[str, list[Path]] = {}
    for name, draw in figures.ALL.items() if judged(record) else ():
        for suffix, theme in (("", "light"), ("-dark", "dark")):
            content = draw(record, ".png", theme)
            if content is not None:
                path = folder / f"{name}{suffix}.png"
                atomic.write_bytes(path, content)
                drawn.setdefault(name, []).append(path)
    return drawn


def leaderboard(records: Mapping[Path, Row], folder: Path) -> str:
    """Return the leaderboard; its links are relative to ``folder``, where it will be written."""
    published = _relative(next(iter(records)).parent.parent, folder)
    sections = [_section(path, record, folder) for path, record in records.items()]
    return render("leaderboard.md", {"published": published, "sections": sections})


def _relative(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


def _section(path: Path, record: Row, folder: Path) -> dict[str, Any]:
    counts = {len(row["seeds"]) for row in record["rows"]}
    most, rows, environment = max(counts), judged(record), record["environment"]
    shown = "rank name hypervolume interval share seeds tau inner_product collapsed kl share_at_kl worst_group command"
    changed = {
        "tau": replace(METHODS["tau"], digits=2),
        "command": Column("command", _command, left=True, markdown=True),
    }
    return {
        "name": path.parent.name,
        "folder": _relative(path.parent, folder),
        "record": record,
        "judged": rows,
        "seeds": f"{'' if len(counts) == 1 else 'up to '}{most} seed{'' if most == 1 else 's'}",
        "ranking": select(METHODS, shown, record["rows"], **changed),
        "cost": select(METHODS, f"label {tables.COST} answering_rewards", rows),
        "machine": ", ".join(filter(None, (environment.get("cpu"), *(environment.get("gpus") or [])))),
    }


def _command(row: Row) -> str:
    """Return the command of the row's first seed, and which other seeds there are."""
    first, *others = row["runs"]
    more = f" (and seeds {', '.join(str(run['seed']) for run in others)})" if others else ""
    return f"{code(first['command'], cell=True)}{more}"

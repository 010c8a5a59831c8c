"""``moalign score``: score a file of responses with a task's reward panel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, CardSettings, Json, folder
from moalign.report.record import Row
from moalign.report.tables import Column
from moalign.report.units import number, of_judge

if TYPE_CHECKING:
    from moalign.evaluation.score import Scores

SHOWN = 20
"""Rows of the table without ``--out``."""


def score(
    task: Annotated[str, typer.Option(metavar="NAME|FILE", help="Task whose objectives score.")],
    source: Annotated[
        Path, typer.Option("--in", metavar="FILE.jsonl", help="Rows with prompt and response (JSONL, CSV, Parquet).")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="Write raw and normalised scores; else they are shown.")
    ] = None,
    set_: CardSettings = None,
    results: Annotated[
        Path, typer.Option(metavar="DIR", parser=folder, help="Where normalisers and scores are kept.")
    ] = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Score prompts and responses with a task's objectives."""
    from moalign import api

    with output.working() as progress:
        scores = api.score_file(task, source, out, settings=set_, results=results, progress=progress)
    if as_json:
        output.as_json(scores.as_dict())
        return
    if out is None:
        _show_rows(scores)
    _show_summary(scores)


def _show_rows(scores: Scores) -> None:
    texts = [Column(name, name, _short, left=True) for name in ("prompt", "response")]
    objectives = [Column(name, partial(_both, name)) for name in scores.objectives]
    output.line("raw scores (normalised), larger is better")
    output.table([*texts, *objectives], scores.scored[:SHOWN])
    if scores.rows > SHOWN:
        output.note(f"{scores.rows - SHOWN} more rows; --json shows them all, --out FILE.parquet writes them")


def _both(objective: str, row: Row) -> str:
    return f"{number(row['raw'][objective])} ({number(row['normalised'][objective])})"


def _show_summary(scores: Scores) -> None:
    columns = [Column("objective", "objective", left=True)]
    for name in ("mean", "sd", "min", "max", "normalised_mean"):
        columns.append(Column(name.replace("_", " "), name, number))
    output.table(columns, [{**numbers, "objective": name} for name, numbers in scores.summary.items()])
    for name, usage in scores.judges.items():
        output.line(f"{name}: {of_judge(usage)}")
    where = "" if scores.out is None else f": {scores.out}"
    output.line(f"{scores.rows} rows scored on {scores.task}{where}")


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."

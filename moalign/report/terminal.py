"""The comparison in the terminal: ranking, lead and cost as tables that fit 80 columns, then the verdict."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moalign.core.text import PROSE, visible
from moalign.report import tables, verdict
from moalign.report.record import Row, judged, optimum_on_grid
from moalign.report.tables import METHODS, PAIRS, Column, select
from moalign.report.units import NONE, count, number

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 100
"""Columns of the terminal used at most: longer lines are hard to read."""
_LABEL = 9
"""Characters that a row's label has at the least, however narrow the terminal is."""


def print_comparison(console: Console, record: Row) -> None:
    """Print the record of a comparison: tables, failures, verdict, files. Texts are shown literally, on one line."""
    from rich.text import Text

    width = min(console.width, WIDTH)

    def write(text: str, style: str = "") -> None:
        console.print(Text(visible(text), style=style), width=width)

    write(_heading(record))
    for table in _tables(record):
        console.print(_fitted(table, console, width), width=width)
    if judged(record):
        console.print()
    failures = [(row["label"], run) for row in record["rows"] for run in row["runs"] if run["error"]]
    for label, run in failures:
        write(f"{label} seed {run['seed']} failed: {run['error']}", "red")
    if failures:
        console.print()
    for index, sentence in enumerate(record["verdict"]):
        write(sentence, "bold" if index == 0 else "")
    if record["reported"]:
        console.print()
        write("reported by papers, not measured here and not comparable with the above:")
    for paper in record["reported"]:
        write(f"  {paper['method']}: {paper['metric']} {paper['value']:g} ({paper['source']})")
    console.print()
    for name in ("figure", "markdown", "html", "json"):
        if record[name]:
            console.print(Text(visible(f"{name:<9}{record[name]}")), soft_wrap=True)


def _heading(record: Row) -> str:
    ref = ", ".join(f"{value:g}" for value in record["ref"])
    optimum = optimum_on_grid(record)
    known = "" if optimum is None else f"; optimum {number(optimum)}"
    answers = f" x {record['samples']} answers" if record["samples"] > 1 else ""
    prompts = f", {record['prompts']} prompts{answers}" if record["prompts"] else ""
    return (
        f"{record['task']} ({', '.join(record['objectives'])}): "
        f"hypervolume over {len(record['grid'])} preferences{prompts}, reference point ({ref}){known}"
    )


def _tables(record: Row) -> list[Table]:
    """Return the ranking, the first row's lead over each other, cost and diagnostics, as far as there is any."""
    rows = judged(record)
    if not rows:
        return []
    shown_columns = "rank name hypervolume interval share tau collapsed kl share_at_kl worst_group"
    ranking = select(METHODS, shown_columns, record["rows"])
    shown = [_rich(ranking, "KL to base: nats per response" if ranking.has("KL to base") else None)]
    believed = tables.with_believed(record)
    if believed.rows:
        name = replace(METHODS["name"], heading="believed and true")
        numbers = [column for column in believed.columns[1:] if column.heading != "gap"]
        shown.append(_rich(tables.Table([name, *numbers], believed.rows), tables.legend(believed.rows)))
    leads = verdict.lead_over_each(record)
    if leads:
        over = Column(f"{rows[0]['label']} is ahead of", "other", left=True)
        sure = Column("", lambda pair: verdict.sure(pair), left=True)
        shown.append(_rich(select(PAIRS, "over difference interval sure", leads, over=over, sure=sure)))
    label = replace(METHODS["label"], heading="training took")
    counts = {name: replace(METHODS[name], write=_spent) for name in ("generated", "trained", "rewards", "answering")}
    cost = select(METHODS, f"label {tables.COST}", rows, label=label, **counts)
    shown.append(_rich(cost, "tokens generated, tokens trained on, reward calls, peak memory; tokens of answering"))
    measured = [row for row in rows if row["diagnostics"]]
    if measured:
        label = replace(METHODS["label"], heading="diagnostics")
        values = Column("at the end of training, mean over seeds", _diagnostics, left=True)
        shown.append(_rich(tables.Table([label, values], measured)))
    return shown


def _spent(value: float) -> str:
    return count(value) if value else NONE


def _diagnostics(row: Row) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in row["diagnostics"].items())


def _rich(content: tables.Table, caption: str | None = None) -> Table:
    """Return the table for the terminal: its texts may wrap, its numbers never do; failed rows are red."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold", caption=caption)
    table.caption_justify, table.caption_style = "left", "dim"
    table.collapse_padding = content.has("KL to base")  # so that names still fit on one line at 80 columns
    for column in content.columns:
        heading = Text(visible(column.short or column.heading, PROSE))
        if column.left and column.heading:
            table.add_column(heading, justify="left", overflow="fold", min_width=8)
        else:
            table.add_column(heading, justify="left" if column.left else "right", no_wrap=True, min_width=1)
    for row, cells in zip(content.rows, content.cells(brief=True), strict=True):
        table.add_row(*(Text(visible(cell)) for cell in cells), style="red" if row.get("status") == "failed" else None)
    return table


def _fitted(table: Table, console: Console, width: int) -> Table:
    """Return the table without its last columns where these would leave the labels no room in ``width`` characters."""
    from rich.measure import Measurement

    labels = next(column for column in table.columns if column.overflow == "fold")
    labels.width = _LABEL
    wide = console.options.update(max_width=10 * WIDTH)
    while len(table.columns) > 2 and Measurement.get(console, wide, table).maximum > width:
        table.columns.pop()
    labels.width = None
    return table

"""The comparison in the terminal: ranking, lead and cost as tables that fit 80 columns, then the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moalign.report import verdict
from moalign.report.units import NONE, any_nats, count, duration, interval, memory, nats, number, percent, signed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 100
"""Columns of the terminal used at most: longer lines are hard to read."""
_LABEL = 9
"""Characters that a row's label has at the least, however narrow the terminal is."""


def print_comparison(console: Console, record: Mapping[str, Any]) -> None:
    """Print the record of a comparison: tables, failures, verdict, files. Labels and texts are printed literally."""
    from rich.text import Text

    width = min(console.width, WIDTH)
    judged = [row for row in record["rows"] if row["status"] != "failed"]
    console.print(Text(_heading(record)), width=width)
    if judged:
        console.print(_fitted(ranking(record["rows"]), console, width), width=width)
        leads = verdict.lead_over_each(record)
        if leads:
            console.print(_fitted(lead(judged[0]["label"], leads), console, width), width=width)
        console.print(_fitted(cost(judged), console, width), width=width)
        if any(row.get("diagnostics") for row in judged):
            console.print(diagnostics(judged), width=width)
        console.print()
    failures = [(row["label"], run) for row in record["rows"] for run in row["runs"] if run["error"]]
    for label, run in failures:
        console.print(Text(f"{label} seed {run['seed']} failed: {run['error']}", style="red"), width=width)
    if failures:
        console.print()
    for index, sentence in enumerate(record["verdict"]):
        console.print(Text(sentence, style="bold" if index == 0 else ""), width=width)
    if record.get("reported"):
        console.print(Text("\nreported by papers, not measured here and not comparable with the above:"), width=width)
        for reported in record["reported"]:
            text = f"  {reported['method']}: {reported['metric']} {reported['value']:g} ({reported['source']})"
            console.print(Text(text), width=width)
    console.print()
    for name in ("figure", "markdown", "html", "json"):
        if record.get(name):
            console.print(Text(f"{name:<9}{record[name]}"), soft_wrap=True)


def _heading(record: Mapping[str, Any]) -> str:
    ref = ", ".join(f"{value:g}" for value in record["ref"])
    known = ""
    if record["optimum"]:
        known = f"; optimum {number(record['optimum']['hypervolume'])}"
    samples = record.get("samples") or 1
    answers = f" x {samples} answers" if samples > 1 else ""
    prompts = f", {record['prompts']} prompts{answers}" if record["prompts"] else ""
    return (
        f"{record['task']} ({', '.join(record['objectives'])}): "
        f"hypervolume over {len(record['grid'])} preferences{prompts}, reference point ({ref}){known}"
    )


def ranking(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the main table: hypervolume with its interval, share of the optimum when known, tau, quality."""
    from rich.text import Text

    known = any(row["optimal_share"] is not None for row in rows)
    moved = any_nats(rows)
    heads = ["#", "method", "hyperv.", "95 % interval", *(["optimum"] if known else []), "tau", "collapsed"]
    heads += ["KL to\nbase"] if moved else []
    table = _table(heads)
    if moved:
        table.collapse_padding = True  # so that names still fit on one line at 80 columns
        table.caption = "KL to base: nats per response"
        table.caption_justify, table.caption_style = "left", "dim"
    for row in rows:
        name = row["label"] + ("" if row["status"] == "done" else f" ({row['status']})")
        if row["status"] == "failed":
            table.add_row(NONE, Text(name), *[NONE] * (len(heads) - 2), style="red")
            continue
        table.add_row(
            str(row["rank"]),
            Text(name),
            number(row["hypervolume"]),
            interval(row["ci"]),
            *([percent(row["optimal_share"])] if known else []),
            number(row["indicators"]["tau"], 2),
            percent(row["quality"]["rate"]),
            *([nats(row["quality"])] if moved else []),
        )
    return table


def lead(label: str, pairs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the first-ranked row's lead over each other row, paired over prompts (and seeds)."""
    from rich.text import Text

    table = _table([f"{label} is ahead of", "by", "95 % interval", ""], name=0)
    table.columns[-1].justify = "left"
    for pair in pairs:
        table.add_row(Text(pair["other"]), signed(pair["difference"]), interval(pair["ci"]), verdict.sure(pair))
    return table


def cost(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the cost of training per seed, and the tokens generated by the evaluation."""
    from rich.text import Text

    table = _table(["training took", "time", "generated", "trained", "rewards", "memory", "answering"], name=0)
    table.caption = "tokens generated, tokens trained on, reward calls, peak memory; tokens of answering"
    table.caption_justify, table.caption_style = "left", "dim"
    for row in rows:
        spent = row["cost"]
        table.add_row(
            Text(row["label"]),
            duration(spent["seconds"]),
            _count(spent["tokens_generated"]),
            _count(spent["tokens_trained"]),
            _count(spent["reward_calls"]),
            memory(spent["peak_memory_bytes"]),
            _count(spent["answering"]["tokens_generated"]),
        )
    return table


def diagnostics(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the diagnostics at the end of training, under each method's own names."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("diagnostics", overflow="fold", min_width=8)
    table.add_column("at the end of training, mean over seeds", overflow="fold")
    for row in rows:
        if row.get("diagnostics"):
            values = ", ".join(f"{name} {value:.3g}" for name, value in row["diagnostics"].items())
            table.add_row(Text(row["label"]), Text(values))
    return table


def _count(value: float) -> str:
    return count(value) if value else NONE


def _table(heads: Sequence[str], name: int = 1) -> Table:
    """Return a table with a column ``name`` of names, which may wrap; all others hold numbers, which never do."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, header_style="bold")
    for index, head in enumerate(heads):
        if index == name:
            table.add_column(Text(head), justify="left", overflow="fold", min_width=8)
        else:
            table.add_column(head, justify="right", no_wrap=True, min_width=1)
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

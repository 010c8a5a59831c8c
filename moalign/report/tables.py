"""The tables of a comparison: every column once, and which of them each output shows.

The terminal, ``compare.md``, ``LEADERBOARD.md`` and the HTML page are all written from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

from moalign.report.record import Row, judged
from moalign.report.units import NONE, count, duration, interval, memory, nats, number, percent, signed

Source = str | Callable[[Row], Any]
"""Where a value is in a row: a path such as ``cost.seconds``, or a function."""


def read(row: Row, source: Source) -> Any:
    """Return a row's value; None where any part of the path is missing.

    >>> read({"cost": {"seconds": 3}}, "cost.seconds"), read({"cost": None}, "cost.seconds")
    (3, None)
    """
    if callable(source):
        return source(row)
    value: Any = row
    for key in source.split("."):
        value = value.get(key) if value is not None else None
    return value


@dataclass(frozen=True)
class Column:
    """How one quantity is read, written and sorted."""

    heading: str
    source: Source
    write: Callable[..., str] = str
    """Value -> text; called as ``write(value, digits)`` where ``digits`` are given."""
    digits: int | None = None
    brief: int | None = None
    """Digits in the terminal."""
    short: str = ""
    """Heading in the terminal, where that is another."""
    needs: Source | None = None
    """The column is shown only where some row has this."""
    left: bool = False
    """Text: aligned to the left."""
    rising: bool = False
    """The best value, or the first word, is the smallest: a click on its heading begins there."""
    markdown: bool = False
    """Its text is Markdown already."""
    whole: bool = False
    """Never broken over two lines in a terminal: somebody may copy it."""
    optional: bool = False
    """Left out of a terminal's table that would else be too wide."""
    order: Callable[[Any], Any] | None = None
    """Value -> what the page sorts by; None: the value."""

    def text(self, row: Row, brief: bool = False) -> str:
        """Return the row's value as text; ``brief``: with the terminal's digits."""
        value, digits = read(row, self.source), self.brief if brief and self.brief is not None else self.digits
        if value is None:
            return NONE
        return self.write(value) if digits is None else self.write(value, digits)

    def applies(self, rows: Iterable[Row]) -> bool:
        """Return whether the column belongs in a table of these rows."""
        return self.needs is None or any(read(row, self.needs) is not None for row in rows)

    def sort_key(self, row: Row) -> Any:
        """Return what the page sorts the row by; None for a missing value, which goes last."""
        value = read(row, self.source)
        return value if value is None or self.order is None else self.order(value)


@dataclass(frozen=True)
class Table:
    """Columns that apply, and the rows to write in them."""

    columns: Sequence[Column]
    rows: Sequence[Row]

    def has(self, heading: str) -> bool:
        """Return whether the column with this heading is shown."""
        return any(column.heading == heading for column in self.columns)

    def cells(self, brief: bool = False) -> list[list[str]]:
        """Return the text of every cell, row by row."""
        return [[column.text(row, brief) for column in self.columns] for row in self.rows]


def select(columns: Mapping[str, Column], names: str, rows: Iterable[Row], **changed: Column) -> Table:
    """Return the table of the columns named in ``names``, as far as they apply to ``rows``.

    ``changed`` replaces or adds columns for this table only.
    """
    lines, available = list(rows), {**columns, **changed}
    chosen = [available[name] for name in names.split()]
    shown = [column for column in chosen if column.applies(lines)]
    return Table(shown, lines)


# --- one row per method -----------------------------------------------------------------------------------------


MARK = "†"
"""Behind the name of a method whose lead in believed reward is none in truth."""


def legend(rows: Iterable[Row]) -> str | None:
    """Return what the mark means, where a row has it."""
    if not any(read(row, "believed.false_wins") for row in rows):
        return None
    return f"{MARK} ahead of another method by the rewards that were trained on, but not in truth: see the verdict"


def _name(row: Row) -> str:
    mark = f" {MARK}" if read(row, "believed.false_wins") else ""
    return str(row["label"]) + mark + ("" if row["status"] == "done" else f" ({row['status']})")


def _believed_hypervolume(row: Row) -> Any:
    """Return the hypervolume by the rewards that were trained on; older records hold its difference to the true one."""
    return row["hypervolume"] + row["gap"] if row["gap"] is not None else None


def _further_seeds(row: Row) -> Any:
    return row["seeds"][1:] or None


def _spacing(row: Row) -> Any:
    """Return the spacing of a front of at least two points: fewer have none."""
    return read(row, "indicators.spacing") if (row["front"] or 0) >= 2 else None


def _quality_with_kl(row: Row) -> Any:
    return row["quality"] if read(row, "quality.kl") is not None else None


def _tokens(row: Row) -> Any:
    return row["cost"] and row["cost"]["tokens_generated"] + row["cost"]["tokens_trained"]


def _per_minute(row: Row) -> Any:
    value = read(row, "hypervolume_per_cost.seconds")
    return None if value is None else 60 * value


def _by_seed(row: Row) -> Any:
    return row["hypervolume_by_seed"] or None


def _each(values: Sequence[float]) -> str:
    return ", ".join(number(value) for value in values)


_METHOD = Column("method", "label", left=True, rising=True)

METHODS = {
    "rank": Column("#", "rank", rising=True),
    "name": replace(_METHOD, source=_name),
    "label": _METHOD,
    "hypervolume": Column("hypervolume", "hypervolume", number, 4, brief=3, short="hyperv."),
    "interval": Column("95 % interval", "ci", interval, 4, brief=3, order=itemgetter(0)),
    "share": Column("% of optimum", "optimal_share", percent, 1, brief=0, short="optimum", needs="optimal_share"),
    "seeds": Column("each seed", _by_seed, _each, needs=_further_seeds, order=itemgetter(0)),
    "iqm": Column("interquartile mean", "hypervolume_iqm", number, 4, needs=_further_seeds),
    "tau": Column("tau", "indicators.tau", number, 3, brief=2),
    "inner_product": Column("inner product", "indicators.inner_product", number),
    "utility": Column("expected utility", "indicators.expected_utility", number),
    "regret": Column("regret", "indicators.regret", number, needs="indicators.regret", rising=True),
    "igd_plus": Column("IGD+", "indicators.igd_plus", number, rising=True),
    "spacing": Column("spacing", _spacing, number, rising=True),
    "collapsed": Column("collapsed", "quality.rate", percent, 1, brief=0, rising=True),
    "length": Column("mean length", "quality.mean_length", number, 1),
    "distinct": Column("distinct-3", "quality.distinct_3", number),
    "kl": Column(
        "KL to base",
        _quality_with_kl,
        nats,
        short="KL to\nbase",
        needs="quality.kl",
        rising=True,
        order=itemgetter("kl"),
    ),
    "share_at_kl": Column(
        "share at its KL", "share_at_kl", percent, 1, brief=0, short="share at\nits KL", needs="share_at_kl"
    ),
    "worst_group": Column("worst group", "worst_group", signed, 3, brief=2, short="worst\ngroup", needs="worst_group"),
    "time": Column("time", "cost.seconds", duration, rising=True),
    "tokens": Column("tokens", _tokens, count, rising=True),
    "generated": Column("tokens generated", "cost.tokens_generated", count, short="generated", rising=True),
    "trained": Column("tokens trained on", "cost.tokens_trained", count, short="trained", rising=True),
    "rewards": Column("reward calls", "cost.reward_calls", count, short="rewards", rising=True),
    "memory": Column("peak memory", "cost.peak_memory_bytes", memory, short="memory", rising=True),
    "answering": Column("answering: tokens", "cost.answering.tokens_generated", count, short="answering", rising=True),
    "answering_rewards": Column("answering: reward calls", "cost.answering.reward_calls", count, rising=True),
    "per_minute": Column("hypervolume per minute", _per_minute, number),
    "gap": Column("gap", "gap", signed, 4),
    "believed": Column(
        "believed hypervolume", _believed_hypervolume, number, 4, brief=3, short="believed\nhyperv.", needs="gap"
    ),
    "believed_product": Column(
        "believed inner product",
        "believed.inner_product",
        number,
        short="believed\ninner",
        needs="believed.inner_product",
    ),
}
"""Every column of a table with one row per method."""

TRUE = {
    "kl": replace(METHODS["kl"], heading="KL (nats)", short="KL\n(nats)"),
    "hypervolume": replace(METHODS["hypervolume"], heading="true hypervolume", short="true\nhyperv."),
    "inner_product": replace(
        METHODS["inner_product"], heading="true inner product", short="true\ninner", needs="believed.inner_product"
    ),
}
"""Columns as they are called beside believed ones."""

BELIEVED = "name kl believed hypervolume gap believed_product inner_product"


def with_believed(record: Row) -> Table:
    """Return believed beside true rewards, of the rows whose rewards in training were not the judge's."""
    return select(METHODS, BELIEVED, [row for row in judged(record) if row["gap"] is not None], **TRUE)


COST = "time generated trained rewards memory answering"


# --- other tables -----------------------------------------------------------------------------------------------

PAIRS = {
    "a": replace(_METHOD, source="a"),
    "b": Column("against", "b", left=True, rising=True),
    "difference": Column("difference", "difference", signed, 4, brief=3, short="by"),
    "interval": METHODS["interval"],
    "above": Column("above 0 in", "share_above_zero", percent, 1),
    "seeds": Column(
        "a seed beats a seed in", "probability_of_improvement", percent, 0, needs="probability_of_improvement"
    ),
    "certain": Column("certain", lambda pair: "yes" if pair["certain"] else "no"),
}
"""Columns of paired differences."""


MANY = 6
"""Methods beyond which every pair in a row of its own is more than a reader takes in."""


def leads(record: Row) -> Table:
    """Return the differences of the best method from each other one; of a few methods those of every pair."""
    rows, pairs = judged(record), record["pairs"]
    if len(rows) > MANY:
        pairs = [pair for pair in pairs if rows[0]["label"] in (pair["a"], pair["b"])]
    return select(PAIRS, " ".join(PAIRS), pairs)


def differences(record: Row) -> Table:
    """Return the differences of many methods as a matrix, row minus column, certain ones in bold Markdown.

    Columns are named by their number in the order of the rows, which is that of the ranking. Without rows where
    :func:`leads` has every pair.
    """
    rows = judged(record) if len(judged(record)) > MANY else []
    known = {(pair["a"], pair["b"]): pair for pair in record["pairs"]}

    def between(row: Row, other: str) -> str:
        if (pair := known.get((row["label"], other))) is None:
            return ""
        return f"**{signed(pair['difference'], 3)}**" if pair["certain"] else signed(pair["difference"], 3)

    names = [row["label"] for row in rows]
    columns = [Column(str(index), partial(between, other=name), markdown=True) for index, name in enumerate(names, 1)]
    first = Column("method", lambda row: f"{names.index(row['label']) + 1} {row['label']}", left=True)
    return Table([first, *columns[1:]], rows[:-1])


_SIDES = (
    _METHOD,
    Column("preferences", lambda row: row["side"].replace("_", " "), left=True, rising=True),
    Column("how many", "preferences"),
    METHODS["hypervolume"],
    METHODS["share"],
    Column("utility, % of optimum", "utility_share", percent, 1),
    replace(METHODS["tau"], source="tau"),
    replace(METHODS["inner_product"], source="inner_product"),
)
_DIAGNOSTICS = (
    _METHOD,
    Column("quantity", "quantity", left=True, rising=True),
    Column("value", "value", lambda value: f"{value:.4g}"),
)
_REPORTED = (
    *(Column(name, name, left=True, rising=True) for name in ("method", "metric", "setting", "source")),
    Column("value", "value", lambda value: f"{value:g}"),
)


def of_comparison(record: Row, ranking: str, cost: str) -> dict[str, Table]:
    """Return every table of a comparison by name; ``ranking`` and ``cost`` name the columns of these two."""
    rows = judged(record)
    sides = [
        {**numbers, "label": row["label"], "side": side}
        for row in rows
        for side, numbers in (row["generalisation"] or {}).items()
    ]
    measured = [
        {"label": row["label"], "quantity": quantity, "value": value}
        for row in rows
        for quantity, value in row["diagnostics"].items()
    ]
    return {
        "ranking": select(METHODS, ranking, record["rows"]),
        "pairs": select(PAIRS, " ".join(PAIRS), record["pairs"]),
        "cost": select(METHODS, cost, rows),
        "generalisation": Table(_SIDES, sides),
        "gaps": with_believed(record),
        "diagnostics": Table(_DIAGNOSTICS, measured),
        "reported": Table(_REPORTED, record["reported"]),
    }

"""Hypervolume against the cost of training, in the units that all methods share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moalign.report import style
from moalign.report.style import Theme, ThemeName
from moalign.report.units import machines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {
    "tokens_generated": "tokens generated in training",
    "tokens_trained": "tokens trained on",
    "reward_calls": "reward calls in training",
    "seconds": "time of training",
}


def draw(record: Mapping[str, Any], suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Return the figure as a file's content: one panel per unit of cost, with zero at the left edge.

    Args:
        record: of a comparison (``compare.json``), with at least one row that has points.
        suffix: one of :data:`moalign.report.style.FORMATS`.
        theme: ``light`` or ``dark``.
    """
    rows = [row for row in record["rows"] if row["points"]]
    with style.canvas(7.6, 6.0, theme) as (figure, colours):
        panels = figure.subplots(2, 2, sharey=True).ravel().tolist()
        for panel, (unit, name) in zip(panels, UNITS.items(), strict=True):
            _panel(panel, rows, unit, colours)
            mixed = unit == "seconds" and len(machines(record)) > 1
            panel.set_title(f"{name} (different machines: not comparable)" if mixed else name, loc="left")
        for panel in panels[::2]:
            panel.set_ylabel("hypervolume")
        if record["optimum"]:
            for panel in panels:
                panel.axhline(
                    record["optimum"]["hypervolume"], color=colours.optimum, linewidth=1.6, zorder=1, label="optimum"
                )
        handles, labels = panels[0].get_legend_handles_labels()
        style.legend(figure, handles, labels, "", beside=False)
        style.headline(figure, f"{record['task']}: hypervolume (95 % interval) against cost, mean per seed")
        return style.content(figure, suffix)


def _panel(panel: Axes, rows: Sequence[Mapping[str, Any]], unit: str, colours: Theme) -> None:
    spent = [float(row["cost"][unit]) for row in rows]
    # Logarithmic, with room for 0; less than a tenth of a second counts as 0.
    least = min((value for value in spent if value > 0.1), default=1.0)
    panel.set_xscale("symlog", linthresh=least / 2, linscale=0.3)
    for index, (row, value) in enumerate(zip(rows, spent, strict=True)):
        colour, marker = style.look(index, colours)
        low, high = (abs(bound - row["hypervolume"]) for bound in row["ci"])
        panel.errorbar(
            value if value > 0.1 else 0.0,
            row["hypervolume"],
            yerr=[[low], [high]],
            color=colour,
            marker=marker,
            markersize=7,
            markeredgecolor=colours.paper,
            elinewidth=1.0,
            linestyle="none",
            zorder=3,
            label=style.wrapped(row["label"]),
        )
    panel.margins(x=0.1)
    panel.set_xticks(_ticks(least, max([*spent, least]), unit == "seconds"))
    panel.xaxis.set_major_formatter(lambda value, _: _short(value, unit == "seconds"))
    panel.xaxis.set_minor_locator(_none())


_CLOCK = (0.1, 1, 10, 60, 600, 3600, 10 * 3600, 100 * 3600)
"""Seconds that read well on an axis."""


def _ticks(least: float, most: float, clock: bool) -> list[float]:
    """Return 0 and at most four steps: powers of ten (of seconds: clock times), or the ends where none lies between."""
    steps = _CLOCK if clock else [10.0**power for power in range(16)]
    inner = [step for step in steps if least / 2 <= step <= 2 * most]
    return [0.0, *(inner[:: 1 + (len(inner) - 1) // 4] if inner else [most])]


def _short(value: float, clock: bool) -> str:
    if not value:
        return "0"
    units = [(3600, " h"), (60, " min"), (1, " s")] if clock else [(1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")]
    size, unit = next(((size, unit) for size, unit in units if value >= size), (1, " s" if clock else ""))
    return f"{value / size:.3g}{unit}"


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()

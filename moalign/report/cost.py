"""Hypervolume against the cost of training, in the units that all methods share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moalign.report import style
from moalign.report.record import Row, judged, machines
from moalign.report.style import Theme, ThemeName
from moalign.report.units import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {
    "tokens_generated": "tokens generated in training",
    "tokens_trained": "tokens trained on",
    "reward_calls": "reward calls in training",
    "seconds": "time of training",
}
_CLOCK = {0: "0", 0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}
"""Seconds that read well on an axis."""


def draw(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Return the figure of a comparison in which some row has points: a panel per unit, with zero at its left edge."""
    with style.canvas(7.6, 6.0, theme) as (figure, colours):
        panels = style.panels(figure, len(UNITS), 2, sharey=True)
        for panel, (unit, name) in zip(panels, UNITS.items(), strict=True):
            _panel(panel, judged(record), unit, colours)
            mixed = unit == "seconds" and len(machines(record)) > 1
            panel.set_title(f"{name} (different machines: not comparable)" if mixed else name)
            if record["optimum"]:
                best = record["optimum"]["hypervolume"]
                panel.axhline(best, color=colours.optimum, linewidth=1.6, zorder=1, label="optimum")
        for panel in panels[::2]:
            panel.set_ylabel("hypervolume")
        style.legend(figure, *panels[0].get_legend_handles_labels(), "", beside=False)
        title = f"{record['task']}: hypervolume (95 % interval) against cost, mean per seed"
        return style.content(figure, title, suffix)


def _panel(panel: Axes, rows: Sequence[Row], unit: str, colours: Theme) -> None:
    from matplotlib.ticker import EngFormatter, NullLocator

    spent = [float(row["cost"][unit]) for row in rows]
    # Logarithmic, with room for 0; less than a tenth of a second counts as 0.
    least = min((value for value in spent if value > 0.1), default=1.0)
    panel.set_xscale("symlog", linthresh=least / 2, linscale=0.3)
    for index, (row, value) in enumerate(zip(rows, spent, strict=True)):
        volume = row["hypervolume"]
        panel.errorbar(
            value if value > 0.1 else 0.0,
            volume,
            yerr=[[abs(bound - volume)] for bound in row["ci"]],
            elinewidth=1.0,
            zorder=3,
            label=style.wrapped(row["label"]),
            **style.look(index, colours).marks(7, 0),
        )
    panel.margins(x=0.1)
    if unit == "seconds":
        ticks = _ticks(least, max([*spent, least]), _CLOCK)
        panel.set_xticks(ticks, [_CLOCK.get(tick) or duration(tick) for tick in ticks])
    else:
        ticks = _ticks(least, max([*spent, least]), (10.0**power for power in range(16)))
        panel.set_xticks(ticks, [EngFormatter()(float(f"{tick:.3g}")) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())


def _ticks(least: float, most: float, steps: Iterable[float]) -> list[float]:
    """Return 0 and at most four of the steps, or the largest value where none lies between."""
    inner = [step for step in steps if least / 2 <= step <= 2 * most]
    return [0.0, *(inner[:: 1 + (len(inner) - 1) // 4] if inner else [most])]

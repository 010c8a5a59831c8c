"""The figure by KL to base: what each method reaches and, where it is known, the most that any policy can.

See :mod:`moalign.report.figures` for what a figure is drawn from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moalign.report import style
from moalign.report.record import Row, judged
from moalign.report.style import Theme, ThemeName
from moalign.report.units import percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TICKS = (0, 0.1, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Nats on the axis, which is linear in their square root."""
_ROOM = 1.08
_APART = 1 / 14
"""Of the axis, at least, from one number to the next."""


def draw(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Draw utility w.n over the square root of the KL to base, a panel for each preference of the record's frontier.

    Without a frontier: hypervolume and inner product over the mean KL of all preferences. The axis is that of Gao,
    Schulman and Hilton (2022): on it the frontier leaves the base as a straight line. A method without a known KL is
    left out; one whose KL is an upper bound has a line to the left. None where no KL is known.
    """
    rows = judged(record)
    curves = record["frontier"]
    if not curves:
        return _reached(record, suffix, theme)
    most = max((point["kl"] or 0 for row in rows for curve in curves for point in _points(row, curve)), default=0)
    if most <= 0:
        return None
    columns = len(curves) if len(curves) <= 3 else 2
    lines = -(-len(curves) // columns)
    with style.canvas(3.7 * columns + 0.4, 3.3 * lines + 1.0, theme) as (figure, colours):
        panels = style.panels(figure, len(curves), columns)
        for panel, curve in zip(panels, curves, strict=True):
            _panel(panel, record, curve, most, colours)
        _legend(figure, panels, "method, share at its KL")
        title = f"{record['task']}: utility by KL to base, mean over seeds"
        return style.content(figure, title, suffix)


def _reached(record: Row, suffix: str, theme: ThemeName) -> bytes | None:
    """Draw what the methods reach over their KL where nobody knows the most that can be reached."""
    rows = [(index, row) for index, row in enumerate(judged(record)) if row["quality"].get("kl") is not None]
    most = max((row["quality"]["kl"] for _, row in rows), default=0.0)
    if most <= 0:
        return None
    with style.canvas(10.4, 4.4, theme) as (figure, colours):
        panels = style.panels(figure, 2, 2)
        for panel, quantity in zip(panels, ("hypervolume", "inner product"), strict=True):
            for index, row in rows:
                y = row["hypervolume"] if quantity == "hypervolume" else row["indicators"]["inner_product"]
                _mark(panel, index, row["quality"], y, style.wrapped(row["label"]), colours)
            _axis(panel, _ROOM**2 * most)
            panel.set_ylabel(quantity)
        _legend(figure, panels, "method")
        return style.content(figure, f"{record['task']}: what is reached at which KL to base, mean over seeds", suffix)


def _legend(figure: Figure, panels: Sequence[Axes], title: str) -> None:
    handles: dict[str, object] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    style.legend(figure, list(handles.values()), list(handles), title, beside=False)


def _mark(panel: Axes, index: int, at: Row, y: float, label: str, colours: Theme) -> None:
    """Mark a method at ``kl`` and ``kl_bound`` of ``at``."""
    marks, x = style.look(index, colours).marks(6.5, 0), float(np.sqrt(max(at["kl"], 0.0)))
    panel.plot([x], [y], **marks, zorder=3, clip_on=False, label=label)
    if at["kl_bound"]:
        panel.plot([0.0, x], [y, y], color=marks["color"], linewidth=0.9, alpha=0.6, zorder=2)


def _axis(panel: Axes, end: float) -> None:
    """Write nats on an axis that is linear in their square root, up to ``end``."""
    ticks = ticks_up_to(end)
    panel.set_xticks(np.sqrt(ticks).tolist(), [f"{tick:g}" for tick in ticks])
    panel.set(xlim=(0, float(np.sqrt(end))), xlabel="KL to base, nats per response")


def _points(row: Row, curve: Row) -> list[Row]:
    """Return the row's point at the curve's preference, if it has that and its KL is known."""
    at = [point for point in row["points"] if list(point["prefs"]) == list(curve["prefs"])]
    return [point for point in at if point["kl"] is not None]


def ticks_up_to(end: float) -> list[float]:
    """Return the nats to write on an axis up to ``end``, far enough from each other to be read.

    >>> ticks_up_to(10.0), ticks_up_to(75.0)
    ([0, 0.1, 0.5, 1, 2, 4, 8], [0, 0.5, 2, 8, 16, 32, 64])
    """
    ticks: list[float] = []
    for tick in _TICKS:
        if tick <= end and (not ticks or tick**0.5 - ticks[-1] ** 0.5 >= _APART * end**0.5):
            ticks.append(tick)
    return ticks


def _panel(panel: Axes, record: Row, curve: Row, most: float, colours: Theme) -> None:
    w, end = np.array(curve["prefs"]), _ROOM**2 * most
    best = np.array(curve["mean"]) @ w
    # Beyond its last point the optimum stays where it is.
    kls, best = np.append(curve["kl"], max(end, curve["kl"][-1])), np.append(best, best[-1])
    panel.plot(np.sqrt(kls), best, color=colours.optimum, linewidth=2.2, alpha=0.75, zorder=1, label="optimum at a KL")
    for index, row in enumerate(judged(record)):
        share = "" if row["share_at_kl"] is None else f" ({percent(row['share_at_kl'])})"
        for point in _points(row, curve):
            label = f"{style.wrapped(row['label'])}{share}"
            _mark(panel, index, point, float(w @ point["mean"]), label, colours)
    _axis(panel, end)
    weights = ", ".join(f"{weight:.2g}" for weight in w)
    panel.set_ylabel("utility w·n")
    panel.set_title(f"w = {weights}")

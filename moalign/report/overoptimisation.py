"""True and believed reward along training, over the distance from the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.report import style
from moalign.report.record import Row
from moalign.report.style import ThemeName
from moalign.report.units import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = {"believed": ("believed, by the rewards of training", 1, style.REFERENCE_LINE), "true": ("true", 0, "solid")}
"""What is drawn -> its name, its colour's index, its dashes."""


def draw_over_optimisation(curves: Sequence[Row], suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Draw mean w.n over sqrt(KL) along training: a panel for each method, a line for each seed.

    The axes are those of Gao, Schulman and Hilton 2022 (arXiv 2210.10760), figure 1. ``curves`` are contents of
    ``curve.json`` (:class:`moalign.evaluation.curve.Curve`), of one task, in the methods' order of appearance.
    Believed reward is drawn where it is not the truth; snapshots whose KL is not known are left out. A circle marks
    where the truth of a run is best.
    """
    methods = list(dict.fromkeys(curve["method"] for curve in curves))
    columns = min(4, len(methods))
    size = (5.6, 4.2) if len(methods) == 1 else (3.1 * columns + 0.4, 2.9 * -(-len(methods) // columns) + 0.7)
    with style.canvas(*size, theme) as (figure, colours):
        panels = style.panels(figure, len(methods), columns, sharex=True, sharey=True)
        for panel, method in zip(panels, methods, strict=True):
            own = [curve for curve in curves if curve["method"] == method]
            for curve in own:
                _draw(panel, curve, colours.colours, 1.6 if len(own) == 1 else 0.8)
            panel.set_title(style.wrapped(method))
        for panel in panels[-columns:]:  # with none below
            panel.set_xlabel("√KL to base (KL in nats per response)")
            panel.tick_params(labelbottom=True)
        panels[0].set_ylabel("mean w·n over the preferences")
        handles = {
            label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        if handles:
            style.legend(figure, list(handles.values()), list(handles), "", beside=False)
        return style.content(figure, f"{curves[0]['task']}: reward along training{_lost(curves)}", suffix)


def _draw(panel: Axes, curve: Row, colours: Sequence[str], width: float) -> None:
    rows = [row for row in curve["rows"] if row["kl"] is not None]
    x = np.sqrt(np.clip([row["kl"] for row in rows], 0, None))  # an estimate can come out just below 0
    for name, (label, index, dashes) in _LINES.items():
        if not rows or rows[0][name] is None:
            continue
        y = [row[name]["inner_product"] for row in rows]
        marks: dict[str, Any] = {"marker": "o", "markersize": 3.5 if width > 1 else 2}
        panel.plot(x, y, color=colours[index], linestyle=dashes, linewidth=width, label=label, **marks)
    best = curve["best"]["inner_product"]
    if best["kl"] is not None:
        at = (max(best["kl"], 0.0) ** 0.5, best["value"])
        ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "linestyle": "none"}
        panel.plot(*at, **ring, markeredgecolor=colours[0], label="truth at its best")


def _lost(curves: Sequence[Row]) -> str:
    """Return what one run has lost since its best, for the title."""
    if len(curves) > 1:
        return ""
    best = curves[0]["best"]["inner_product"]
    return f"; true at best {number(best['value'])}, at the end {number(best['value'] - best['lost'])}"

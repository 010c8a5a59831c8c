"""Utility by preference: w.n of the answers that the policy gives for preference w, over all preferences w.

Two objectives: one line per method over the first weight. Three: a ternary map per method, all on one scale. A front
shows which trade-offs a method reaches; utility shows whether it reaches the one that was requested.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report import style
from moalign.report.record import Row, judged
from moalign.report.style import Theme, ThemeName
from moalign.report.units import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
"""Corners of the ternary map: the preferences for one objective only."""
_MAP = "cividis"
"""Nuñez et al. 2018: read alike with and without colour-blindness, and monotone in lightness."""


def draw(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Return the figure of a comparison in which some row has points; None beyond three objectives."""
    if len(record["objectives"]) == 2:
        return _lines(record, suffix, theme)
    return _ternary(record, suffix, theme) if len(record["objectives"]) == 3 else None


def utilities(points: Sequence[Row]) -> tuple[Array, Array]:
    """Return preferences ``[k, m]`` in order and the utility w.n ``[k]`` of the policy asked for each."""
    ordered = sorted(points, key=lambda point: tuple(point["prefs"]))
    weights = np.array([point["prefs"] for point in ordered])
    return weights, (weights * np.array([point["mean"] for point in ordered])).sum(axis=1)


def _best(record: Row) -> tuple[Array, Array] | None:
    """Return the optimum's utilities when it is known on the comparison's grid."""
    if not record["optimum"] or len(record["optimum"]["points"]) != len(record["grid"]):
        return None
    pairs = zip(record["grid"], record["optimum"]["points"], strict=True)
    return utilities([{"prefs": prefs, "mean": mean} for prefs, mean in pairs])


def _lines(record: Row, suffix: str, theme: ThemeName) -> bytes:
    rows, best = judged(record), _best(record)
    tall = max(4.2, style.legend_height([row["label"] for row in rows]) + 0.42)
    with style.canvas(7.6, tall, theme) as (figure, colours):
        panel = figure.subplots()
        if best is not None:
            panel.plot(best[0][:, 0], best[1], color=colours.optimum, linewidth=2.2, alpha=0.75, label="optimum")
        for index, row in enumerate(rows):
            weights, gained = utilities(row["points"])
            label = f"{style.wrapped(row['label'])}\n{number(gained.mean())}"
            panel.plot(weights[:, 0], gained, **style.look(index, colours).marks(5, 1.3), label=label)
        first, second = record["objectives"]
        panel.set(xlabel=f"weight of {first} (the rest: {second})", ylabel="utility w·n of the policy asked for w")
        style.legend(figure, *panel.get_legend_handles_labels(), "method, inner product", beside=True)
        return style.content(figure, f"{record['task']}: what each preference gets", suffix)


def _ternary(record: Row, suffix: str, theme: ThemeName) -> bytes:
    best = _best(record)
    maps = [] if best is None else [("optimum", *best)]
    maps += [(row["label"], *utilities(row["points"])) for row in judged(record)]
    every = np.concatenate([gained for *_, gained in maps])
    columns = min(4, len(maps))
    with style.canvas(2.6 * columns + 0.7, 2.75 * math.ceil(len(maps) / columns) + 0.55, theme) as (figure, colours):
        panels = style.panels(figure, len(maps), columns)
        for panel, (name, weights, gained) in zip(panels, maps, strict=True):
            filled = _map(panel, weights, gained, {"cmap": _MAP, "vmin": every.min(), "vmax": every.max()}, colours)
            _name_corners(panel, record["objectives"])
            panel.set_title(f"{style.wrapped(name)}\n{number(gained.mean())}", fontsize=8.5, loc="center")
        bar = figure.colorbar(filled, ax=panels, shrink=0.7, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("utility w·n")
        title = f"{record['task']}: what each preference gets; below the name its mean (inner product)"
        return style.content(figure, title, suffix)


def _map(panel: Axes, weights: Array, gained: Array, scale: dict[str, Any], colours: Theme) -> Any:
    """Draw one map: a field between the preferences where they span one, and a dot at each that was asked for."""
    at = weights @ _CORNERS
    x, y = at.T
    panel.set_aspect("equal")
    panel.set_axis_off()
    if len(at) >= 3 and np.linalg.matrix_rank(at - at.mean(axis=0)) == 2:
        panel.tripcolor(x, y, gained, shading="gouraud", **scale)
    panel.plot(*_CORNERS[[0, 1, 2, 0]].T, color=colours.muted, linewidth=0.8)
    dots: dict[str, Any] = {"edgecolors": colours.paper, "linewidths": 0.7, "clip_on": False, "zorder": 3}
    return panel.scatter(x, y, c=gained, s=26, **dots, **scale)


def _name_corners(panel: Axes, names: Sequence[str]) -> None:
    places = ((-0.08, -0.06, "left", "top"), (0.08, -0.06, "right", "top"), (0.0, 0.05, "center", "bottom"))
    for (x, y), name, (right, up, ha, va) in zip(_CORNERS, names, places, strict=True):
        panel.text(x + right, y + up, name, ha=ha, va=va, fontsize=7.5)
    panel.set(xlim=(-0.12, 1.12), ylim=(-0.2, 1.02))

"""Utility by preference: w.n of the answers that the policy gives for preference w, over all preferences w.

Two objectives: one line per method over the first weight. Three: a ternary map per method, all on one scale. A front
shows which trade-offs a method reaches; utility shows whether it reaches the one that was requested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report import style
from moalign.report.style import Theme, ThemeName
from moalign.report.units import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
"""Corners of the ternary map: the preferences for one objective only."""
_MAP = "cividis"
"""Nuñez et al. 2018: read alike with and without colour-blindness, and monotone in lightness."""


def draw(record: Mapping[str, Any], suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Return the figure as a file's content; None for more than three objectives, which do not fit in a plane.

    Args:
        record: of a comparison (``compare.json``), with at least one row that has points.
        suffix: one of :data:`moalign.report.style.FORMATS`.
        theme: ``light`` or ``dark``.
    """
    rows = [row for row in record["rows"] if row["points"]]
    if len(record["objectives"]) == 2:
        return _lines(record, rows, suffix, theme)
    return _ternary(record, rows, suffix, theme) if len(record["objectives"]) == 3 else None


def utilities(points: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
    """Return preferences ``[k, m]`` in order and the utility w.n ``[k]`` of the policy asked for each."""
    ordered = sorted(points, key=lambda point: point["prefs"])
    weights = np.array([point["prefs"] for point in ordered])
    return weights, (weights * np.array([point["mean"] for point in ordered])).sum(axis=1)


def _best(record: Mapping[str, Any]) -> tuple[Array, Array] | None:
    """Return the optimum's utilities when it is known on the comparison's grid."""
    if not record["optimum"] or len(record["optimum"]["points"]) != len(record["grid"]):
        return None
    pairs = zip(record["grid"], record["optimum"]["points"], strict=True)
    return utilities([{"prefs": prefs, "mean": mean} for prefs, mean in pairs])


# --- two objectives ---------------------------------------------------------------------------------------------


def _lines(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], suffix: str, theme: ThemeName) -> bytes:
    tall = max(4.2, style.legend_height([row["label"] for row in rows]) + 0.42)
    with style.canvas(7.6, tall, theme) as (figure, colours):
        panel = figure.subplots()
        best = _best(record)
        if best is not None:
            panel.plot(best[0][:, 0], best[1], color=colours.optimum, linewidth=2.2, alpha=0.75, label="optimum")
        for index, row in enumerate(rows):
            weights, gained = utilities(row["points"])
            colour, marker = style.look(index, colours)
            panel.plot(
                weights[:, 0],
                gained,
                color=colour,
                marker=marker,
                markersize=5,
                markeredgecolor=colours.paper,
                markeredgewidth=0.6,
                linewidth=1.3,
                label=f"{style.wrapped(row['label'])}\n{number(gained.mean())}",
            )
        first, second = record["objectives"]
        panel.set(xlabel=f"weight of {first} (the rest: {second})", ylabel="utility w·n of the policy asked for w")
        handles, labels = panel.get_legend_handles_labels()
        style.legend(figure, handles, labels, "method, inner product", beside=True)
        style.headline(figure, f"{record['task']}: what each preference gets")
        return style.content(figure, suffix)


# --- three objectives -------------------------------------------------------------------------------------------


def _ternary(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], suffix: str, theme: ThemeName) -> bytes:
    best = _best(record)
    maps = [("optimum", *best)] if best is not None else []
    maps += [(row["label"], *utilities(row["points"])) for row in rows]
    low, high = min(float(g.min()) for *_, g in maps), max(float(g.max()) for *_, g in maps)
    columns = min(4, len(maps))
    lines = math.ceil(len(maps) / columns)
    with style.canvas(2.6 * columns + 0.7, 2.75 * lines + 0.55, theme) as (figure, colours):
        panels = np.atleast_1d(figure.subplots(lines, columns)).ravel().tolist()
        drawn: Any = None
        for panel, (name, weights, gained) in zip(panels, maps, strict=False):
            drawn = _map(panel, weights, gained, (low, high), colours)
            _name_corners(panel, record["objectives"])
            panel.set_title(f"{style.wrapped(name)}\n{number(gained.mean())}", fontsize=8.5)
        for unused in panels[len(maps) :]:
            unused.set_axis_off()
        bar = figure.colorbar(drawn, ax=panels, shrink=0.7, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("utility w·n")
        style.headline(figure, f"{record['task']}: what each preference gets; below the name its mean (inner product)")
        return style.content(figure, suffix)


def _map(panel: Axes, weights: Array, gained: Array, scale: tuple[float, float], colours: Theme) -> Any:
    """Draw one map: a field between the preferences where they span one, and a dot at each that was asked for."""
    at = weights @ _CORNERS
    shared: dict[str, Any] = {"cmap": _MAP, "vmin": scale[0], "vmax": scale[1]}
    panel.set_aspect("equal")
    panel.set_axis_off()
    if len(at) >= 3 and np.linalg.matrix_rank(at - at.mean(axis=0)) == 2:
        panel.tripcolor(at[:, 0], at[:, 1], gained, shading="gouraud", **shared)
    panel.plot(*_CORNERS[[0, 1, 2, 0]].T, color=colours.muted, linewidth=0.8)
    return panel.scatter(
        at[:, 0], at[:, 1], c=gained, s=26, edgecolors=colours.paper, linewidths=0.7, clip_on=False, zorder=3, **shared
    )


def _name_corners(panel: Axes, names: Sequence[str]) -> None:
    for corner, name, (ha, va, down) in zip(
        _CORNERS, names, (("left", "top", -0.06), ("right", "top", -0.06), ("center", "bottom", 0.05)), strict=True
    ):
        outward = -0.08 if ha == "left" else 0.08 if ha == "right" else 0.0
        panel.text(corner[0] + outward, corner[1] + down, name, ha=ha, va=va, fontsize=7.5)
    panel.set(xlim=(-0.12, 1.12), ylim=(-0.2, 1.02))

"""The fronts as a figure: every method's points in preference order with intervals, and the optimum when known."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report import style
from moalign.report.record import Row, judged
from moalign.report.style import DPI, Look, Theme, ThemeName
from moalign.report.units import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]

_LABEL = 8
"""Size of the preferences' labels, in points."""
_ANGLES = [math.radians(degrees) for degrees in (45, 90, 0, 135, -45, 180, -90, -135)]
"""Directions from a point to its label, tried in this order: away from the front first."""


def draw(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Return the figure of a comparison in which some row has points; the same input gives the same bytes.

    Two objectives: one panel. More: one panel per pair of objectives, without connecting lines (a simplex of
    preferences has no single order).
    """
    pairs = list(itertools.combinations(range(len(record["objectives"])), 2))
    single, columns = len(pairs) == 1, min(3, len(pairs))
    tall = max(4.8, style.legend_height([row["label"] for row in record["rows"]]))  # it stands beside a single panel
    size = (7.6 + 0.6 * (tall - 4.8), tall) if single else (3.5 * columns, 3.3 * math.ceil(len(pairs) / columns) + 0.9)
    with style.canvas(*size, theme) as (figure, colours):
        panels = style.panels(figure, len(pairs), columns)
        for panel, pair in zip(panels, pairs, strict=True):
            _panel(panel, record, pair, colours)
        handles, labels = panels[0].get_legend_handles_labels()
        shares = "\n(share of the optimum)" if any("%" in label for label in labels) else ""
        style.legend(figure, handles, labels, f"method, hypervolume{shares}", beside=single)
        title = _title(record)
        if single:
            figure.draw_without_rendering()  # settles the layout: only then is it known where there is room
            _name_preferences(panels[0], record, colours)
        return style.content(figure, title, suffix)


def _title(record: Row) -> str:
    seeds = {len(row["seeds"]) for row in record["rows"]}
    upto = "" if len(seeds) == 1 else "up to "
    over = f" and {upto}{max(seeds)} seeds" if max(seeds) > 1 else ""
    return f"{record['task']}: mean rewards by preference, 95 % intervals over {record['prompts']} prompts{over}"


def _panel(panel: Axes, record: Row, pair: tuple[int, int], colours: Theme) -> None:
    joined = len(record["objectives"]) == 2
    if record["optimum"]:
        best = np.array(record["optimum"]["points"])[:, pair]
        name = f"optimum\n{number(record['optimum']['hypervolume'])}"
        if joined:
            best = best[np.argsort(best[:, 0], kind="stable")]
            panel.plot(best[:, 0], best[:, 1], color=colours.optimum, linewidth=2.2, alpha=0.75, zorder=1, label=name)
        else:
            panel.scatter(best[:, 0], best[:, 1], s=9, color=colours.optimum, alpha=0.6, zorder=1, label=name)
    for index, row in enumerate(judged(record)):
        _front(panel, row, pair, joined, style.look(index, colours))
    panel.margins(0.08)
    names = [f"{record['objectives'][axis]} (normalised)" for axis in pair]
    panel.set(xlabel=names[0], ylabel=names[1])
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    x, y = (record["ref"][axis] for axis in pair)
    line: dict[str, Any] = {"color": colours.muted, "linewidth": 0.8, "linestyle": style.REFERENCE_LINE, "zorder": 0.5}
    if left < x < right:
        panel.axvline(x, **line)
    if bottom < y < top:
        panel.axhline(y, **line)
    panel.set(xlim=(left, right), ylim=(bottom, top))


def _front(panel: Axes, row: Row, pair: tuple[int, int], joined: bool, look: Look) -> None:
    """Draw one method: points in preference order, intervals as thin bars."""
    points = _ordered(row)
    means, bounds = (np.array([point[key] for point in points])[:, pair] for key in ("mean", "ci"))
    # Resampling can leave the mean just outside a percentile interval of few prompts; a bar has no negative length.
    lengths = np.clip([means - bounds[..., 0], bounds[..., 1] - means], 0, None)
    bars: dict[str, Any] = {"ecolor": look.colour, "elinewidth": 0.7, "alpha": 0.4, "zorder": 2, "fmt": "none"}
    panel.errorbar(means[:, 0], means[:, 1], xerr=lengths[..., 0], yerr=lengths[..., 1], **bars)
    share = "" if row["optimal_share"] is None else f" ({percent(row['optimal_share'])})"
    label = f"{style.wrapped(row['label'])}\n{number(row['hypervolume'])}{share}"
    marks = look.marks(5.2, 1.3) if joined else look.marks(4.2, 0)
    panel.plot(means[:, 0], means[:, 1], **marks, zorder=3, label=label)


def _ordered(row: Row) -> list[Row]:
    return sorted(row["points"], key=lambda point: tuple(point["prefs"]))


# --- preferences' names -----------------------------------------------------------------------------------------


def _name_preferences(panel: Axes, record: Row, colours: Theme) -> None:
    """Write the preference at the first, middle and last point of the best method, where there is most room."""
    rows = [np.array([point["mean"] for point in _ordered(row)]) for row in judged(record)]
    lines = [*rows, np.array(record["optimum"]["points"])] if record["optimum"] else rows
    taken = np.concatenate([_along(panel.transData.transform(line)) for line in lines])
    prefs = [point["prefs"] for point in _ordered(judged(record)[0])]
    room = panel.get_window_extent().get_points()
    for index in sorted({0, len(prefs) // 2, len(prefs) - 1}):
        text = f"w = {', '.join(f'{weight:.2g}' for weight in prefs[index])}"
        at = panel.transData.transform(rows[0][index])
        boxes = [_box(at, text, angle) for angle in _ANGLES]
        offset, box = min(boxes, key=lambda option: (_leaves(option[1], room), _inside(taken, option[1])))
        taken = np.concatenate([taken, _along(box)])
        panel.annotate(
            text,
            rows[0][index],
            xytext=(offset[0], offset[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL,
            color=colours.colours[0],
            zorder=6,
        )


def _along(line: Array) -> Array:
    """Return points along the whole line ``[k, 2]``, so that a box that it crosses holds some of them."""
    steps = np.linspace(0, 1, 60)[:, None, None]
    return np.concatenate([line, (line[:-1] * (1 - steps) + line[1:] * steps).reshape(-1, 2)])


def _box(at: Array, text: str, angle: float) -> tuple[Array, Array]:
    """Return a label's offset from its point (in points) and its box ``[[x0, y0], [x1, y1]]`` (in pixels)."""
    half = np.array([0.27 * _LABEL * len(text), 0.7 * _LABEL])
    offset = np.array([math.cos(angle), math.sin(angle)]) * (half + 5.0)
    centre = at + offset * DPI / 72
    return offset, np.stack([centre - half * DPI / 72, centre + half * DPI / 72])


def _leaves(box: Array, room: Array) -> bool:
    return bool((box[0] < room[0]).any() or (box[1] > room[1]).any())


def _inside(taken: Array, box: Array) -> int:
    return int(((taken > box[0]) & (taken < box[1])).all(axis=1).sum())

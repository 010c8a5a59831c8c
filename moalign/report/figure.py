"""The fronts as a figure: every method's points in preference order with intervals, and the optimum when known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report import style
from moalign.report.style import DPI, FORMATS, Theme, ThemeName
from moalign.report.units import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "draw"]

_LABEL = 8
"""Size of the preferences' labels, in points."""
_ANGLES = [math.radians(degrees) for degrees in (45, 90, 0, 135, -45, 180, -90, -135)]
"""Directions from a point to its label, tried in this order: away from the front first."""


def draw(record: Mapping[str, Any], suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Return the figure of a comparison as a file's content; the same input gives the same bytes.

    Two objectives: one panel. More: one panel per pair of objectives, without connecting lines (a simplex of
    preferences has no single order).

    Args:
        record: of a comparison (``compare.json``), with at least one row that has points.
        suffix: one of :data:`FORMATS`.
        theme: ``light`` or ``dark``.
    """
    pairs = list(itertools.combinations(range(len(record["objectives"])), 2))
    columns = min(3, len(pairs))
    lines = math.ceil(len(pairs) / columns)
    tall = max(4.8, style.legend_height([row["label"] for row in record["rows"]]))  # it stands beside a single panel
    size = (7.6 + 0.6 * (tall - 4.8), tall) if len(pairs) == 1 else (3.5 * columns, 3.3 * lines + 0.9)
    with style.canvas(*size, theme) as (figure, colours):
        panels = list(np.atleast_1d(figure.subplots(lines, columns)).flat)
        for panel, pair in zip(panels, pairs, strict=False):
            _panel(panel, record, pair, colours)
        for unused in panels[len(pairs) :]:
            unused.set_visible(False)
        _legend(figure, panels[0], beside=len(pairs) == 1)
        style.headline(figure, _title(record))
        if len(pairs) == 1:
            figure.draw_without_rendering()  # settles the layout: only then is it known where there is room
            _name_preferences(panels[0], record, colours)
        return style.content(figure, suffix)


def _title(record: Mapping[str, Any]) -> str:
    seeds = {len(row["seeds"]) for row in record["rows"]}
    upto = "" if len(seeds) == 1 else "up to "
    over = f" and {upto}{max(seeds)} seeds" if max(seeds) > 1 else ""
    return f"{record['task']}: mean rewards by preference, 95 % intervals over {record['prompts']} prompts{over}"


def _panel(panel: Axes, record: Mapping[str, Any], pair: tuple[int, int], colours: Theme) -> None:
    rows = [row for row in record["rows"] if row["points"]]
    joined = len(record["objectives"]) == 2
    if record["optimum"]:
        _optimum(panel, record, pair, joined, colours.optimum)
    for index, row in enumerate(rows):
        _front(panel, row, pair, joined, style.look(index, colours))
    panel.margins(0.08)
    panel.set_xlabel(f"{record['objectives'][pair[0]]} (normalised)")
    panel.set_ylabel(f"{record['objectives'][pair[1]]} (normalised)")
    _reference(panel, record, pair, colours)


def _optimum(panel: Axes, record: Mapping[str, Any], pair: tuple[int, int], joined: bool, colour: str) -> None:
    best = np.array(record["optimum"]["points"])[:, pair]
    name = f"optimum\n{number(record['optimum']['hypervolume'])}"
    if joined:
        best = best[np.argsort(best[:, 0], kind="stable")]
        panel.plot(best[:, 0], best[:, 1], color=colour, linewidth=2.2, alpha=0.75, zorder=1, label=name)
    else:
        panel.scatter(best[:, 0], best[:, 1], s=9, color=colour, alpha=0.6, zorder=1, label=name)


def _front(panel: Axes, row: Mapping[str, Any], pair: tuple[int, int], joined: bool, look: tuple[str, str]) -> None:
    """Draw one method: points in preference order, intervals as thin bars."""
    points, bounds = _arrays(row)
    means, low, high = points[:, pair], bounds[:, pair, 0], bounds[:, pair, 1]
    colour, marker = look
    # Resampling can leave the mean just outside a percentile interval of few prompts; a bar has no negative length.
    below, above = np.clip(means - low, 0, None), np.clip(high - means, 0, None)
    panel.errorbar(
        means[:, 0],
        means[:, 1],
        xerr=np.stack([below[:, 0], above[:, 0]]),
        yerr=np.stack([below[:, 1], above[:, 1]]),
        fmt="none",
        ecolor=colour,
        elinewidth=0.7,
        alpha=0.4,
        zorder=2,
    )
    share = "" if row["optimal_share"] is None else f" ({percent(row['optimal_share'])})"
    label = f"{style.wrapped(row['label'])}\n{number(row['hypervolume'])}{share}"
    panel.plot(
        means[:, 0],
        means[:, 1],
        color=colour,
        marker=marker,
        markersize=5.2 if joined else 4.2,
        markeredgecolor=panel.get_facecolor(),
        markeredgewidth=0.6,
        linewidth=1.3 if joined else 0,
        zorder=3,
        label=label,
    )


def _arrays(row: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means ``[k, m]`` and intervals ``[k, m, 2]`` in the order of preferences."""
    points = sorted(row["points"], key=lambda point: point["prefs"])
    return np.array([p["mean"] for p in points]), np.array([p["ci"] for p in points])


def _reference(panel: Axes, record: Mapping[str, Any], pair: tuple[int, int], colours: Theme) -> None:
    """Mark the reference point's axes where they run through the panel."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    x, y = (record["ref"][axis] for axis in pair)
    if left < x < right:
        panel.axvline(x, color=colours.muted, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    if bottom < y < top:
        panel.axhline(y, color=colours.muted, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    panel.set_xlim(left, right)
    panel.set_ylim(bottom, top)


def _name_preferences(panel: Axes, record: Mapping[str, Any], colours: Theme) -> None:
    """Write the preference at the first, middle and last point of the best method, where there is most room."""
    rows = [_arrays(row)[0] for row in record["rows"] if row["points"]]
    lines = [*rows, np.array(record["optimum"]["points"])] if record["optimum"] else rows
    taken = np.concatenate([_along(panel.transData.transform(line)) for line in lines])
    prefs = sorted(next(row for row in record["rows"] if row["points"])["points"], key=lambda point: point["prefs"])
    room = panel.get_window_extent().get_points()
    for index in sorted({0, len(prefs) // 2, len(prefs) - 1}):
        text = f"w = {', '.join(f'{weight:.2g}' for weight in prefs[index]['prefs'])}"
        at = panel.transData.transform(rows[0][index])
        boxes = [_box(at, text, angle) for angle in _ANGLES]
        offset, box = min(boxes, key=lambda option: (_leaves(option[1], room), _inside(taken, option[1])))
        taken = np.concatenate([taken, _along(np.array([box[0], box[1]]))])
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


def _along(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points along the whole line ``[k, 2]``, so that a box that it crosses holds some of them."""
    steps = np.linspace(0, 1, 60)[:, None, None]
    return np.concatenate([line, (line[:-1] * (1 - steps) + line[1:] * steps).reshape(-1, 2)])


def _box(at: NDArray[np.float64], text: str, angle: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a label's offset from its point (in points) and its box ``[[x0, y0], [x1, y1]]`` (in pixels)."""
    half = np.array([0.27 * _LABEL * len(text), 0.7 * _LABEL])
    away = np.array([math.cos(angle), math.sin(angle)])
    offset = away * (half + 5.0)
    centre = at + offset * DPI / 72
    return offset, np.stack([centre - half * DPI / 72, centre + half * DPI / 72])


def _leaves(box: NDArray[np.float64], room: NDArray[np.float64]) -> bool:
    return bool((box[0] < room[0]).any() or (box[1] > room[1]).any())


def _inside(taken: NDArray[np.float64], box: NDArray[np.float64]) -> int:
    return int(((taken > box[0]) & (taken < box[1])).all(axis=1).sum())


def _legend(figure: Figure, panel: Axes, beside: bool) -> None:
    handles, labels = panel.get_legend_handles_labels()
    shares = any("%" in label for label in labels)
    title = "method, hypervolume" + ("\n(share of the optimum)" if shares else "")
    style.legend(figure, handles, labels, title, beside)

"""The fronts as a figure: every method's points in preference order with intervals, and the optimum when known."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report.units import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
DPI = 150

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; yellow is too pale for thin lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
OPTIMUM = "#8A8A8A"

_LABEL = 8
"""Size of the preferences' labels, in points."""
_ANGLES = [math.radians(degrees) for degrees in (45, 90, 0, 135, -45, 180, -90, -135)]
"""Where a label may stand, seen from its point; outside the front first."""

_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "moalign"},
    ".pdf": {"Creator": "moalign", "Producer": None, "CreationDate": None},
    ".svg": {"Creator": "moalign", "Date": None},
}
"""Fixed, so that the same comparison gives the same bytes."""


def draw(told: Mapping[str, Any], suffix: str = ".png") -> bytes:
    """Return the figure of a comparison as a file's content; the same input gives the same bytes.

    Two objectives: one panel. More: one panel per pair of objectives, without connecting lines (a simplex of
    preferences has no single order).

    Args:
        told: what ``compare`` told; at least one row with points.
        suffix: one of :data:`FORMATS`.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = list(itertools.combinations(range(len(told["objectives"])), 2))
    columns = min(3, len(pairs))
    lines = math.ceil(len(pairs) / columns)
    size = (7.6, 4.8) if len(pairs) == 1 else (3.5 * columns, 3.3 * lines + 0.9)
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        panels = list(np.atleast_1d(figure.subplots(lines, columns)).flat)
        for panel, pair in zip(panels, pairs, strict=False):
            _panel(panel, told, pair)
        for unused in panels[len(pairs) :]:
            unused.set_visible(False)
        _legend(figure, panels[0], beside=len(pairs) == 1)
        figure.suptitle(_title(told), x=0.01, ha="left", fontsize=10)
        if len(pairs) == 1:
            figure.draw_without_rendering()  # settles the layout: only then is it known where there is room
            _name_preferences(panels[0], told)
        content = io.BytesIO()
        figure.savefig(content, format=suffix.removeprefix("."), dpi=DPI, metadata=_METADATA[suffix])
    return content.getvalue()


def _style() -> Any:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E6E6E6",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.hashsalt": "moalign",
    }


def _title(told: Mapping[str, Any]) -> str:
    seeds = max(len(row["seeds"]) for row in told["rows"])
    over = f" and {seeds} seeds" if seeds > 1 else ""
    return f"{told['task']}: mean rewards by preference, 95 % intervals over {told['prompts']} prompts{over}"


def _panel(panel: Axes, told: Mapping[str, Any], pair: tuple[int, int]) -> None:
    rows = [row for row in told["rows"] if row["points"]]
    joined = len(told["objectives"]) == 2
    if told["optimum"]:
        _optimum(panel, told, pair, joined)
    for index, row in enumerate(rows):
        _front(panel, row, index, pair, joined)
    panel.margins(0.08)
    panel.set_xlabel(f"{told['objectives'][pair[0]]} (normalised)")
    panel.set_ylabel(f"{told['objectives'][pair[1]]} (normalised)")
    _reference(panel, told, pair)


def _optimum(panel: Axes, told: Mapping[str, Any], pair: tuple[int, int], joined: bool) -> None:
    best = np.array(told["optimum"]["points"])[:, pair]
    name = f"optimum\n{number(told['optimum']['hypervolume'])}"
    if joined:
        best = best[np.argsort(best[:, 0], kind="stable")]
        panel.plot(best[:, 0], best[:, 1], color=OPTIMUM, linewidth=2.2, alpha=0.75, zorder=1, label=name)
    else:
        panel.scatter(best[:, 0], best[:, 1], s=9, color=OPTIMUM, alpha=0.6, zorder=1, label=name)


def _front(panel: Axes, row: Mapping[str, Any], index: int, pair: tuple[int, int], joined: bool) -> None:
    """Draw one method: points in preference order, intervals as thin bars."""
    points, bounds = _arrays(row)
    means, low, high = points[:, pair], bounds[:, pair, 0], bounds[:, pair, 1]
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
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
    share = row["optimal_share"]
    label = f"{_wrapped(row['label'])}\n{number(row['hypervolume'])}{'' if share is None else f' ({percent(share)})'}"
    panel.plot(
        means[:, 0],
        means[:, 1],
        color=colour,
        marker=marker,
        markersize=5.2 if joined else 4.2,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.3 if joined else 0,
        zorder=3 + 0.01 * index,
        label=label,
    )


def _wrapped(label: str) -> str:
    return "\n".join(textwrap.wrap(label, 24))


def _arrays(row: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means ``[k, m]`` and intervals ``[k, m, 2]`` in the order of preferences."""
    points = sorted(row["points"], key=lambda point: point["prefs"])
    return np.array([p["mean"] for p in points]), np.array([p["ci"] for p in points])


def _reference(panel: Axes, told: Mapping[str, Any], pair: tuple[int, int]) -> None:
    """Mark the reference point's axes where they run through the panel."""
    (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
    x, y = (told["ref"][axis] for axis in pair)
    if left < x < right:
        panel.axvline(x, color="#9A9A9A", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    if bottom < y < top:
        panel.axhline(y, color="#9A9A9A", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0.5)
    panel.set_xlim(left, right)
    panel.set_ylim(bottom, top)


def _name_preferences(panel: Axes, told: Mapping[str, Any]) -> None:
    """Write the preference at the first, middle and last point of the best method, where there is most room."""
    rows = [_arrays(row)[0] for row in told["rows"] if row["points"]]
    lines = [*rows, np.array(told["optimum"]["points"])] if told["optimum"] else rows
    taken = np.concatenate([_along(panel.transData.transform(line)) for line in lines])
    prefs = sorted(next(row for row in told["rows"] if row["points"])["points"], key=lambda point: point["prefs"])
    for place in sorted({0, len(prefs) // 2, len(prefs) - 1}):
        text = f"w = {', '.join(f'{weight:.2g}' for weight in prefs[place]['prefs'])}"
        at = panel.transData.transform(rows[0][place])
        offset, box = min((_box(at, text, angle) for angle in _ANGLES), key=lambda found: _inside(taken, found[1]))
        taken = np.concatenate([taken, _along(np.array([box[0], box[1]]))])
        panel.annotate(
            text,
            rows[0][place],
            xytext=(offset[0], offset[1]),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_LABEL,
            color=COLOURS[0],
            zorder=6,
        )


def _along(line: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return points all along a line ``[k, 2]``, so that what crosses a box is seen in it."""
    steps = np.linspace(0, 1, 60)[:, None, None]
    return np.concatenate([line, (line[:-1] * (1 - steps) + line[1:] * steps).reshape(-1, 2)])


def _box(at: NDArray[np.float64], text: str, angle: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a label's offset from its point (in points) and its box ``[[x0, y0], [x1, y1]]`` (in pixels)."""
    half = np.array([0.27 * _LABEL * len(text), 0.7 * _LABEL])
    away = np.array([math.cos(angle), math.sin(angle)])
    offset = away * (half + 5.0)
    centre = at + offset * DPI / 72
    return offset, np.stack([centre - half * DPI / 72, centre + half * DPI / 72])


def _inside(taken: NDArray[np.float64], box: NDArray[np.float64]) -> int:
    return int(((taken > box[0]) & (taken < box[1])).all(axis=1).sum())


def _legend(figure: Figure, panel: Axes, beside: bool) -> None:
    """Put the legend outside the data: beside one panel, below several."""
    handles, labels = panel.get_legend_handles_labels()
    shares = any("%" in label for label in labels)
    title = "method, hypervolume" + ("\n(share of the optimum)" if shares else "")
    common: dict[str, Any] = {"alignment": "left", "fontsize": 8.5, "title_fontsize": 8.5, "labelspacing": 0.8}
    if beside:
        figure.legend(handles, labels, loc="outside right center", title=title, **common)
    else:
        columns = min(4, len(labels))
        figure.legend(handles, labels, loc="outside lower center", title=title, ncols=columns, **common)

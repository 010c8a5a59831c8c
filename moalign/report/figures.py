"""The figures of a comparison: fronts, believed and true rewards, utility by preference and by KL, cost, curves.

Each is drawn as ``draw(record, suffix, theme)`` from a record in which some row has points, and returned as a file's
content; the same input gives the same bytes. ``suffix`` is one of :data:`moalign.report.style.FORMATS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.report import kl, style
from moalign.report.believed import draw_believed
from moalign.report.record import Row, judged, machines
from moalign.report.style import DPI, Look, Theme, ThemeName
from moalign.report.units import duration, number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]


# --- fronts -----------------------------------------------------------------------------------------------------------


CROWD = 8
"""Methods beyond which their lines in one panel are no longer told apart."""
IN_PANEL = 7
"""Methods of a family in one of its small panels, at most."""
_LABEL = 8
"""Size of the preferences' labels, in points."""
_ANGLES = [math.radians(degrees) for degrees in (45, 90, 0, 135, -45, 180, -90, -135)]
"""Directions from a point to its label, tried in this order: away from the front first."""


def draw_fronts(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Draw every method's points in preference order with their intervals, and the optimum when known.

    Two objectives: one panel; of more than :data:`CROWD` methods one with the best of each family, and a small one for
    each family. More objectives: one panel per pair of them, without connecting lines (a simplex of preferences has no
    single order); of more than :data:`CROWD` methods with the best of each family alone.
    """
    rows = judged(record)
    families = list(dict.fromkeys(row["family"] for row in rows if "family" in row))
    crowd = len(rows) > CROWD and len(families) > 1
    if crowd and len(record["objectives"]) == 2:
        return _family_panels(record, families, suffix, theme)
    chosen = (
        [next(i for i, row in enumerate(rows) if row.get("family") == name) for name in families] if crowd else None
    )
    pairs = list(itertools.combinations(range(len(record["objectives"])), 2))
    single, columns = len(pairs) == 1, min(3, len(pairs))
    tall = max(4.8, style.legend_height([row["label"] for row in record["rows"]]))  # it stands beside a single panel
    below = 0.9 + 0.45 * max(0, math.ceil((len(chosen or rows) + 1) / 4) - 3)  # a legend of more than three lines
    lines = math.ceil(len(pairs) / columns)
    size = (7.6 + 0.6 * (tall - 4.8), tall) if single else (3.5 * columns, 3.3 * lines + below)
    with style.canvas(*size, theme) as (figure, colours):
        panels = style.panels(figure, len(pairs), columns)
        for panel, pair in zip(panels, pairs, strict=True):
            _front_panel(panel, record, pair, colours, chosen)
        handles, labels = panels[0].get_legend_handles_labels()
        shares = "\n(share of the optimum)" if any("%" in label for label in labels) else ""
        whose = "method" if chosen is None else "the best method of each family"
        style.legend(figure, handles, labels, f"{whose}, hypervolume{shares}", beside=single)
        title = _fronts_title(record)
        if single:
            figure.draw_without_rendering()  # settles the layout: only then is it known where there is room
            _name_preferences(panels[0], record, colours)
        return style.content(figure, title, suffix)


def _family_panels(record: Row, families: Sequence[str], suffix: str, theme: ThemeName) -> bytes:
    """Draw the best method of each family in one panel, and below it the methods of each in panels of their own."""
    rows, columns = judged(record), 3
    members = {family: [i for i, row in enumerate(rows) if row["family"] == family] for family in families}
    best = [of_family[0] for of_family in members.values()]
    parts = [  # of a large family several: the names of more would hide the lines
        (family if first == 0 else f"{family}, behind those", of_family[first : first + IN_PANEL])
        for family, of_family in members.items()
        for first in range(0, len(of_family), IN_PANEL)
    ]
    lines = math.ceil(len(parts) / columns)
    ideal = record["optimum"]["points"] if record["optimum"] else []
    points = [point["mean"] for row in rows for point in row["points"]] + ideal
    with style.canvas(10.5, 5.2 + 3.1 * lines, theme) as (figure, colours):
        grid = figure.add_gridspec(1 + lines, columns, height_ratios=[5.2, *[3.1] * lines])
        large = figure.add_subplot(grid[0, :])
        _front_panel(large, record, (0, 1), colours, best)
        large.set_title("the best of each family")
        _within(large, [point["mean"] for index in best for point in rows[index]["points"]] + ideal)
        _inner_legend(large, 9)
        for place, (title, shown) in enumerate(parts):
            panel = figure.add_subplot(grid[1 + place // columns, place % columns])
            _front_panel(panel, record, (0, 1), colours, shown)
            panel.set_title(title)
            _within(panel, points)
            _inner_legend(panel, 7)
        figure.draw_without_rendering()  # settles the layout: only then is it known where there is room
        _name_preferences(large, record, colours)
        return style.content(figure, _fronts_title(record), suffix)


def _within(panel: Axes, points: Sequence[Sequence[float]]) -> None:
    """Show all of the means, and of long intervals what lies there: a few noisy points would shrink all others."""
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    room = 0.06 * (high - low)
    panel.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - 2 * room[1], high[1] + room[1]))


def _inner_legend(panel: Axes, size: float) -> None:
    handles, labels = panel.get_legend_handles_labels()
    flat = [label.replace("\n", "  ") for label in labels]
    panel.legend(handles, flat, loc="best", fontsize=size, frameon=True, framealpha=0.8, edgecolor="none")


def _fronts_title(record: Row) -> str:
    seeds = {len(row["seeds"]) for row in record["rows"]}
    upto = "" if len(seeds) == 1 else "up to "
    over = f" and {upto}{max(seeds)} seeds" if max(seeds) > 1 else ""
    return f"{record['task']}: mean rewards by preference, 95 % intervals over {record['prompts']} prompts{over}"


def _front_panel(
    panel: Axes, record: Row, pair: tuple[int, int], colours: Theme, chosen: Sequence[int] | None = None
) -> None:
    """Draw methods by two objectives: those whose numbers in the ranking, from 0, are ``chosen``; None: all."""
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
        if chosen is None or index in chosen:
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
    points = _ordered(row["points"])
    means, bounds = (np.array([point[key] for point in points])[:, pair] for key in ("mean", "ci"))
    # Resampling can leave the mean just outside a percentile interval of few prompts; a bar has no negative length.
    lengths = np.clip([means - bounds[..., 0], bounds[..., 1] - means], 0, None)
    bars: dict[str, Any] = {"ecolor": look.colour, "elinewidth": 0.7, "alpha": 0.4, "zorder": 2, "fmt": "none"}
    panel.errorbar(means[:, 0], means[:, 1], xerr=lengths[..., 0], yerr=lengths[..., 1], **bars)
    share = "" if row["optimal_share"] is None else f" ({percent(row['optimal_share'])})"
    label = f"{style.wrapped(row['label'])}\n{number(row['hypervolume'])}{share}"
    marks = look.marks(5.2, 1.3) if joined else look.marks(4.2, 0)
    panel.plot(means[:, 0], means[:, 1], **marks, zorder=3, label=label)


def _ordered(points: Iterable[Row]) -> list[Row]:
    """Return points in the order of their preferences."""
    return sorted(points, key=lambda point: tuple(point["prefs"]))


# --- preferences' names -----------------------------------------------------------------------------------------


def _name_preferences(panel: Axes, record: Row, colours: Theme) -> None:
    """Write the preference at the first, middle and last point of the best method, where there is most room."""
    rows = [np.array([point["mean"] for point in _ordered(row["points"])]) for row in judged(record)]
    lines = [*rows, np.array(record["optimum"]["points"])] if record["optimum"] else rows
    taken = np.concatenate([_along(panel.transData.transform(line)) for line in lines])
    prefs = [point["prefs"] for point in _ordered(judged(record)[0]["points"])]
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


# --- utility ----------------------------------------------------------------------------------------------------------


_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
"""Corners of the ternary map: the preferences for one objective only."""
_MAP = "cividis"
"""Nuñez et al. 2018: read alike with and without colour-blindness, and monotone in lightness."""


def draw_utility(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Draw utility by preference: w.n of the answers that the policy gives for preference w, over all w.

    Two objectives: one line per method over the first weight. Three: a ternary map per method, all on one scale. More:
    None. A front shows which trade-offs a method reaches; utility shows whether it reaches the one that was requested.
    """
    if len(record["objectives"]) == 2:
        return _utility_lines(record, suffix, theme)
    return _ternary(record, suffix, theme) if len(record["objectives"]) == 3 else None


def utilities(points: Sequence[Row]) -> tuple[Array, Array]:
    """Return preferences ``[k, m]`` in order and the utility w.n ``[k]`` of the policy asked for each."""
    ordered = _ordered(points)
    weights = np.array([point["prefs"] for point in ordered])
    return weights, (weights * np.array([point["mean"] for point in ordered])).sum(axis=1)


def _optimal_utilities(record: Row) -> tuple[Array, Array] | None:
    """Return the optimum's utilities when it is known on the comparison's grid."""
    if not record["optimum"] or len(record["optimum"]["points"]) != len(record["grid"]):
        return None
    pairs = zip(record["grid"], record["optimum"]["points"], strict=True)
    return utilities([{"prefs": prefs, "mean": mean} for prefs, mean in pairs])


def _utility_lines(record: Row, suffix: str, theme: ThemeName) -> bytes:
    rows, best = judged(record), _optimal_utilities(record)
    tall = max(4.2, style.legend_height([row["label"] for row in rows]) + 0.42)
    beside = tall <= 7.6  # of more methods a legend beside the panel would make it higher than wide
    size = (7.6, tall) if beside else (9.0, 5.2 + 0.42 * math.ceil((len(rows) + 1) / 4))
    with style.canvas(*size, theme) as (figure, colours):
        panel = figure.subplots()
        if best is not None:
            panel.plot(best[0][:, 0], best[1], color=colours.optimum, linewidth=2.2, alpha=0.75, label="optimum")
        for index, row in enumerate(rows):
            weights, gained = utilities(row["points"])
            label = f"{style.wrapped(row['label'])}\n{number(gained.mean())}"
            panel.plot(weights[:, 0], gained, **style.look(index, colours).marks(5, 1.3), label=label)
        first, second = record["objectives"]
        panel.set(xlabel=f"weight of {first} (the rest: {second})", ylabel="utility w·n of the policy asked for w")
        style.legend(figure, *panel.get_legend_handles_labels(), "method, inner product", beside=beside)
        return style.content(figure, f"{record['task']}: what each preference gets", suffix)


def _ternary(record: Row, suffix: str, theme: ThemeName) -> bytes:
    best = _optimal_utilities(record)
    maps = [] if best is None else [("optimum", *best)]
    maps += [(row["label"], *utilities(row["points"])) for row in judged(record)]
    every = np.concatenate([gained for *_, gained in maps])
    scale = {"cmap": _MAP, "vmin": every.min(), "vmax": every.max()}
    columns = min(4, len(maps))
    with style.canvas(2.6 * columns + 0.7, 2.75 * math.ceil(len(maps) / columns) + 0.55, theme) as (figure, colours):
        panels = style.panels(figure, len(maps), columns)
        for panel, (name, weights, gained) in zip(panels, maps, strict=True):
            filled = _ternary_map(panel, weights, gained, scale, colours)
            _name_corners(panel, record["objectives"])
            panel.set_title(f"{style.wrapped(name)}\n{number(gained.mean())}", fontsize=8.5, loc="center")
        bar = figure.colorbar(filled, ax=panels, shrink=0.7, aspect=30)
        bar.outline.set_visible(False)
        bar.set_label("utility w·n")
        title = f"{record['task']}: what each preference gets; below the name its mean (inner product)"
        return style.content(figure, title, suffix)


def _ternary_map(panel: Axes, weights: Array, gained: Array, scale: dict[str, Any], colours: Theme) -> Any:
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


# --- cost -------------------------------------------------------------------------------------------------------------


COST_UNITS = {
    "tokens_generated": "tokens generated in training",
    "tokens_trained": "tokens trained on",
    "reward_calls": "reward calls in training",
    "seconds": "time of training",
}
_CLOCK = {0: "0", 0.1: "0.1 s", 1: "1 s", 10: "10 s", 60: "1 min", 600: "10 min", 3600: "1 h", 36_000: "10 h"}
"""Seconds that read well on an axis."""


def draw_cost(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Draw hypervolume against the cost of training: a panel per unit, with zero at its left edge."""
    with style.canvas(7.6, 6.0, theme) as (figure, colours):
        panels = style.panels(figure, len(COST_UNITS), 2, sharey=True)
        for panel, (unit, name) in zip(panels, COST_UNITS.items(), strict=True):
            _cost_panel(panel, judged(record), unit, colours)
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


def _cost_panel(panel: Axes, rows: Sequence[Row], unit: str, colours: Theme) -> None:
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
        ticks = _cost_ticks(least, max([*spent, least]), _CLOCK)
        panel.set_xticks(ticks, [_CLOCK.get(tick) or duration(tick) for tick in ticks])
    else:
        ticks = _cost_ticks(least, max([*spent, least]), (10.0**power for power in range(16)))
        panel.set_xticks(ticks, [EngFormatter()(float(f"{tick:.3g}")) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())


def _cost_ticks(least: float, most: float, steps: Iterable[float]) -> list[float]:
    """Return 0 and at most four of the steps, or the largest value where none lies between."""
    inner = [step for step in steps if least / 2 <= step <= 2 * most]
    return [0.0, *(inner[:: 1 + (len(inner) - 1) // 4] if inner else [most])]


# --- learning curves --------------------------------------------------------------------------------------------------


QUANTITIES = {
    "utility": "mean utility w·z of training rollouts",
    "kl": "KL to the reference, nats per response",
    "loss": "loss (comparable within a method only)",
}
"""Quantities drawn: name in ``metrics.jsonl`` -> title of the panel."""
_POINTS = 40
"""Points of a curve: more would make records larger and not be seen."""


def condense(metrics: Sequence[Row]) -> dict[str, list[list[float]]]:
    """Return at most 40 pairs (tokens, value) for each quantity in a run's ``metrics.jsonl``.

    Neighbouring lines are averaged, values that are not finite left out, and the means rounded to five significant
    digits.
    """
    curves: dict[str, list[list[float]]] = {}
    for name in QUANTITIES:
        pairs = [
            (float(line.get("tokens_generated", 0) + line.get("tokens_trained", 0)), float(line[name]))
            for line in metrics
            if isinstance(line.get(name), int | float)
        ]
        if len(pairs) > 1:
            parts = np.array_split(np.array(pairs), min(_POINTS, len(pairs)))
            curves[name] = [[float(f"{value:.5g}") for value in part.mean(axis=0)] for part in parts]
    return curves


def of_seeds(curves: Sequence[Sequence[Sequence[float]]]) -> NDArray[np.float64]:
    """Return one curve of several seeds', ``[points, 4]``: tokens and value (means), lowest and highest value.

    Points are met at equal shares of a training: seeds spend different numbers of tokens on it.
    """
    count = min(len(curve) for curve in curves)
    parts = [np.array(curve, dtype=float) for curve in curves]
    shares = np.linspace(0, 1, count)
    met = np.array(
        [[np.interp(shares, np.linspace(0, 1, len(part)), column) for column in part.T] for part in parts]
    )  # [seeds, 2, points]
    tokens, values = met[:, 0], met[:, 1]
    return np.stack([tokens.mean(0), values.mean(0), values.min(0), values.max(0)], axis=-1)


def draw_curves(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Draw what each method logged during training, means of its seeds with the lowest and the highest shaded.

    None when no run logged any of :data:`QUANTITIES`.

    The axis is the sum of tokens generated and tokens trained on, which all methods have in common; the phases of a run
    follow each other on it. Methods log different quantities: each that at least one method logs has a panel.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = judged(record)
    logged = [name for name in QUANTITIES if any(name in seed for row in rows for seed in row["curves"])]
    if not logged:
        return None
    with style.canvas(3.7 * len(logged) + 0.4, 4.0, theme) as (figure, colours):
        handles: dict[str, Any] = {}
        for panel, name in zip(style.panels(figure, len(logged), len(logged)), logged, strict=True):
            for index, row in enumerate(rows):
                seeds = [seed[name] for seed in row["curves"] if name in seed]
                if not seeds:
                    continue
                look = style.look(index, colours)
                tokens, mean, lowest, highest = of_seeds(seeds).T
                (line,) = panel.plot(tokens, mean, **look.marks(5, 1.2), markevery=6)
                panel.fill_between(tokens, lowest, highest, color=look.colour, alpha=0.12, linewidth=0)
                handles.setdefault(style.wrapped(row["label"]), line)
            panel.set(xlabel="tokens generated and trained on", title=style.wrapped(QUANTITIES[name], 44))
            panel.xaxis.set_major_formatter(EngFormatter())
            panel.xaxis.set_major_locator(MaxNLocator(5))
        style.legend(figure, list(handles.values()), list(handles), "", beside=False)
        title = f"{record['task']}: learning curves, mean of the seeds (shaded: all seeds)"
        return style.content(figure, title, suffix)


ALL: dict[str, Callable[..., bytes | None]] = {
    "fronts": draw_fronts,
    "believed": draw_believed,
    "utility": draw_utility,
    "kl": kl.draw,
    "cost": draw_cost,
    "curves": draw_curves,
}
"""File name -> how it is drawn; None where there is nothing to show."""

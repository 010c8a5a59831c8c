"""Learning curves: what each method logged during training, against the tokens processed so far.

The axis is the sum of tokens generated and tokens trained on, which all methods have in common; the phases of a run
follow each other on it. Methods log different quantities: each quantity that at least one method logs has a panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moalign.report import style
from moalign.report.style import ThemeName
from moalign.report.units import count

QUANTITIES = {
    "utility": "mean utility w·z of training rollouts",
    "kl": "KL to the reference, nats per response",
    "loss": "loss (comparable within a method only)",
}
"""Quantities drawn: name in ``metrics.jsonl`` -> title of the panel."""
_POINTS = 40
"""Points of a curve: more would make records larger and not be seen."""


def condense(metrics: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
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


def draw(record: Mapping[str, Any], suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Return the figure as a file's content; None when no run logged any of :data:`QUANTITIES`.

    Args:
        record: of a comparison (``compare.json``); ``curves`` of a row holds one :func:`condense` per seed.
        suffix: one of :data:`moalign.report.style.FORMATS`.
        theme: ``light`` or ``dark``.
    """
    rows = [row for row in record["rows"] if row["points"]]
    logged = [name for name in QUANTITIES if any(name in seed for row in rows for seed in row.get("curves") or [])]
    if not logged:
        return None
    with style.canvas(3.7 * len(logged) + 0.4, 4.0, theme) as (figure, colours):
        panels = np.atleast_1d(figure.subplots(1, len(logged))).tolist()
        handles: dict[str, Any] = {}
        for panel, name in zip(panels, logged, strict=True):
            for index, row in enumerate(rows):
                colour, marker = style.look(index, colours)
                for seed in row.get("curves") or []:
                    if name in seed:
                        x, y = np.array(seed[name]).T
                        (line,) = panel.plot(
                            x, y, color=colour, linewidth=1.2, marker=marker, markersize=4, markevery=6
                        )
                        handles.setdefault(row["label"], line)
            panel.set(xlabel="tokens generated and trained on")
            panel.set_title(style.wrapped(QUANTITIES[name], 44), loc="left")
            panel.xaxis.set_major_formatter(lambda value, _: count(value))
            panel.xaxis.set_major_locator(_locator())
        style.legend(figure, list(handles.values()), [style.wrapped(name) for name in handles], "", beside=False)
        style.headline(figure, f"{record['task']}: learning curves, one line per seed")
        return style.content(figure, suffix)


def _locator() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)

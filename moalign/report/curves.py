"""Learning curves: what each method logged during training, against the tokens processed so far.

The axis is the sum of tokens generated and tokens trained on, which all methods have in common; the phases of a run
follow each other on it. Methods log different quantities: each quantity that at least one method logs has a panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moalign.report import style
from moalign.report.record import Row, judged
from moalign.report.style import ThemeName

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


def draw(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Return the figure; None when no run logged any of :data:`QUANTITIES`."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    rows = judged(record)
    logged = [name for name in QUANTITIES if any(name in seed for row in rows for seed in row["curves"])]
    if not logged:
        return None
    with style.canvas(3.7 * len(logged) + 0.4, 4.0, theme) as (figure, colours):
        handles: dict[str, Any] = {}
        for panel, name in zip(style.panels(figure, len(logged), len(logged)), logged, strict=True):
            for index, row in enumerate(rows):
                marks = style.look(index, colours).marks(5, 1.2)
                for seed in row["curves"]:
                    if name in seed:
                        (line,) = panel.plot(*np.array(seed[name]).T, **marks, markevery=6)
                        handles.setdefault(style.wrapped(row["label"]), line)
            panel.set(xlabel="tokens generated and trained on", title=style.wrapped(QUANTITIES[name], 44))
            panel.xaxis.set_major_formatter(EngFormatter())
            panel.xaxis.set_major_locator(MaxNLocator(5))
        style.legend(figure, list(handles.values()), list(handles), "", beside=False)
        return style.content(figure, f"{record['task']}: learning curves, one line per seed", suffix)

"""The reliability diagram of a reward model: observed accuracy against stated confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moalign.core.errors import RequestError
from moalign.report import style


def reliability_figure(
    bins: Sequence[Mapping[str, Any]], title: str, path: Path | str, theme: style.ThemeName = "light"
) -> None:
    """Write the diagram to ``path`` (PNG, PDF or SVG by its suffix), atomically.

    Args:
        bins: from low to high confidence; each ``confidence`` (mean stated probability), ``accuracy`` (mean outcome)
            and ``count``. A bin without entries has ``count`` 0 and may hold None.
        title: shown at the top.
        path: file to write.
        theme: ``light`` or ``dark``.

    Raises RequestError for no entries at all, a probability outside [0, 1], or a suffix that is no figure's.
    """
    from moalign.runs import atomic

    target = Path(path)
    if target.suffix not in style.FORMATS:
        raise RequestError(f"{target}: allowed: a name ending in {', '.join(style.FORMATS)}")
    atomic.write_bytes(target, draw(bins, title, target.suffix, theme))


def draw(
    bins: Sequence[Mapping[str, Any]], title: str, suffix: str = ".png", theme: style.ThemeName = "light"
) -> bytes:
    """Return the diagram as a file's content; see :func:`reliability_figure`."""
    filled = [entry for entry in bins if entry["count"]]
    for entry in filled:
        for name in ("confidence", "accuracy"):
            if entry[name] is None or not 0 <= entry[name] <= 1:
                raise RequestError(f"reliability diagram: {name} is {entry[name]}; allowed: 0 to 1")
    if not filled:
        raise RequestError("reliability diagram: every bin is empty; at least one entry is needed")
    stated = np.array([entry["confidence"] for entry in filled])
    observed = np.array([entry["accuracy"] for entry in filled])
    counts = np.array([entry["count"] for entry in filled], dtype=np.float64)
    error = float((counts * np.abs(observed - stated)).sum() / counts.sum())
    with style.canvas(4.6, 5.2, theme) as (figure, colours):
        panel, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        panel.plot([0, 1], [0, 1], color=colours.muted, linewidth=1.0, linestyle=(0, (4, 3)), label="perfect")
        panel.vlines(stated, stated, observed, color=colours.colours[1], linewidth=2.2, alpha=0.7, label="gap")
        panel.plot(
            stated, observed, color=colours.colours[0], marker="o", markersize=5.5, linewidth=1.4, label="observed"
        )
        panel.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency")
        panel.legend(loc="upper left", title=f"calibration error {error:.3f}", alignment="left", title_fontsize=9)
        below.bar(stated, counts / counts.sum(), width=0.6 / max(10, len(bins)), color=colours.colours[0])
        below.set(xlabel="stated probability", ylabel="share")
        style.headline(figure, style.wrapped(title, 62))
        return style.content(figure, suffix)

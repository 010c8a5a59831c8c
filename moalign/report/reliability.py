"""The reliability diagram of a reward model: how often it is right when it says how sure it is."""

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
    """Write the diagram to ``path`` (PNG, PDF or SVG by its suffix; whole, or not at all).

    Args:
        bins: from low to high confidence; each ``confidence`` (mean stated probability), ``accuracy`` (mean outcome)
            and ``count``. A bin without entries has ``count`` 0 and may hold None.
        title: what the figure says at its top.
        path: where the figure goes.
        theme: ``light`` or ``dark``.

    Raises RequestError for no entries at all, a probability outside [0, 1], or a suffix that is no figure's.
    """
    from moalign.runs import atomic

    place = Path(path)
    if place.suffix not in style.FORMATS:
        raise RequestError(f"{place}: allowed: a name ending in {', '.join(style.FORMATS)}")
    atomic.write_bytes(place, draw(bins, title, place.suffix, theme))


def draw(
    bins: Sequence[Mapping[str, Any]], title: str, suffix: str = ".png", theme: style.ThemeName = "light"
) -> bytes:
    """Return the diagram as a file's content; see :func:`reliability_figure`."""
    filled = [one for one in bins if one["count"]]
    for one in filled:
        for name in ("confidence", "accuracy"):
            if one[name] is None or not 0 <= one[name] <= 1:
                raise RequestError(f"reliability diagram: {name} is {one[name]}; allowed: 0 to 1")
    if not filled:
        raise RequestError("reliability diagram: every bin is empty; at least one entry is needed")
    said = np.array([one["confidence"] for one in filled])
    was = np.array([one["accuracy"] for one in filled])
    counts = np.array([one["count"] for one in filled], dtype=np.float64)
    error = float((counts * np.abs(was - said)).sum() / counts.sum())
    with style.canvas(4.6, 5.2, theme) as (figure, colours):
        panel, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        panel.plot([0, 1], [0, 1], color=colours.muted, linewidth=1.0, linestyle=(0, (4, 3)), label="perfect")
        panel.vlines(said, said, was, color=colours.colours[1], linewidth=2.2, alpha=0.7, label="gap")
        panel.plot(said, was, color=colours.colours[0], marker="o", markersize=5.5, linewidth=1.4, label="observed")
        panel.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency")
        panel.legend(loc="upper left", title=f"calibration error {error:.3f}", alignment="left", title_fontsize=9)
        below.bar(said, counts / counts.sum(), width=0.6 / max(10, len(bins)), color=colours.colours[0])
        below.set(xlabel="stated probability", ylabel="share")
        style.headline(figure, style.wrapped(title, 62))
        return style.content(figure, suffix)

"""The reliability diagram of a reward model: observed accuracy against stated confidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moalign.core.errors import RequestError
from moalign.report import style
from moalign.report.record import Row
from moalign.report.style import ThemeName
from moalign.runs import atomic


def reliability_figure(bins: Sequence[Row], title: str, path: Path | str, theme: ThemeName = "light") -> None:
    """Write the diagram to ``path`` (PNG, PDF or SVG by its suffix), atomically.

    ``bins`` stand from low to high confidence, each with ``confidence`` (mean stated probability), ``accuracy`` (mean
    outcome) and ``count``; a bin without entries has ``count`` 0 and may hold None.

    Raises RequestError for no entries at all, a probability outside [0, 1], or a suffix that is no figure's.
    """
    target = Path(path)
    if target.suffix not in style.FORMATS:
        raise RequestError(f"{target}: allowed: a name ending in {', '.join(style.FORMATS)}")
    atomic.write_bytes(target, draw(bins, title, target.suffix, theme))


def draw(bins: Sequence[Row], title: str, suffix: str = ".png", theme: ThemeName = "light") -> bytes:
    """Return the diagram as a file's content; see :func:`reliability_figure`."""
    filled = [entry for entry in bins if entry["count"]]
    for entry in filled:
        for name in ("confidence", "accuracy"):
            if entry[name] is None or not 0 <= entry[name] <= 1:
                raise RequestError(f"reliability diagram: {name} is {entry[name]}; allowed: 0 to 1")
    if not filled:
        raise RequestError("reliability diagram: every bin is empty; at least one entry is needed")
    stated, observed, counts = (
        np.array([entry[name] for entry in filled], dtype=np.float64) for name in ("confidence", "accuracy", "count")
    )
    error = float((counts * np.abs(observed - stated)).sum() / counts.sum())
    with style.canvas(4.6, 5.2, theme) as (figure, colours):
        panel, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        own, other, *_ = colours.colours
        panel.plot([0, 1], [0, 1], color=colours.muted, linewidth=1.0, linestyle=style.REFERENCE_LINE, label="perfect")
        panel.vlines(stated, stated, observed, color=other, linewidth=2.2, alpha=0.7, label="gap")
        panel.plot(stated, observed, **style.look(0, colours).marks(5.5, 1.4), label="observed")
        panel.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency")
        panel.legend(loc="upper left", title=f"calibration error {error:.3f}", alignment="left", title_fontsize=9)
        below.bar(stated, counts / counts.sum(), width=0.6 / max(10, len(bins)), color=own)
        below.set(xlabel="stated probability", ylabel="share")
        return style.content(figure, style.wrapped(title, 62), suffix)

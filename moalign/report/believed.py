"""The figure of believed and true rewards: what was gained by the rewards that were trained on, and by the judge's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.report import style
from moalign.report.kl import ticks_up_to
from moalign.report.record import Row, judged
from moalign.report.style import Theme, ThemeName

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUANTITIES = {"hypervolume": "hypervolume", "inner_product": "inner product"}


def values(row: Row, quantity: str) -> tuple[float, float]:
    """Return a row's believed and true number."""
    true = row["hypervolume"] if quantity == "hypervolume" else row["indicators"][quantity]
    return row["believed"][quantity], true


def draw_believed(record: Row, suffix: str = ".png", theme: ThemeName = "light") -> bytes | None:
    """Draw believed against true reward, and both over KL to base; None where no row's training rewards differ.

    The axis of KL is its square root, in which over-optimisation is regular (Gao, Schulman and Hilton 2022, arXiv
    2210.10760).
    """
    every = judged(record)
    rows = [(index, row) for index, row in enumerate(every) if row.get("believed")]
    if not rows:
        return None
    with style.canvas(7.6, 7.0, theme) as (figure, colours):
        panels = style.panels(figure, 2 * len(QUANTITIES), 2)
        for (quantity, name), beside, over in zip(QUANTITIES.items(), panels[::2], panels[1::2], strict=True):
            _against(beside, rows, quantity, colours)
            beside.set(xlabel=f"believed {name}", ylabel=f"true {name}")
            _over_kl(over, rows, quantity, colours)
            over.set(xlabel="KL to base, nats per response (square-root axis)", ylabel=name)
        panels[0].set_title("believed against true (line: equal)")
        panels[1].set_title("hollow: believed; full: true")
        style.legend(figure, *panels[0].get_legend_handles_labels(), "", beside=False)
        return style.content(figure, f"{record['task']}: rewards that were trained on, and true ones", suffix)


def _against(panel: Axes, rows: Sequence[tuple[int, Row]], quantity: str, colours: Theme) -> None:
    for index, row in rows:
        believed, true = values(row, quantity)
        panel.plot(believed, true, **style.look(index, colours).marks(7, 0), label=style.wrapped(row["label"]))
    panel.margins(0.1)
    panel.axline((0, 0), slope=1, color=colours.muted, linewidth=0.8, linestyle=style.REFERENCE_LINE, zorder=0.5)


def _over_kl(panel: Axes, rows: Sequence[tuple[int, Row]], quantity: str, colours: Theme) -> None:
    for index, row in rows:
        nats = row["quality"]["kl"]
        if nats is None:
            continue
        look, pair = style.look(index, colours), values(row, quantity)
        at = max(0.0, nats)  # an estimate can come out slightly below 0
        panel.plot([at, at], pair, color=look.colour, linewidth=1.0, alpha=0.6, zorder=2)
        for value, face in zip(pair, (colours.paper, look.colour), strict=True):
            marks = {**look.marks(7, 0), "markerfacecolor": face, "markeredgecolor": look.colour}
            panel.plot(at, value, **marks, zorder=3, clip_on=False)
    panel.set_xscale("function", functions=(lambda x: np.sqrt(np.clip(x, 0, None)), np.square))
    most = max((row["quality"]["kl"] or 0.0 for _, row in rows), default=0.0)
    end = 1.1 * max(1.0, most)
    ticks = ticks_up_to(end)
    panel.set_xlim(0, end)
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)

"""How every figure looks: colours that colour-blind readers can tell apart, markers beside them, light and dark.

Figures are made with matplotlib's object interface and a style of their own, so that the user's settings neither
matter nor change, and the same input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
DPI = 150

ThemeName = Literal["light", "dark"]


@dataclass(frozen=True)
class Theme:
    """Colours of one figure."""

    paper: str
    ink: str
    muted: str
    """Axes, and lines that are not data."""
    grid: str
    optimum: str
    colours: tuple[str, ...]


# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; yellow is too pale for thin lines on white.
# On dark paper the same hues, lightened until each stands out, and white instead of black.
THEMES: dict[str, Theme] = {
    "light": Theme(
        paper="#FFFFFF",
        ink="#1A1A1A",
        muted="#757575",
        grid="#E6E6E6",
        optimum="#8A8A8A",
        colours=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    ),
    "dark": Theme(
        paper="#16191D",
        ink="#E8E8E8",
        muted="#9AA0A6",
        grid="#2C3137",
        optimum="#9A9A9A",
        colours=("#4C9FE0", "#F0803C", "#2FBF94", "#E39CC4", "#F2C14E", "#9ADCFF", "#FFFFFF"),
    ),
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "moalign"},
    ".pdf": {"Creator": "moalign", "Producer": None, "CreationDate": None},
    ".svg": {"Creator": "moalign", "Date": None},
}
"""Fixed, so that the same comparison gives the same bytes."""

_ENTRY, _LINE, _GAP = 0.42, 0.142, 0.095
"""Inches: the least height of a legend entry, the height of a line of its text, the gap between two entries."""


def look(index: int, theme: Theme) -> tuple[str, str]:
    """Return (colour, marker) of the method at ``index``; they repeat after 63."""
    return theme.colours[index % len(theme.colours)], MARKERS[index % len(MARKERS)]


@contextlib.contextmanager
def canvas(width: float, height: float, theme: ThemeName) -> Iterator[tuple[Figure, Theme]]:
    """Yield an empty figure of ``width`` x ``height`` inches and its theme; draw and save it inside the block."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chosen = THEMES[theme]
    with matplotlib.rc_context(_settings(chosen)):
        figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, chosen


def content(figure: Figure, suffix: str) -> bytes:
    """Return the figure as a file's content; ``suffix`` is one of :data:`FORMATS`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=DPI, metadata=_METADATA[suffix])
    return buffer.getvalue()


def wrapped(label: str, width: int = 24) -> str:
    """Return a label broken into lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(label, width))


def legend_height(labels: Sequence[str]) -> float:
    """Return the height in inches of a figure whose legend, beside its panel, holds these labels and the optimum."""
    lines = sum(2 + wrapped(label).count("\n") for label in [*labels, "optimum", "title"])
    return max(_ENTRY * len(labels) + 0.9, _LINE * lines + _GAP * len(labels) + 0.31)


def headline(figure: Figure, text: str) -> None:
    """Write the figure's title at its top left."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=10)


def legend(figure: Figure, handles: Any, labels: Any, title: str, beside: bool) -> None:
    """Put the legend outside the data: beside one panel, below several."""
    common: dict[str, Any] = {"alignment": "left", "fontsize": 8.5, "title_fontsize": 8.5, "labelspacing": 0.8}
    if beside:
        figure.legend(handles, labels, loc="outside right center", title=title, **common)
    else:
        # Labels of three and more lines are as wide as labels can be: three fit beside each other.
        columns = 4 if max(label.count("\n") for label in labels) < 2 else 3
        common["ncols"] = min(columns, len(labels))
        figure.legend(handles, labels, loc="outside lower center", title=title, **common)


def _settings(theme: Theme) -> Any:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib, so it is the same everywhere
        "font.size": 9,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "svg.hashsalt": "moalign",
    }

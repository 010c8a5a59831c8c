"""How every figure looks: colours that colour-blind readers can tell apart, markers and dashes beside them.

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
    from matplotlib.axes import Axes
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
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ((), (5, 1.5), (1.2, 1.2), (6, 1.5, 1.2, 1.5))
"""Lines of the first seven methods, of the next seven, and so on: (), then lengths of dash and gap in line widths."""
REFERENCE_LINE = (0, (4, 3))
"""Dashes of lines that are not data."""

_METADATA: dict[str, dict[str, Any]] = {
    ".png": {"Software": "moalign"},
    ".pdf": {"Creator": "moalign", "Producer": None, "CreationDate": None},
    ".svg": {"Creator": "moalign", "Date": None},
}
"""Fixed, so that the same comparison gives the same bytes."""

_ENTRY, _LINE, _GAP = 0.42, 0.142, 0.095
"""Inches: the least height of a legend entry, the height of a line of its text, the gap between two entries."""


@dataclass(frozen=True)
class Look:
    """What tells a method from the others: no two of 28 share both colour and dashes."""

    colour: str
    marker: str
    dashes: tuple[float, ...]
    hollow: bool
    paper: str

    def marks(self, size: float, line: float) -> dict[str, Any]:
        """Return the arguments of ``Axes.plot`` and ``errorbar``: markers of ``size``, a line ``line`` wide or none."""
        style: Any = (0, self.dashes) if self.dashes else "solid"
        return {
            "color": self.colour,
            **({"linestyle": style, "linewidth": line} if line else {"linestyle": "none"}),
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": self.paper if self.hollow else self.colour,
            "markeredgecolor": self.colour if self.hollow else self.paper,
            "markeredgewidth": 1.2 if self.hollow else 0.6,
        }


def look(index: int, theme: Theme) -> Look:
    """Return the look of the method at ``index``; looks repeat after 63."""
    turn, hue = divmod(index, len(theme.colours))
    dashes = _DASHES[turn % len(_DASHES)]
    return Look(theme.colours[hue], _MARKERS[index % len(_MARKERS)], dashes, turn % 2 == 1, theme.paper)


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


def panels(figure: Figure, count: int, columns: int, **shared: Any) -> list[Axes]:
    """Return ``count`` panels in rows of ``columns``."""
    lines = -(-count // columns)
    every: list[Axes] = figure.subplots(lines, columns, squeeze=False, **shared).ravel().tolist()
    for unused in every[count:]:
        unused.set_visible(False)
    return every[:count]


def content(figure: Figure, title: str, suffix: str) -> bytes:
    """Return the figure with a title, if any, as the content of a file; ``suffix`` is one of :data:`FORMATS`."""
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
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


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str, beside: bool) -> None:
    """Put the legend outside the data: beside one panel, below several."""
    options: dict[str, Any] = {"loc": "outside right center"}
    if not beside:
        # Labels of three and more lines are as wide as labels can be: three fit beside each other.
        columns = 4 if max(label.count("\n") for label in labels) < 2 else 3
        options = {"loc": "outside lower center", "ncols": min(columns, len(labels))}
    figure.legend(
        handles,
        labels,
        title=title,
        alignment="left",
        fontsize=8.5,
        title_fontsize=8.5,
        labelspacing=0.8,
        handlelength=2.6,
        **options,
    )


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
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.scale_dashes": True,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "svg.hashsalt": "moalign",
    }

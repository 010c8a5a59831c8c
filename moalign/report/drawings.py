"""The figures of a comparison, by file name."""

from __future__ import annotations

from collections.abc import Callable

from moalign.report import cost, curves, fronts, utility

ALL: dict[str, Callable[..., bytes | None]] = {
    "fronts": fronts.draw,
    "utility": utility.draw,
    "cost": cost.draw,
    "curves": curves.draw,
}
"""File name -> ``draw(record, suffix, theme)``, which returns None where there is nothing to show."""

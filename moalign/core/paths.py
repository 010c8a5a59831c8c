"""Paths that belong to no run: the checkout, the user's cache, and how messages show a path."""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds the package; a git checkout when moalign was not installed from a wheel."""


def cache_root() -> Path:
    """Return the folder of cached bases: $MOALIGN_CACHE, else the user's cache folder."""
    folder = os.environ.get("MOALIGN_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moalign"


def shown(path: Path | str) -> str:
    """Return ``path`` as messages show it: relative when it lies in the current directory."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)

"""Paths that belong to no run: the checkout, the user's cache, and how messages show a path."""

from __future__ import annotations

import os
from pathlib import Path

from moalign.core.errors import RequestError

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder that holds the package; a git checkout when moalign was not installed from a wheel."""


CACHE_REMEDY = "free or unlock it, or name another folder with MOALIGN_CACHE=DIR"
"""What to do where :func:`cache_root` cannot be written."""


def cache_root() -> Path:
    """Return moalign's cache of bases, converted models and hashes: $MOALIGN_CACHE, else in the user's cache folder.

    Raises RequestError where the user has no home.
    """
    folder = os.environ.get("MOALIGN_CACHE")
    if folder:
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moalign"
    except RuntimeError:  # no HOME, and the system does not know the user
        raise RequestError(
            "there is no home folder to keep bases and models in (HOME is not set); name a folder with "
            "MOALIGN_CACHE=DIR"
        ) from None


def shown(path: Path | str) -> str:
    """Return ``path`` as messages show it: relative when it lies in the current directory."""
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)

"""How long work reports itself."""

from __future__ import annotations

from collections.abc import Callable

Say = Callable[[str, int, int], None]
"""``say(what, done, total)``."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""

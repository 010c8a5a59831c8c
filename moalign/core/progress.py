"""Progress reports of long-running work."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""A progress callback: ``progress(what, done, total)``."""


def silent(what: str, done: int, total: int) -> None:
    """Ignore a progress report."""


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Return a ``progress`` that puts ``prefix: `` before every message."""
    return lambda what, done, total: progress(f"{prefix}: {what}", done, total)


def counted(progress: Progress, what: str, total: int) -> Callable[[int], None]:
    """Return ``advance(count)``, which reports that so many more of ``total`` are done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(what, min(done, total), total)

    return advance

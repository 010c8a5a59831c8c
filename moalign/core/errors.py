"""The two ways in which moalign stops, and how it names a near miss.

``RequestError``: the request was wrong (usage, recipe, data, preference); exit code 2.
``WorkError``: the request was fine but the work failed; exit code 1.

Both carry one finished message: where (file and line, or option), what was found, what is
allowed, the nearest valid name. The command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class MoalignError(Exception):
    """Base of every error that moalign raises on purpose; ``str(error)`` is the whole message."""

    exit_code = 1


class WorkError(MoalignError):
    """The request was right, the work failed (exit code 1)."""


class RequestError(MoalignError):
    """The request was wrong (exit code 2).

    ``problems`` holds every single problem, so that all of them are shown at once.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Put ``where: `` (empty: nothing) before every problem of a RequestError that the block raises."""
    try:
        yield
    except RequestError as error:
        raise RequestError(*(f"{where}: {text}" if where else text for text in error.problems)) from error.__cause__


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that looks most like ``name``, or None when none is near."""
    names = sorted(set(allowed))
    folded = {candidate.casefold(): candidate for candidate in names}
    matches = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.55)
    return folded[matches[0]] if matches else None


def did_you_mean(name: str, allowed: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?`` or an empty string."""
    near = nearest(name, allowed)
    return f"; did you mean {near!r}?" if near else ""


def unknown(kind: str, name: str, allowed: Sequence[str], where: str = "") -> RequestError:
    """Build the error for a name that does not exist.

    >>> str(unknown("method", "rick", ["ric", "moc"]))
    "unknown method 'rick'; allowed: moc, ric; did you mean 'ric'?"
    """
    prefix = f"{where}: " if where else ""
    listed = ", ".join(sorted(allowed)) or "none"
    return RequestError(f"{prefix}unknown {kind} {name!r}; allowed: {listed}{did_you_mean(name, allowed)}")

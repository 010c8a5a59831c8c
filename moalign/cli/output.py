"""Where output goes: results to stdout, messages to stderr, ``--json`` as one object.

Rich is imported when the first table is printed.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.report.units import count, duration, interval, memory, nats, number, percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["count", "duration", "interval", "memory", "nats", "number", "percent"]  # numbers, as every verb shows them

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe, where nothing tells the width."""
DEFAULT_RESULTS = Path("results")

debug = False
"""``--debug`` was given; set by :func:`moalign.cli.main.main`."""
listener: Callable[[str, int, int], None] | None = None
"""Who is told of progress instead of stderr; set by :mod:`moalign.cli.jobs`."""


def overlong(counts: dict[str, int]) -> str:
    """Return how many prompts were cut or dropped, in one line."""
    if "dropped" in counts:
        return f"{counts['dropped']} of {counts['prompts']} dropped: longer than generation.max_prompt_tokens"
    share = f"{counts['cut']} of {counts['prompts']} cut"
    return f"{share} to generation.max_prompt_tokens, {counts['cut_tokens']:,} tokens in all"


def note(text: str) -> None:
    """Write one message to stderr."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Write one warning to stderr."""
    note(f"warning: {text}")


def errors(problems: Sequence[str]) -> None:
    """Write every problem to stderr on a line of its own."""
    for problem in problems:
        note(f"error: {problem}")


def line(text: str = "") -> None:
    """Write one line of results to stdout."""
    print(text)


def as_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout; NaN and infinity become null."""
    import json

    from moalign.runs import atomic

    # Escaped beyond ASCII: a pipe in a C locale takes it, and every reader gives the same text back.
    print(json.dumps(atomic.plain(value), indent=2, allow_nan=False))


@contextlib.contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr while the block works; whatever a library prints meanwhile goes there too.

    Yields a ``progress(what, done, total)`` as methods and evaluation expect it.
    """
    from moalign.cli.progress import ProgressDisplay

    with contextlib.redirect_stdout(sys.stderr), ProgressDisplay(sys.stderr) as progress:
        yield progress if listener is None else listener


def console() -> Console:
    """Return the console of stdout; text is printed as it is (no markup, no colours of its own)."""
    from rich.console import Console

    return Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else PIPED_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for name in columns:
        result.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return result


def show(table: Table) -> None:
    """Print a table to stdout, followed by an empty line."""
    console().print(table)
    line()


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print ``name  value`` lines with aligned values."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        line(f"{name:<{width}}  {value}".rstrip())


def command(*words: str, results: Path = DEFAULT_RESULTS) -> str:
    """Return a ``moalign`` command line to paste, with ``--results`` where it is not the default."""
    more = [] if results == DEFAULT_RESULTS else ["--results", str(results)]
    return shlex.join(["moalign", *words, *more])


def next_commands(*commands: str) -> None:
    """Print the commands that come next."""
    line("next:")
    for text in commands:
        line(f"  {text}")

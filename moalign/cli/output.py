"""Where output goes: results to stdout, messages to stderr, ``--json`` as one object.

Whatever text is shown passes :func:`moalign.core.text.visible` here; JSON escapes by itself.
Rich is imported when the first table is printed.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from moalign.cli.options import DEFAULT_RESULTS
from moalign.core import foreign, processes
from moalign.core.text import PROSE, visible
from moalign.core.text import command as typed
from moalign.report.tables import Column

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 200
"""Columns of a table that goes into a file or a pipe, where nothing tells the width."""

LONGEST = 2000
"""Characters of a message that a person still reads."""

debug = False
"""``--debug`` was given; set by :func:`moalign.cli.main.main`."""
silent = False
"""Another process of the same training says what there is to say; set by :func:`by_one_process`."""
listener: Callable[[str, int, int], None] | None = None
"""Who is told of progress instead of stderr; set by :mod:`moalign.cli.jobs`."""


def note(text: str, keep: str = "") -> None:
    """Write one message to stderr, on one line unless ``keep`` is :data:`~moalign.core.text.PROSE`."""
    if silent:
        return
    print(visible(text, keep), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Write one warning to stderr."""
    note(f"warning: {text}")


def discard(stream: TextIO) -> None:
    """Point a stream nowhere: the interpreter flushes it once more at the end, and would complain."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return  # it is not a file: there is nothing to flush into
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def errors(problems: Sequence[str]) -> None:
    """Write every problem to stderr on a line of its own; of one that quotes a long text the middle is left out."""
    for problem in problems:
        if (over := len(problem) - LONGEST) > 0:
            problem = f"{problem[: LONGEST - 300]} [... {over} characters left out ...] {problem[-300:]}"
        note(f"error: {problem}")


def traces(texts: Iterable[str]) -> None:
    """Write tracebacks of runs that failed to stderr, under ``--debug``."""
    for text in texts if debug else ():
        note(text, PROSE)


def line(text: str = "", keep: str = "") -> None:
    """Write one line of results to stdout, or several where ``keep`` is :data:`~moalign.core.text.PROSE`."""
    print(visible(text, keep))


def as_json(value: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout; NaN and infinity become null."""
    import json

    from moalign.runs import atomic

    # Escaped beyond ASCII: a pipe in a C locale takes it, and every reader gives the same text back.
    print(json.dumps(atomic.plain(value), indent=2, allow_nan=False))


@contextlib.contextmanager
def by_one_process() -> Iterator[None]:
    """Of the processes that a launcher has started, let only the first print; of an error, the first that has one."""
    global silent
    silent, (rank, count) = False, processes.launched()
    if count == 1:
        yield
        return
    with contextlib.ExitStack() as redirected:
        if rank:
            nowhere = redirected.enter_context(open(os.devnull, "w", encoding="utf-8"))
            redirected.enter_context(contextlib.redirect_stdout(nowhere))
            redirected.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except BaseException as error:
            silent = not processes.first_to_end(error)
            raise


@contextlib.contextmanager
def working() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on stderr while the block works; whatever a library prints meanwhile goes there too.

    Yields a ``progress(what, done, total)`` as methods and evaluation expect it.
    """
    from moalign.cli.progress import progress_display

    with foreign.stdout_to_stderr, progress_display(sys.stderr) as progress:
        yield progress if listener is None else listener


def console() -> Console:
    """Return the console of stdout; markup in a text is text. Control characters are its callers' to escape."""
    from rich.console import Console

    class Quiet(Console):
        """rich ends the program where a pipe is closed; here main does, without a word."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Quiet(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else PIPED_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def columns(*headings: str, left: bool = False) -> list[Column]:
    """Return columns whose cells rows hold as text, by the heading; ``left``: aligned to the left."""
    return [Column(heading, operator.itemgetter(heading), left=left) for heading in headings]


def table(shown: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print a table to stdout, followed by an empty line."""
    from rich import box
    from rich.table import Table

    out, rows = console(), list(rows)
    shown = _fitting(shown, rows, out.width)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in shown:
        justify: Literal["left", "right"] = "left" if column.left else "right"
        result.add_column(visible(column.heading, PROSE), justify=justify, overflow="fold", no_wrap=column.whole)
    for row in rows:
        result.add_row(*(visible(column.text(row)) for column in shown))
    out.print(result)
    line()


def _fitting(shown: Sequence[Column], rows: Sequence[Mapping[str, Any]], width: int) -> list[Column]:
    """Return the columns without optional ones, from the last on, as long as they are too wide together."""
    from rich.cells import cell_len

    fitting = list(shown)
    widths = {id(column): max(map(cell_len, [column.heading, *map(column.text, rows)])) for column in shown}
    for column in reversed([column for column in shown if column.optional]):
        if sum(widths[id(each)] + 2 for each in fitting) - 2 > width:
            fitting.remove(column)
    return fitting


def settings(values: Iterable[tuple[str, Any]]) -> None:
    """Print a table of settings: dotted names, and values as YAML has them."""
    from moalign.config.describe import yaml_form

    table(
        columns("setting", "value", left=True), [{"setting": key, "value": yaml_form(value)} for key, value in values]
    )


def sections(values: Mapping[str, Any], *names: str) -> Iterator[tuple[str, Any]]:
    """Return (dotted name, value) of the settings in the sections ``names``, as far as there are any."""
    return flat({name: values[name] for name in names if values.get(name, {}) != {}})


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested settings, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print ``name  value`` lines with aligned values."""
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        line(f"{name:<{width}}  {value}".rstrip())


def command(*words: str, results: Path = DEFAULT_RESULTS) -> str:
    """Return a ``moalign`` command line to paste, with ``--results`` where it is not the default."""
    more = [] if results == DEFAULT_RESULTS else ["--results", str(results)]
    return typed(*words, *more)


def next_commands(*commands: str) -> None:
    """Print the commands that come next."""
    line("next:")
    for text in commands:
        line(f"  {text}")

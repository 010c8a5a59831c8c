"""``python -m moalign.cli.jobs``: runs one command after another, so that they share the imports, which take seconds.

Read from stdin: a line of JSON per command, its list of arguments. Written to stdout, as lines of JSON: now and then
the command's progress, [what, done, total], and at its end its exit code. Everything else that a command prints goes
to stderr, or nowhere. Ends when stdin does, and after a command that failed or was interrupted: what it left behind in
the process is not known. When the process that asks is gone, the command is terminated: nobody would read its answer,
and it would hold its run against whoever asks next.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from moalign.cli import output
from moalign.cli.main import main
from moalign.core.memory import release
from moalign.runs.meter import fresh_peak

EVERY = 0.5
"""Least seconds between two lines of progress; the end of a stage is always told."""


def serve() -> int:
    """Run commands until there are no more; returns the last one's exit code."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # also for what libraries write past Python's streams
        os.close(nowhere)
        output.listener = listener(answers)
        code = 0
        while code == 0 and (line := _next()):
            fresh_peak()
            code = main(json.loads(line))
            sys.stderr.flush()
            release()
            answers.write(f"{code}\n")
            answers.flush()
        return code


def listener(answers: TextIO, clock: Callable[[], float] = time.monotonic) -> Callable[[str, int, int], None]:
    """Return a ``progress(what, done, total)`` that writes to ``answers``."""
    last = clock() - EVERY

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if done >= total or now - last >= EVERY:
            last = now
            answers.write(json.dumps([what, done, total]) + "\n")
            answers.flush()

    return report


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os.kill(os.getpid(), signal.SIGTERM)


def _next() -> str:
    try:
        return sys.stdin.readline()
    except KeyboardInterrupt:  # interrupted while it waited: there is nothing to keep
        return ""


if __name__ == "__main__":
    sys.exit(serve())

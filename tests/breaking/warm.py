"""Commands of ``moalign`` as a user types them, each in a fork of this process, which has imported everything already.

A command then takes 50 ms instead of the seconds that imports take. Nothing may use torch before a fork: its threads
would be missing in the child.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("matplotlib.pyplot", "pandas", "pyarrow.parquet", "rich.console", "rich.table", "scipy.stats", "trl")
MEMORY = 6 * 2**30
"""Bytes of address space that a command may add: a request for a batch of 10^9 must not take the machine down."""
FILE_SIZE = 2**30


@dataclass
class Ended:
    """How a command ended."""

    arguments: tuple[str, ...]
    code: int
    """The exit code; negative: the signal that ended it."""
    out: str
    err: str
    seconds: float
    stopped: str = ""
    """The signal that it was sent, or ``time`` when it ran longer than it may."""

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are errors, without the word."""
        return [line.removeprefix("error: ") for line in self.err.split("\n") if line.startswith("error: ")]


def up() -> None:
    """Import all that a command may need."""
    os.environ.update({"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"})
    os.environ.update({"MOALIGN_THREADS": "1", "MOALIGN_JOBS": "1"})
    from moalign.cli import main

    os.environ.update(main._QUIET)
    import moalign

    for module in pkgutil.walk_packages(moalign.__path__, "moalign."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LIBRARIES:
        importlib.import_module(name)
    import typer

    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(main.app)
    gc.collect()
    gc.freeze()


def run(
    arguments: Sequence[str],
    folder: Path,
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    signals: Sequence[tuple[float, int]] = (),
    seconds: float = 60,
) -> Ended:
    """Run a command in ``folder``; it gets ``signals`` (second, number) on its way and SIGKILL after ``seconds``."""
    from moalign.cli import main

    return call(main.main, arguments, folder, stdin=stdin, env=env, signals=signals, seconds=seconds)


def call(
    function: Callable[[], int],
    arguments: Sequence[str],
    folder: Path,
    *,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    signals: Sequence[tuple[float, int]] = (),
    seconds: float = 60,
) -> Ended:
    """Run a function in a child, ``sys.argv`` being ``arguments``; the child's exit code is what it returns."""
    places = [folder.with_name(f"{folder.name}.{name}") for name in ("in", "out", "err")]
    places[0].write_bytes(stdin)
    sys.stdout.flush()
    sys.stderr.flush()
    start = time.monotonic()
    pid = os.fork()
    if not pid:
        _child(function, arguments, folder, places, env or {})
    left, stopped, status = sorted(signals), "", None
    while status is None:
        done, status_now = os.waitpid(pid, os.WNOHANG)
        if done:
            status = status_now
            break
        now = time.monotonic() - start
        if left and now >= left[0][0]:
            number = left.pop(0)[1]
            stopped = signal.Signals(number).name
            os.kill(pid, number)
        elif now > seconds:
            stopped = "time"
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left
    out, err = (place.read_text(encoding="utf-8", errors="backslashreplace") for place in places[1:])
    for place in places:
        place.unlink()
    code = os.waitstatus_to_exitcode(status)
    return Ended(tuple(arguments), code, out, err, time.monotonic() - start, stopped)


def _child(
    function: Callable[[], int], arguments: Sequence[str], folder: Path, places: Sequence[Path], env: Mapping[str, str]
) -> None:
    """Be the command; never returns."""
    code: object = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for descriptor, (place, flags) in enumerate(
            zip(places, (os.O_RDONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT), strict=True)
        ):
            opened = os.open(place, flags)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(env)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        sys.argv = ["moalign", *arguments]
        try:
            code = function()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)

"""Around code that is not ours (scorers, plugins, trackers), which shares the process: its random numbers, its stdout.

Without this, a scorer that seeds a generator changes the run that it scores, and one that prints spoils ``--json``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STOPS = (KeyboardInterrupt,)
"""Exceptions that stop the package from outside; any other, SystemExit too, is a fault of the code that raised it."""


@contextlib.contextmanager
def call() -> Iterator[None]:
    """Call foreign code: random generators are put back afterwards, and what it writes to stdout goes to stderr."""
    with kept_generators, stdout_to_stderr:
        yield


def described(error: BaseException, file: Path | None = None) -> str:
    """Return an exception as ``SystemExit: 0 (line 3)``; the line is the last one in ``file``, where it was there."""
    import traceback

    ran = None if file is None else os.path.realpath(file)  # modules of files are imported by their whole path
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == ran]
    line = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}".removesuffix(": ") + line


class _Shared:
    """A block for what all threads of the process share, so that blocks may overlap.

    The first to begin calls ``change``; the last to end calls what that returned, which undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._blocks = 0
        self._undo: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._undo = self._change()
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._undo()


# -- generators ----------------------------------------------------------------------------------------------------


def _keep_generators() -> Callable[[], None]:
    """Return what puts the global generators back to where they stand now.

    Of a library that nobody has imported yet, no number was drawn: there is nothing to put back.
    """
    libraries = {"numpy": _numpy_generator, "torch": _torch_generators}
    put_back = [functools.partial(random.setstate, random.getstate())]
    put_back += [keep(sys.modules[name]) for name, keep in libraries.items() if name in sys.modules]

    def put_all_back() -> None:
        for put in put_back:
            put()

    return put_all_back


kept_generators = _Shared(_keep_generators)
"""A block after which the global generators of random, numpy and torch (CPU and CUDA) stand where they stood before."""


def _numpy_generator(numpy: Any) -> functools.partial[None]:
    return functools.partial(numpy.random.set_state, numpy.random.get_state())


def _torch_generators(torch: Any) -> functools.partial[None]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return functools.partial(_set_torch_generators, torch, torch.get_rng_state(), on_gpus)


def _set_torch_generators(torch: Any, state: Any, on_gpus: list[Any] | None) -> None:
    changed = not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    if on_gpus is not None:
        torch.cuda.set_rng_state_all(on_gpus)
    elif changed or torch.cuda.is_initialized():
        # Nothing was drawn on a GPU before: its generators stand, or will begin, at the seed of the CPU's.
        torch.cuda.manual_seed_all(torch.initial_seed())


# -- stdout --------------------------------------------------------------------------------------------------------


def _redirect() -> Callable[[], None]:
    """Send stdout to stderr; return what undoes it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stdout = sys.__stdout__
        # Started without a stdout, the process may have anything behind descriptor 1: the score store, for example.
        if stdout is not None and not stdout.closed and stdout.fileno() == 1:
            _flush()
            before = os.dup(1)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, 1)
            stack.callback(_flush)  # first of these: what was written in the block is still in buffers
            target = 2 if sys.__stderr__ is not None else os.open(os.devnull, os.O_WRONLY)
            os.dup2(target, 1)
            if target != 2:
                os.close(target)
        return stack.pop_all().close


stdout_to_stderr = _Shared(_redirect)
"""A block in which stdout is stderr: for Python, for C libraries and for what is written to file descriptor 1."""


def _flush() -> None:
    """Empty the buffers of Python's own stdout and of the C library's."""
    assert sys.__stdout__ is not None
    sys.__stdout__.flush()
    if (library := _c_library()) is not None:
        library.fflush(None)


@functools.cache
def _c_library() -> Any:
    import ctypes

    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # a system whose C library cannot be named so
        return None

"""Where the runs of a comparison are trained: child processes of this machine, or tasks of a ray cluster.

Either way a job is the command ``moalign train ... --json`` in a process that does nothing else meanwhile, so that runs
and failures are the same in both. All jobs use one results folder: ray's nodes must share it, at the same path.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moalign.core.errors import RequestError, WorkError, unknown
from moalign.core.progress import Progress, silent
from moalign.preflight import memory
from moalign.runs import environment
from moalign.tasks.task import Task

NAMES = ("local", "ray")
JOBS = "MOALIGN_JOBS"
"""Environment variable: how many runs are trained at a time, for comparisons without ``--jobs``."""

GRACE = 5.0
"""Seconds that an interrupted process has to end by itself."""
TRIES = 3
"""How often a run is given to a cluster whose nodes die while they train it."""
_POLL = 200
"""Milliseconds of a wait for a child: ray cancels a task between two Python instructions, not inside a wait."""
_PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
"""Variables, besides ``MOALIGN_*``, that a ray task takes from the machine where the comparison was started: a cluster
that was already running does not have them."""


def problems(name: str) -> list[str]:
    """Return why an executor cannot be used: an unknown name, or a library that is not installed."""
    if name not in NAMES:
        return [str(unknown("executor", name, NAMES, "--executor"))]
    if name == "ray" and importlib.util.find_spec("ray") is None:
        return [
            "--executor ray: the package ray is not installed; pip install ray (what moalign's extra [ray] does), or "
            "leave out --executor to train on this machine"
        ]
    return []


def jobs_requested() -> int | None:
    """Return the value of :data:`JOBS`, None where it is not set; RequestError when it is not a positive number."""
    value = os.environ.get(JOBS, "")
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise RequestError(f"{JOBS}={value}: allowed: 1 or more")
    return int(value)


def jobs_by_default(task: Task) -> int:
    """Return how many runs of a task this machine trains at a time: one for each CPU where models are tiny, else one.

    A tiny model is no faster with two threads than with one, so the other CPUs would be idle. A GPU trains one run at a
    time, whatever its size.
    """
    import torch

    from moalign.lm.language_model import TINY

    models, unknown_models = memory.reward_models(task.card)
    policy = memory.sizes_of(task.base_source()[0])
    if torch.cuda.is_available() or unknown_models or policy is None:
        return 1
    tiny = policy.parameters + sum(sizes.parameters for _, sizes in models) < TINY
    return environment.usable_cpus() if tiny else 1


@contextlib.contextmanager
def opened(name: str) -> Iterator[Processes | RayTasks]:
    """Open an executor; ray is started, or its cluster joined, and left at the end.

    Raises WorkError when ray cannot be started or reached.
    """
    if name == "local":
        with contextlib.closing(Processes()) as processes:
            yield processes
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers over the network
    ray: Any = importlib.import_module("ray")
    own = not ray.is_initialized()
    if own:
        try:
            # RAY_ADDRESS, or the cluster that `ray start` left on this machine; else a cluster of this machine alone.
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except Exception as error:
            where = os.environ.get("RAY_ADDRESS")
            at = f" at RAY_ADDRESS={where}" if where else ""
            raise WorkError(f"--executor ray: ray cannot be started or reached{at}: {_line(error)}") from error
    try:
        yield RayTasks(ray)
    finally:
        if own:
            ray.shutdown()


def ending(code: int) -> str:
    """Return how a process ended, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


_START = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "runpy.run_module(sys.argv[2], run_name='__main__', alter_sys=True)"
)
"""``python -m``, with this process's path: a ``random.py`` in the current folder would be taken for the library."""


class Child:
    """A process that answers requests, lines of JSON on its stdin, one after another.

    While it works it writes progress, ``[what, done, total]``, and at the end of each request one other line.
    """

    def __init__(self, module: str, folder: str | None = None, settings: Mapping[str, str] | None = None) -> None:
        self._messages = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed with it
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, json.dumps(list(map(str, sys.path))), module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            bufsize=0,
            cwd=folder,
            env={**os.environ, **(settings or {})},
        )

    def ask(self, request: Any, progress: Progress) -> tuple[str, str]:
        """Return the answer to a request and what went to stderr meanwhile; an empty answer when the process ended."""
        begin = self._messages.seek(0, os.SEEK_END)
        waiting = select.poll()
        assert self.process.stdin is not None and self.process.stdout is not None
        waiting.register(self.process.stdout, select.POLLIN)
        with contextlib.suppress(BrokenPipeError):  # it has ended: its exit code says how
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        line = "["
        while line.startswith("["):
            while not waiting.poll(_POLL):
                pass
            line = self.process.stdout.readline().decode(errors="replace")
            if line.startswith("["):
                with contextlib.suppress(Exception):  # an error while showing progress must not lose the answer
                    progress(*json.loads(line))
        if not line.endswith("\n"):  # it has ended, perhaps in the middle of a line
            line = ""
            self.process.wait()
        self._messages.seek(begin)
        return line.strip(), self._messages.read()

    def close(self) -> None:
        """End the process, which has no request to answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self._messages.close()


class Processes:
    """Child processes that are interrupted with this one; one whose command succeeded runs the next one.

    Not a ProcessPoolExecutor: one killed worker breaks the whole pool, and a worker cannot be interrupted.
    """

    def __init__(self, folder: str | None = None, settings: Mapping[str, str] | None = None) -> None:
        """Run in ``folder`` (None: the current one) with ``settings`` added to this process's environment."""
        self._folder, self._settings = folder, settings
        self._lock, self._reporting = threading.Lock(), threading.Lock()
        self._alive: set[Child] = set()
        self._idle: list[Child] = []
        self._stopping = False

    def run(self, command: Sequence[str], progress: Progress = silent) -> tuple[int, str]:
        """Run ``moalign`` with these arguments to its end; return (exit code, stderr).

        Any number of threads may call it; ``progress`` is called by one at a time.
        """

        def one_at_a_time(what: str, done: int, total: int) -> None:
            with self._reporting:
                progress(what, done, total)

        with self._lock:
            if self._stopping:
                return -signal.SIGINT, ""
            child = self._idle.pop() if self._idle else Child("moalign.cli.jobs", self._folder, self._settings)
            self._alive.add(child)
        answer, messages = child.ask([*command, "--json"], one_at_a_time)
        # A process that ends without an answer has failed, whatever its exit code.
        code = int(answer) if answer else child.process.wait() or 1
        with self._lock:
            self._alive.discard(child)
            reusable = code == 0 and not self._stopping
            if reusable:
                self._idle.append(child)
        if not reusable:
            child.close()
        return code, messages

    def close(self) -> None:
        """End the children that wait for a command."""
        while self._idle:
            self._idle.pop().close()

    def stop(self) -> None:
        """Interrupt every child and start no more; their runs can be resumed.

        A command that a shell started in the background ignores interrupts, and its children inherit that: those still
        running after :data:`GRACE` are terminated, which a run survives as it survives a crash.
        """
        with self._lock:
            self._stopping = True
            alive = [child.process for child in self._alive]
        for process in alive:
            process.send_signal(signal.SIGINT)
        last = time.monotonic() + GRACE
        for process in alive:
            try:
                process.wait(max(0.0, last - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()


class RayTasks:
    """Tasks of a ray cluster, each with a child process on the worker that ray picks.

    A task requires one CPU and, where the cluster has GPUs, one GPU: ray starts it when they are free.
    """

    def __init__(self, ray: Any) -> None:
        """Use ``ray``, the module, which is connected to its cluster."""
        self._ray = ray
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        # No second try by ray: it would try what fails by itself, too, for want of memory without end.
        self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_on_worker)
        self._lock = threading.Lock()
        self._alive: set[Any] = set()
        self._stopping = False

    def run(self, command: Sequence[str], progress: Progress = silent) -> tuple[int, str]:
        """Run ``moalign`` with these arguments as a task; return (exit code, stderr); its progress is not known.

        When its node dies another one goes on from the last checkpoint, :data:`TRIES` times in all.

        Raises WorkError when it could not be run at all, or was lost.
        """
        of_node = (self._ray.exceptions.NodeDiedError, self._ray.exceptions.WorkerCrashedError)
        for attempt in range(1, TRIES + 1):
            try:
                return self._once(command)
            except self._ray.exceptions.TaskCancelledError:
                break
            except self._ray.exceptions.RayError as error:
                if attempt == TRIES or not isinstance(error, of_node):
                    raise WorkError(f"its ray task was lost: {_line(error)}") from error
                time.sleep(GRACE)  # a node may be lost to its cluster alone: what it trained ends by itself
        return -signal.SIGINT, ""

    def _once(self, command: Sequence[str]) -> tuple[int, str]:
        with self._lock:
            if self._stopping:
                return -signal.SIGINT, ""
            ref = self._task.remote(list(command), os.getcwd(), _settings())
            self._alive.add(ref)
        try:
            code, messages = self._ray.get(ref)
            return code, messages
        finally:
            with self._lock:
                self._alive.discard(ref)

    def stop(self) -> None:
        """Cancel every task and wait until their children have ended; those that do not are killed."""
        with self._lock:
            self._stopping = True
            alive = list(self._alive)
        for ref in alive:
            self._ray.cancel(ref)
        if alive:
            _, left = self._ray.wait(alive, num_returns=len(alive), timeout=2 * GRACE)
            for ref in left:
                self._ray.cancel(ref, force=True)


def _on_worker(command: Sequence[str], folder: str, settings: Mapping[str, str]) -> tuple[int, str]:
    """Run one job on a ray worker; a cancelled task passes the interruption on to its child."""
    # ray starts its workers with interrupts blocked, and a child would inherit that.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with contextlib.closing(Processes(folder, settings)) as here:
        try:
            return here.run(command)
        except BaseException:
            here.stop()
            raise


def _settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _PASSED_ON or name.startswith("MOALIGN_")}


def _line(error: BaseException) -> str:
    """Return an error of ray, or the task's error that it wraps, in one line."""
    cause = getattr(error, "cause", None)
    source = cause if isinstance(cause, BaseException) else error
    lines = [line.strip() for line in str(source).splitlines() if line.strip()]
    return f"{type(source).__name__}: {lines[0]}" if lines else type(source).__name__

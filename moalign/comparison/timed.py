"""One method measured in a process of its own; ``moalign bench`` starts it as ``python -m moalign.comparison.timed``.

Its one argument is a request as JSON (:class:`Ask`). What it prints on stdout is read by the parent: one JSON object a
line, ``{"say": [what, done, total]}`` while it works and at the end ``{"told": {...}}`` or ``{"error": ..., "trace":
...}``. Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moalign.comparison.jobs import HEAVY
from moalign.core.errors import MoalignError
from moalign.experiment.train import Plan, TrainRequest, plan, train
from moalign.runs import environment, meter, trackers
from moalign.runs.run import Run

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Ask:
    """What to measure."""

    method: str
    task: str | None
    prefs: Sequence[str]
    overrides: Sequence[str]
    results: str
    """A folder that is thrown away."""
    started: float
    """When the parent started this process, in seconds of ``time.time``."""
    prepare: bool = False
    """Only make what all methods find ready: the base and the normaliser."""

    def text(self) -> str:
        """Return the request as the argument of the process."""
        return json.dumps(asdict(self))


class Watch(trackers.Mirrors):
    """Takes the place of a run's trackers and keeps when each line of ``metrics.jsonl`` was written."""

    def __init__(self, run: Run, stamps: list[dict[str, Any]]) -> None:
        """Append to ``stamps`` what :func:`moalign.comparison.bench.measured` reads."""
        super().__init__((), run.path, {})
        self._run, self._stamps = run.path.name, stamps

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Keep one line's time and its cost so far."""
        counted = {key: metrics.get(key) for key in ("tokens_generated", "tokens_trained", "reward_calls")}
        self._stamps.append({"run": self._run, "phase": phase, "step": step, "at": time.perf_counter(), **counted})


@dataclass
class TimedPlan(Plan):
    """A plan whose run is watched, and so are the runs of the experts that it asks for."""

    stamps: list[dict[str, Any]] = field(default_factory=list)

    def mirrors(self, run: Run) -> trackers.Mirrors:
        """Return the watch; the recipe's own trackers stay off."""
        return Watch(run, self.stamps)


def measure(ask: Ask, write: Write) -> dict[str, Any]:
    """Train what is asked for and return its times (seconds), stamps, peaks (bytes) and the machine."""

    def say(what: str, done: int, total: int) -> None:
        write({"say": [what, done, total]})

    say("starting", 0, 1)
    request = TrainRequest(
        ask.method, task=ask.task, prefs=ask.prefs, overrides=ask.overrides, results=Path(ask.results)
    )
    made = plan(request, say)
    for name in HEAVY:
        importlib.import_module(name)
    imported = time.time()
    made.task.say = say
    _ = made.task.normaliser
    if ask.prepare:
        say("starting", 1, 1)
        return {}
    _ = made.task.language_model
    ready = time.time()
    say("starting", 1, 1)
    timed = TimedPlan(**{one.name: getattr(made, one.name) for one in fields(made)})
    train(timed, say)
    return {
        "import_seconds": imported - ask.started,
        "start_seconds": ready - ask.started,
        "seconds": time.time() - ask.started,
        "stamps": timed.stamps,
        "peak_host_bytes": meter.process_peak_bytes(),
        "peak_gpu_bytes": meter.device_peak_bytes() or None,
        "environment": environment.capture(),
    }


def main(argument: str) -> int:
    """Answer one request on stdout; returns the exit code."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        write({"told": measure(Ask(**json.loads(argument)), write)})
    except Exception as error:
        said = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        write({"error": said, "trace": traceback.format_exc()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

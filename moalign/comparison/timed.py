"""Time one method in a process of its own; ``moalign bench`` starts it as ``python -m moalign.comparison.timed``.

Its only argument is a :class:`TimingRequest` as JSON. The parent reads its stdout: one JSON object per line,
``{"progress": [what, done, total]}`` while it works and at the end ``{"result": {...}}`` or ``{"error": ..., "trace":
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
from typing import Any, TypedDict

from moalign.comparison.jobs import HEAVY
from moalign.core.errors import MoalignError
from moalign.experiment.train import Plan, TrainRequest, plan, train
from moalign.runs import environment, meter, trackers
from moalign.runs.run import Run

Write = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class TimingRequest:
    """What to measure."""

    method: str
    task: str | None
    prefs: Sequence[str]
    overrides: Sequence[str]
    results: str
    """Results folder, deleted afterwards."""
    started: float
    """When the parent started this process, in seconds of ``time.time``."""
    prepare: bool = False
    """Only make what all methods share: the base and the normaliser."""

    def text(self) -> str:
        """Return the request as the argument of the process."""
        return json.dumps(asdict(self))


class Stamp(TypedDict):
    """When one line of ``metrics.jsonl`` was written, and the cost until then; None where the line has none."""

    run: str
    phase: str
    step: int
    at: float
    """Seconds of ``time.perf_counter``."""
    tokens_generated: int | None
    tokens_trained: int | None
    reward_calls: int | None


class LineTimer(trackers.Mirrors):
    """Replaces a run's trackers and records when each line of ``metrics.jsonl`` was written."""

    def __init__(self, run: Run, stamps: list[Stamp]) -> None:
        """Append to ``stamps``, the input of :func:`moalign.comparison.bench.measured`."""
        super().__init__((), run.path, {})
        self._run, self._stamps = run.path.name, stamps

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Record the time of one line, and the cost so far."""
        self._stamps.append(
            {
                "run": self._run,
                "phase": phase,
                "step": step,
                "at": time.perf_counter(),
                "tokens_generated": metrics.get("tokens_generated"),
                "tokens_trained": metrics.get("tokens_trained"),
                "reward_calls": metrics.get("reward_calls"),
            }
        )


@dataclass(frozen=True)
class TimedPlan(Plan):
    """A plan whose run is timed, as are the runs of the experts that it needs."""

    stamps: list[Stamp] = field(default_factory=list)

    def mirrors(self, run: Run) -> trackers.Mirrors:
        """Return the timing tracker instead of the recipe's own trackers."""
        return LineTimer(run, self.stamps)


def measure(request: TimingRequest, write: Write) -> dict[str, Any]:
    """Train as requested; return times (seconds), time stamps, peaks (bytes) and the environment."""

    def progress(what: str, done: int, total: int) -> None:
        write({"progress": [what, done, total]})

    progress("starting", 0, 1)
    train_request = TrainRequest(
        request.method,
        task=request.task,
        prefs=request.prefs,
        overrides=request.overrides,
        results=Path(request.results),
    )
    planned = plan(train_request, progress)
    for name in HEAVY:
        importlib.import_module(name)
    imported = time.time()
    planned.task.progress = progress
    _ = planned.task.normaliser
    if request.prepare:
        progress("starting", 1, 1)
        return {}
    _ = planned.task.language_model
    ready = time.time()
    progress("starting", 1, 1)
    timed = TimedPlan(**{item.name: getattr(planned, item.name) for item in fields(planned)})
    train(timed, progress)
    return {
        "import_seconds": imported - request.started,
        "start_seconds": ready - request.started,
        "seconds": time.time() - request.started,
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
        write({"result": measure(TimingRequest(**json.loads(argument)), write)})
    except Exception as error:
        message = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        write({"error": message, "trace": traceback.format_exc()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

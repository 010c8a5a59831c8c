"""Time one method in a process of its own; ``moalign bench`` starts it as ``python -m moalign.comparison.timed``.

It is a :class:`~moalign.comparison.executors.Child` that answers one :class:`TimingRequest` by a :class:`Measurement`.
Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from moalign.comparison.jobs import HEAVY
from moalign.core.errors import MoalignError
from moalign.core.progress import Progress
from moalign.evaluation.result import Content
from moalign.experiment.train import Plan, TrainRequest, plan, train
from moalign.runs import environment, meter, trackers
from moalign.runs.run import Run


class TimingRequest(Content):
    """What to measure."""

    method: str
    task: str | None
    prefs: list[str]
    overrides: list[str]
    results: str
    """Results folder, deleted afterwards."""
    started: float = 0.0
    """When the parent started this process, in seconds of ``time.time``."""
    prepare: bool = False
    """Only make what all methods share: the base and the normaliser."""


class Stamp(Content):
    """When one line of ``metrics.jsonl`` was written, and the cost until then; None where the line has none."""

    run: str
    phase: str
    step: int
    at: float
    """Seconds of ``time.perf_counter``."""
    tokens_generated: int | None = None
    tokens_trained: int | None = None
    reward_calls: int | None = None


class Measurement(Content):
    """Times in seconds since the parent started the process, or why there are none."""

    import_seconds: float | None = None
    start_seconds: float | None = None
    """Until imports, base and normaliser were there."""
    seconds: float | None = None
    stamps: list[Stamp] = []  # noqa: RUF012 - pydantic copies it
    peak_host_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    environment: dict[str, Any] | None = None
    error: str | None = None
    trace: str | None = None


class LineTimer(trackers.Mirrors):
    """Replaces a run's trackers and records when each line of ``metrics.jsonl`` was written."""

    def __init__(self, run: Run, stamps: list[Stamp]) -> None:
        """Append to ``stamps``, the input of :func:`moalign.comparison.bench.measured`."""
        super().__init__((), run.path, {})
        self._run, self._stamps = run.path.name, stamps

    def log(self, step: int, phase: str, metrics: Mapping[str, Any]) -> None:
        """Record the time of one line, and the cost so far."""
        cost = {name: metrics.get(name) for name in ("tokens_generated", "tokens_trained", "reward_calls")}
        self._stamps.append(Stamp(run=self._run, phase=phase, step=step, at=time.perf_counter(), **cost))


@dataclass(frozen=True)
class TimedPlan(Plan):
    """A plan whose run is timed, as are the runs of the experts that it needs."""

    stamps: list[Stamp] = field(default_factory=list)

    def mirrors(self, run: Run) -> trackers.Mirrors:
        """Return the timing tracker instead of the recipe's own trackers."""
        return LineTimer(run, self.stamps)


def measure(request: TimingRequest, progress: Progress) -> Measurement:
    """Train as requested."""
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
        return Measurement()
    _ = planned.task.language_model
    ready = time.time()
    progress("starting", 1, 1)
    timed = TimedPlan(**{item.name: getattr(planned, item.name) for item in fields(planned)})
    train(timed, progress)
    return Measurement(
        import_seconds=imported - request.started,
        start_seconds=ready - request.started,
        seconds=time.time() - request.started,
        stamps=timed.stamps,
        peak_host_bytes=meter.process_peak_bytes(),
        peak_gpu_bytes=meter.device_peak_bytes() or None,
        environment=environment.capture(),
    )


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def progress(what: str, done: int, total: int) -> None:
        print(json.dumps([what, done, total]), file=answers, flush=True)

    try:
        measurement = measure(TimingRequest.model_validate_json(sys.stdin.readline()), progress)
    except Exception as error:
        message = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        measurement = Measurement(error=message, trace=traceback.format_exc())
    print(measurement.model_dump_json(), file=answers, flush=True)


if __name__ == "__main__":
    main()

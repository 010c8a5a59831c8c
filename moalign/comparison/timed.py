"""Time one method in a process of its own; ``moalign bench`` starts it as ``python -m moalign.comparison.timed``.

It is a :class:`~moalign.comparison.executors.Child` that answers one :class:`TimingRequest` by a :class:`Timing`.
Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moalign.comparison.jobs import HEAVY
from moalign.core.errors import MoalignError
from moalign.core.progress import Progress
from moalign.evaluation.result import Content
from moalign.experiment.train import Plan, TrainRequest, plan, train
from moalign.runs import environment, meter, trackers
from moalign.runs.run import Run


class BenchRow(Content):
    """The measurements of one method; None where there is nothing to measure."""

    method: str
    status: Literal["done", "failed"]
    error: str | None = None
    import_seconds: float | None = None
    start_seconds: float | None = None
    """From the start of its process until imports, base and normaliser were there."""
    seconds: float | None = None
    """From the start of its process to the end of training."""
    seconds_per_step: float | None = None
    """Median over the steps of all stages."""
    steps_measured: int = 0
    stages: dict[str, float] = Field(default_factory=dict)
    """Median seconds of a step, by stage."""
    tokens_generated_per_second: float | None = None
    tokens_trained_per_second: float | None = None
    responses_scored_per_second: float | None = None
    peak_memory_bytes: int | None = None
    """Of the GPU where there is one, else of the process."""
    peak_host_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    prefs: list[str]
    settings: list[str]
    """The settings that differ from its recipe."""


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

    def row(self, **fields: Any) -> BenchRow:
        """Return a row of the method."""
        return BenchRow(method=self.method, prefs=self.prefs, settings=self.overrides, **fields)


@dataclass
class Stamp:
    """When one line of ``metrics.jsonl`` was written, and the cost until then; None where the line has none."""

    run: str
    phase: str
    step: int
    at: float
    """Seconds of ``time.perf_counter``."""
    tokens_generated: int | None = None
    tokens_trained: int | None = None
    reward_calls: int | None = None


class Timing(Content):
    """What a process answers: the row, and where it was measured or why it failed."""

    row: BenchRow
    machine: dict[str, Any] | None = None
    trace: str | None = None


class LineTimer(trackers.Mirrors):
    """Replaces a run's trackers and records when each line of ``metrics.jsonl`` was written."""

    def __init__(self, run: Run, stamps: list[Stamp]) -> None:
        """Append to ``stamps``, the input of :func:`measured`."""
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


def measure(request: TimingRequest, progress: Progress) -> Timing:
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
        return Timing(row=request.row(status="done"))
    _ = planned.task.language_model
    ready = time.time()
    progress("starting", 1, 1)
    timed = TimedPlan(**{item.name: getattr(planned, item.name) for item in fields(planned)})
    train(timed, progress)
    host, gpu = meter.process_peak_bytes(), meter.device_peak_bytes() or None
    row = request.row(
        status="done",
        import_seconds=imported - request.started,
        start_seconds=ready - request.started,
        seconds=time.time() - request.started,
        **measured(timed.stamps, len(planned.task.names)),
        peak_memory_bytes=gpu or host,
        peak_host_bytes=host,
        peak_gpu_bytes=gpu,
    )
    return Timing(row=row, machine=machine())


def measured(stamps: Sequence[Stamp], objectives: int) -> dict[str, Any]:
    """Return seconds per step (medians) and rates per second, from the times of the lines of metrics.

    A step is timed between two consecutive lines of a phase, so that the first step of each, a warm-up, is left out. A
    rate is a count divided by the seconds of all intervals between lines in which it grew; where a step both samples
    and updates, each rate is over the whole step.

    Args:
        stamps: of the lines, in the order written.
        objectives: scores of a response.
    """
    every = [(a, b) for a, b in pairwise(stamps) if a.run == b.run]
    steps = [(a, b) for a, b in every if a.phase == b.phase and b.step == a.step + 1]
    stages: dict[str, list[float]] = {}
    for a, b in steps:
        stages.setdefault(re.sub(r"-\d+(?=-|$)", "", a.phase), []).append(b.at - a.at)
    times = [seconds for durations in stages.values() for seconds in durations]
    scored = _rate(every, "reward_calls")
    return {
        "seconds_per_step": statistics.median(times) if times else None,
        "steps_measured": len(times),
        "stages": {name: statistics.median(durations) for name, durations in stages.items()},
        "tokens_generated_per_second": _rate(every, "tokens_generated"),
        "tokens_trained_per_second": _rate(steps, "tokens_trained"),
        "responses_scored_per_second": None if scored is None else scored / objectives,
    }


def _rate(intervals: Sequence[tuple[Stamp, Stamp]], unit: str) -> float | None:
    """Return the count per second over the intervals in which it grew; None where there is none."""
    grown = [
        (getattr(b, unit) - getattr(a, unit), b.at - a.at)
        for a, b in intervals
        if getattr(a, unit) is not None and getattr(b, unit) is not None and getattr(b, unit) > getattr(a, unit)
    ]
    seconds = sum(duration for _, duration in grown)
    return sum(count for count, _ in grown) / seconds if seconds > 0 else None


def machine() -> dict[str, Any]:
    """Return the part of the environment that the numbers depend on."""
    captured = environment.capture()
    packages = captured["packages"]
    keys = ("cpu", "cpus", "threads", "memory_bytes", "gpus", "python", "platform")
    return {**{key: captured[key] for key in keys}, "torch": packages["torch"], "moalign": packages["moalign"]}


def main() -> None:
    """Answer one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def progress(what: str, done: int, total: int) -> None:
        print(json.dumps([what, done, total]), file=answers, flush=True)

    request = TimingRequest.model_validate_json(sys.stdin.readline())
    try:
        timing = measure(request, progress)
    except Exception as error:
        message = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        timing = Timing(row=request.row(status="failed", error=message), trace=traceback.format_exc())
    print(timing.model_dump_json(by_alias=True), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""``moalign bench``: what an update step of each method costs on this machine, in time and memory.

Every method trains for a few steps with the batch and the lengths of its recipe, in a process of its own, so that the
peak of memory is its own. Nothing is kept: the runs are in a temporary folder.
"""

from __future__ import annotations

import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moalign.comparison.compare import CompareRequest, plan_all
from moalign.comparison.executors import Child, ending
from moalign.comparison.jobs import ComparedRun, prefixed
from moalign.comparison.timed import Measurement, Stamp, TimingRequest
from moalign.config.card import TaskCard
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.evaluation.result import Content
from moalign.runs import environment

STEPS = 8
"""Steps of every stage, by default."""
LEAST = 2
"""A step is timed from one line of metrics to the next, and the first step is a warm-up."""
SAMPLED = ("online_prompts", "augment_prompts")
"""Settings of how many responses a method samples between its stages: reduced like steps, since they take time too."""
LEAST_SAMPLED = 256
"""Lower bound of the reduced :data:`SAMPLED` settings: a method picks the best responses and needs a choice."""


@dataclass(frozen=True)
class BenchRequest:
    """The user's request."""

    methods: Sequence[str] = ()
    """Empty: the methods of the task's suite that train."""
    task: str | None = None
    overrides: Sequence[str] = ()
    """``key=value`` as in ``compare``; settings given here are not reduced."""
    steps: int = STEPS


class BenchRow(Content):
    """The measurements of one method; None where there is nothing to measure."""

    method: str
    status: Literal["done", "failed"]
    error: str | None
    import_seconds: float | None
    start_seconds: float | None
    """From the start of its process until imports, base and normaliser were there."""
    seconds: float | None
    """From the start of its process to the end of training."""
    seconds_per_step: float | None = None
    """Median over the steps of all stages."""
    steps_measured: int = 0
    stages: dict[str, float]
    """Median seconds of a step, by stage."""
    tokens_generated_per_second: float | None
    tokens_trained_per_second: float | None
    responses_scored_per_second: float | None
    peak_memory_bytes: int | None
    """Of the GPU where there is one, else of the process."""
    peak_host_bytes: int | None
    peak_gpu_bytes: int | None
    prefs: list[str]
    settings: list[str]
    """The settings that differ from its recipe."""


class BenchResult(Content):
    """The measurements of all methods, and where they were made."""

    task: str
    steps: int
    machine: dict[str, Any]
    rows: list[BenchRow]
    failed: list[str]
    """The methods that failed."""
    traces: list[str] = Field(default_factory=list, exclude=True)
    """Their tracebacks, for ``--debug``."""


def bench(request: BenchRequest, progress: Progress = silent) -> BenchResult:
    """Measure the methods one after the other; one that fails is a row of status ``failed``, and the others go on.

    Raises:
        RequestError: every problem of the request at once, before anything is trained.
    """
    if request.steps < LEAST:
        raise RequestError(f"--steps {request.steps}: allowed: {LEAST} or more; a step's time lies between two steps")
    with tempfile.TemporaryDirectory(prefix="moalign-bench-") as results:
        compare_request = CompareRequest(
            task=request.task, methods=request.methods, overrides=request.overrides, results=Path(results)
        )
        runs, card, _ = plan_all(compare_request)
        if not request.methods:
            runs = [run for run in runs if run.method.capabilities.trains]
        rows, measurements = [], []
        for number, run in enumerate(runs):
            timing = _timing_request(run, card, request.steps, results)
            measurement = Measurement()
            if number == 0:  # a process that makes the base and the normaliser, and is not measured
                measurement = _measured_apart(timing.model_copy(update={"prepare": True}), "preparing", progress)
            if measurement.error is None:
                measurement = _measured_apart(timing, f"{run.method.name} ({number + 1}/{len(runs)})", progress)
            shutil.rmtree(Path(results) / "runs", ignore_errors=True)  # or the next method would reuse its experts
            measurements.append(measurement)
            rows.append(_row(timing, measurement, len(card.objectives)))
    captured = next(filter(None, (measurement.environment for measurement in measurements)), None)
    return BenchResult(
        task=card.name,
        steps=request.steps,
        machine=_machine(captured or environment.capture()),
        rows=rows,
        failed=[row.method for row in rows if row.status == "failed"],
        traces=[measurement.trace for measurement in measurements if measurement.trace],
    )


# --- one method -------------------------------------------------------------------------------------------------


def _timing_request(run: ComparedRun, card: TaskCard, steps: int, results: str) -> TimingRequest:
    """Return what a method's process is to do: its recipe with fewer steps, and one preference where each is a run."""
    assert run.plan is not None
    resolved, count = run.plan, len(card.objectives)
    given = [str(text) for text in resolved.as_given["set"]]
    named = {text.partition("=")[0].strip().removeprefix("config.") for text in given}
    limits = {"steps": steps, **dict.fromkeys(SAMPLED, max(LEAST_SAMPLED, 2 * card.generation.batch_size))}
    cuts = [f"config.{key}={value}" for key, value in shortened(resolved.config, limits) if key not in named]
    return TimingRequest(
        method=run.method.name,
        task=str(resolved.as_given["task"]),
        prefs=[] if run.method.capabilities.one_policy else [",".join([repr(1 / count)] * count)],
        overrides=[*cuts, *given],
        results=results,
    )


def shortened(config: Strict, limits: Mapping[str, int], above: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, value) of the settings that shorten a method; nothing else of its recipe is changed.

    Args:
        limits: setting -> its largest value, in every stage; every step is logged (``log_every``).
    """
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(value, Strict):
            yield from shortened(value, limits, f"{above}{key}.")
        elif isinstance(value, int) and value > limits.get(key, value):
            yield f"{above}{key}", limits[key]
        elif key == "log_every" and value != 1:
            yield f"{above}{key}", 1


def _measured_apart(request: TimingRequest, title: str, progress: Progress) -> Measurement:
    """Measure in a process; one that died has an error."""
    child = Child("moalign.comparison.timed")
    try:
        started = request.model_copy(update={"started": time.time()})
        answer, messages = child.ask(started.model_dump(), prefixed(progress, title))
        if answer:
            return Measurement.model_validate_json(answer)
        lines = [line.strip() for line in messages.splitlines() if line.strip()]
        how = f"its process ended early ({ending(child.process.wait())})"
        return Measurement(error=": ".join([how, *lines[-1:]]))
    except BaseException:
        child.process.terminate()
        raise
    finally:
        child.close()


# --- numbers ----------------------------------------------------------------------------------------------------


def _row(request: TimingRequest, measurement: Measurement, objectives: int) -> BenchRow:
    return BenchRow(
        method=request.method,
        status="done" if measurement.error is None else "failed",
        error=measurement.error,
        import_seconds=measurement.import_seconds,
        start_seconds=measurement.start_seconds,
        seconds=measurement.seconds,
        **measured(measurement.stamps, objectives),
        peak_memory_bytes=measurement.peak_gpu_bytes or measurement.peak_host_bytes,
        peak_host_bytes=measurement.peak_host_bytes,
        peak_gpu_bytes=measurement.peak_gpu_bytes,
        prefs=request.prefs,
        settings=request.overrides,
    )


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


def _machine(captured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an environment that the numbers depend on."""
    packages = captured["packages"]
    keys = ("cpu", "cpus", "threads", "memory_bytes", "gpus", "python", "platform")
    return {**{key: captured[key] for key in keys}, "torch": packages["torch"], "moalign": packages["moalign"]}

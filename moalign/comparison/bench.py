"""``moalign bench``: what an update step of each method costs on this machine, in time and memory.

Every method trains for a few steps with the batch and the lengths of its recipe, in a process of its own, so that the
peak of memory is its own. Nothing is kept: the runs are in a temporary folder.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from moalign.comparison.compare import CompareRequest, plan_all
from moalign.comparison.executors import Child, ending
from moalign.comparison.jobs import ComparedRun
from moalign.comparison.timed import BenchRow, Timing, TimingRequest, machine
from moalign.config.card import TaskCard
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, prefixed, silent
from moalign.evaluation.result import Content
from moalign.training.settings import CostHints

STEPS = 8
"""Steps of every stage, by default."""
LEAST = 2
"""A step is timed from one line of metrics to the next, and the first step is a warm-up."""
LEAST_SAMPLED = 256
"""Responses that a method samples between its stages are reduced like steps, since they take time too, but not below
this: it picks the best of them and needs a choice."""


@dataclass(frozen=True)
class BenchRequest:
    """The user's request."""

    methods: Sequence[str] = ()
    """Empty: the methods of the task's suite that train."""
    task: str | None = None
    overrides: Sequence[str] = ()
    """``key=value`` as in ``compare``; settings given here are not reduced."""
    steps: int = STEPS


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
        timings: list[Timing] = []
        for number, run in enumerate(runs, start=1):
            timing_request = _timing_request(run, card, request.steps, results)
            prepared = timing_request.model_copy(update={"prepare": True})
            # The very first process makes the base and the normaliser, and is not measured.
            timing = _timed_apart(prepared, "preparing", progress) if number == 1 else None
            if timing is None or timing.row.status == "done":
                timing = _timed_apart(timing_request, f"{run.method.name} ({number}/{len(runs)})", progress)
            shutil.rmtree(Path(results) / "runs", ignore_errors=True)  # or the next method would reuse its experts
            timings.append(timing)
    machines = [timing.machine for timing in timings if timing.machine is not None]
    return BenchResult(
        task=card.name,
        steps=request.steps,
        machine=machines[0] if machines else machine(),
        rows=[timing.row for timing in timings],
        failed=[timing.row.method for timing in timings if timing.row.status == "failed"],
        traces=[timing.trace for timing in timings if timing.trace is not None],
    )


# --- one method -------------------------------------------------------------------------------------------------


def _timing_request(run: ComparedRun, card: TaskCard, steps: int, results: str) -> TimingRequest:
    """Return what a method's process is to do: its recipe with fewer steps, and one preference where each is a run."""
    assert run.plan is not None
    resolved, count = run.plan, len(card.objectives)
    given = [str(text) for text in resolved.as_given["set"]]
    named = {text.partition("=")[0].strip().removeprefix("config.") for text in given}
    sampled = resolved.config.sampled_by if isinstance(resolved.config, CostHints) else ()
    limits = {"steps": steps, **dict.fromkeys(sampled, max(LEAST_SAMPLED, 2 * card.generation.batch_size))}
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


def _timed_apart(request: TimingRequest, title: str, progress: Progress) -> Timing:
    """Time one method in a process of its own."""
    child = Child("moalign.comparison.timed")
    try:
        started = request.model_copy(update={"started": time.time()})
        answer, messages = child.ask(started.model_dump(), prefixed(progress, title))
        if answer:
            return Timing.model_validate_json(answer)
        lines = [line.strip() for line in messages.splitlines() if line.strip()]
        how = f"its process ended early ({ending(child.process.wait())})"
        return Timing(row=request.row(status="failed", error=": ".join([how, *lines[-1:]])))
    except BaseException:
        child.process.terminate()
        raise
    finally:
        child.close()

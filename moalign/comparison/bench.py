"""``moalign bench``: what an update step of each method costs on this machine, in time and memory.

Every method trains for a few steps with the batch and the lengths of its recipe, in a process of its own, so that the
peak of memory is its own. Nothing is kept: the runs are in a temporary folder.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

from moalign.comparison.compare import CompareRequest, plan_all
from moalign.comparison.executors import GRACE
from moalign.comparison.jobs import Work
from moalign.comparison.timed import Stamp, TimingRequest
from moalign.config.card import TaskCard
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.runs import environment
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


@dataclass
class Bench:
    """The measurements."""

    told: dict[str, Any]
    traces: list[str] = field(default_factory=list)
    """Tracebacks of methods that failed, for ``--debug``."""

    @property
    def exit_code(self) -> int:
        """1 when a method failed, else 0."""
        return 1 if self.told["failed"] else 0


def bench(request: BenchRequest, progress: Progress = silent) -> Bench:
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
        works, card, _ = plan_all(compare_request)
        if not request.methods:
            works = [work for work in works if work.method.capabilities.trains]
        result = Bench({})
        rows = list(_rows(works, card, request, Path(results), progress, result.traces))
    machines = [row.pop("machine") for row in rows]
    result.told = {
        "task": card.name,
        "steps": request.steps,
        "machine": next(filter(None, machines), None) or _machine(environment.capture()),
        "rows": rows,
        "failed": [row["method"] for row in rows if row["status"] == "failed"],
    }
    return result


def _rows(
    works: Sequence[Work], card: TaskCard, request: BenchRequest, results: Path, progress: Progress, traces: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row per method; the very first process makes the base and the normaliser and is not measured."""
    for number, work in enumerate(works):
        timing = _timing_request(work, card, request.steps, results)
        for prepare in [True, False] if number == 0 else [False]:
            title = "preparing" if prepare else f"{work.method.name} ({number + 1}/{len(works)})"
            answer = _answer(timing, prepare, title, progress)
            if "error" in answer:
                break
        shutil.rmtree(results / "runs", ignore_errors=True)  # or the next method would reuse its experts
        if "trace" in answer:
            traces.append(answer["trace"])
        yield _row(work, timing, answer, len(card.objectives))


# --- one method -------------------------------------------------------------------------------------------------


def _timing_request(work: Work, card: TaskCard, steps: int, results: Path) -> TimingRequest:
    """Return what a method's process is to do: its recipe with fewer steps, and one preference where each is a run."""
    assert work.plan is not None
    resolved = work.plan
    given = [str(text) for text in resolved.as_given["set"]]
    named = {text.partition("=")[0].strip().removeprefix("config.") for text in given}
    sampled = resolved.config.sampled_by if isinstance(resolved.config, CostHints) else ()
    limits = {"steps": steps, **dict.fromkeys(sampled, max(LEAST_SAMPLED, 2 * card.generation.batch_size))}
    cuts = [f"config.{key}={value}" for key, value in shortened(resolved.config, limits) if key not in named]
    count = len(card.objectives)
    prefs = [] if work.method.capabilities.one_policy else [",".join([repr(1 / count)] * count)]
    task = str(resolved.as_given["task"])
    return TimingRequest(work.method.name, task, prefs, [*cuts, *given], str(results), 0.0)


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


def _answer(request: TimingRequest, prepare: bool, title: str, progress: Progress) -> dict[str, Any]:
    """Measure in a process; returns its measurements, or ``{"error": ...}`` when it failed or died."""
    started = TimingRequest(**{**vars(request), "started": time.time(), "prepare": prepare})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", "moalign.comparison.timed", started.text()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
        )
        try:
            answer = _read(child, title, progress)
            code = child.wait()
        finally:
            _end(child)
        if answer is not None:
            return answer
        return {"error": _failure(messages, code)}


def _read(child: subprocess.Popen[str], title: str, progress: Progress) -> dict[str, Any] | None:
    """Pass a process's progress on; returns its final message, or None when it died without one."""
    assert child.stdout is not None
    for line in child.stdout:
        try:
            message = json.loads(line)
        except ValueError:
            continue  # cut off when the process was killed
        if "progress" in message:
            what, done, total = message["progress"]
            progress(f"{title}: {what}", done, total)
        else:
            return message.get("result", message)
    return None


def _end(child: subprocess.Popen[str]) -> None:
    """End a process that is still running, because this one was interrupted or did not wait for its answer."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _failure(messages: IO[str], code: int) -> str:
    messages.seek(0)
    lines = [line.strip() for line in messages if line.strip()]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process ended early ({how}){': ' + lines[-1] if lines else ''}"


# --- numbers ----------------------------------------------------------------------------------------------------


def _row(work: Work, request: TimingRequest, answer: Mapping[str, Any], objectives: int) -> dict[str, Any]:
    host, gpu = answer.get("peak_host_bytes"), answer.get("peak_gpu_bytes")
    here = answer.get("environment")
    return {
        "method": work.method.name,
        "status": "failed" if "error" in answer else "done",
        "error": answer.get("error"),
        "import_seconds": answer.get("import_seconds"),
        "start_seconds": answer.get("start_seconds"),
        "seconds": answer.get("seconds"),
        **measured(answer.get("stamps") or [], objectives),
        "peak_memory_bytes": gpu or host,
        "peak_host_bytes": host,
        "peak_gpu_bytes": gpu,
        "prefs": list(request.prefs),
        "set": list(request.overrides),
        "machine": None if here is None else _machine(here),
    }


def measured(stamps: Sequence[Stamp], objectives: int) -> dict[str, Any]:
    """Return seconds per step (medians) and rates per second, from the times of the lines of metrics.

    A step is timed between two consecutive lines of a phase, so that the first step of each, a warm-up, is left out. A
    rate is a count divided by the seconds of all intervals between lines in which it grew; where a step both samples
    and updates, each rate is over the whole step.

    Args:
        stamps: of the lines, in the order written.
        objectives: scores of a response.
    """
    every = [(a, b) for a, b in pairwise(stamps) if a["run"] == b["run"]]
    steps = [(a, b) for a, b in every if a["phase"] == b["phase"] and b["step"] == a["step"] + 1]
    stages: dict[str, list[float]] = {}
    for a, b in steps:
        stages.setdefault(re.sub(r"-\d+(?=-|$)", "", a["phase"]), []).append(b["at"] - a["at"])
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


def _rate(
    intervals: Sequence[tuple[Stamp, Stamp]], key: Literal["tokens_generated", "tokens_trained", "reward_calls"]
) -> float | None:
    """Return the count per second over the intervals in which it grew; None where there is none."""
    count, seconds = 0, 0.0
    for a, b in intervals:
        before, after = a[key], b[key]
        if before is not None and after is not None and after > before:
            count += after - before
            seconds += b["at"] - a["at"]
    return count / seconds if seconds > 0 else None


def _machine(captured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an environment that the numbers depend on."""
    packages = captured["packages"]
    keys = ("cpu", "cpus", "threads", "memory_bytes", "gpus", "python", "platform")
    return {**{key: captured[key] for key in keys}, "torch": packages["torch"], "moalign": packages["moalign"]}

"""``moalign bench``: what an update step of each method costs on this machine, in time and memory.

Every method trains for a few steps with the batch and the lengths of its recipe, in a process of its own, so that the
peak of memory is its own. Nothing is kept: the runs lie in a temporary folder.
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
from typing import IO, Any

from moalign.comparison.compare import CompareRequest, plan_all
from moalign.comparison.executors import GRACE
from moalign.comparison.jobs import Work
from moalign.comparison.timed import Ask
from moalign.config.card import TaskCard
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.core.progress import Say, silent
from moalign.runs import environment

STEPS = 8
"""Steps of every stage, when nothing else is asked for."""
LEAST = 2
"""A step's time is what lies between two lines of metrics; the first step also warms everything up."""
SAMPLED = ("online_prompts", "augment_prompts")
"""Settings of how many responses a method samples between its stages: cut like steps, as they too say how long."""
LEAST_SAMPLED = 256
"""Of these at least so many stay: a method picks the best of them, and too few leave it nothing to pick."""


@dataclass(frozen=True)
class BenchRequest:
    """What the user asked for."""

    methods: Sequence[str] = ()
    """Empty: those of the task's suite that train."""
    task: str | None = None
    overrides: Sequence[str] = ()
    """``key=value`` as in ``compare``; what is set here is not cut."""
    steps: int = STEPS


@dataclass
class Bench:
    """What was measured."""

    told: dict[str, Any]
    traces: list[str] = field(default_factory=list)
    """Tracebacks of methods that failed, for ``--debug``."""

    @property
    def exit_code(self) -> int:
        """1 when a method failed, else 0."""
        return 1 if self.told["failed"] else 0


def bench(request: BenchRequest, say: Say = silent) -> Bench:
    """Measure the methods one after the other; one that fails is a row of status ``failed`` and the others go on.

    Raises:
        RequestError: every problem of the request at once, before anything is trained.
    """
    if request.steps < LEAST:
        raise RequestError(f"--steps {request.steps}: allowed: {LEAST} or more; a step's time lies between two steps")
    with tempfile.TemporaryDirectory(prefix="moalign-bench-") as results:
        asked = CompareRequest(
            task=request.task, methods=request.methods, overrides=request.overrides, results=Path(results)
        )
        works, card, _ = plan_all(asked)
        if not request.methods:
            works = [work for work in works if work.method.capabilities.trains]
        made = Bench({})
        rows = list(_rows(works, card, request, Path(results), say, made.traces))
    machines = [row.pop("machine") for row in rows]
    made.told = {
        "task": card.name,
        "steps": request.steps,
        "machine": next((one for one in machines if one is not None), None) or _machine(environment.capture()),
        "rows": rows,
        "failed": [row["method"] for row in rows if row["status"] == "failed"],
    }
    return made


def _rows(
    works: Sequence[Work], card: TaskCard, request: BenchRequest, results: Path, say: Say, traces: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row per method; the first process of all makes the base and the normaliser and is not measured."""
    for number, work in enumerate(works):
        ask = _ask(work, card, request.steps, results)
        for prepare in [True, False] if number == 0 else [False]:
            title = "preparing" if prepare else f"{work.method.name} ({number + 1}/{len(works)})"
            answer = _answer(ask, prepare, title, say)
            if "error" in answer:
                break
        shutil.rmtree(results / "runs", ignore_errors=True)  # else the next method would find its experts there
        if "trace" in answer:
            traces.append(answer["trace"])
        yield _row(work, ask, answer, len(card.objectives))


# --- one method -------------------------------------------------------------------------------------------------


def _ask(work: Work, card: TaskCard, steps: int, results: Path) -> Ask:
    """Return what a method's process is asked: its recipe with fewer steps, and one preference where each costs."""
    assert work.plan is not None
    resolved = work.plan.resolved
    given = [str(text) for text in resolved.as_given["set"]]
    named = {text.partition("=")[0].strip().removeprefix("config.") for text in given}
    limits = {"steps": steps, **dict.fromkeys(SAMPLED, max(LEAST_SAMPLED, 2 * card.generation.batch_size))}
    cuts = [f"config.{key}={value}" for key, value in shortened(resolved.config, limits) if key not in named]
    count = len(card.objectives)
    one = [] if work.method.capabilities.one_policy else [",".join([repr(1 / count)] * count)]
    task = str(resolved.as_given["task"])
    return Ask(work.method.name, task, one, [*cuts, *given], str(results), 0.0)


def shortened(config: Strict, limits: Mapping[str, int], above: str = "") -> Iterator[tuple[str, int]]:
    """Yield (dotted key, value) of the settings that make a method short: it is all that is changed of its recipe.

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


def _answer(ask: Ask, prepare: bool, title: str, say: Say) -> dict[str, Any]:
    """Let a process answer; returns what it told, or ``{"error": ...}`` when it failed or died."""
    asked = Ask(**{**vars(ask), "started": time.time(), "prepare": prepare})
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as messages:
        child = subprocess.Popen(
            [sys.executable, "-m", "moalign.comparison.timed", asked.text()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
        )
        try:
            answer = _read(child, title, say)
            code = child.wait()
        finally:
            _end(child)
        if answer is not None:
            return answer
        return {"error": _last_words(messages, code)}


def _read(child: subprocess.Popen[str], title: str, say: Say) -> dict[str, Any] | None:
    """Pass a process's progress on; returns its last word, or None when it died without one."""
    assert child.stdout is not None
    for line in child.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut
        if "say" in said:
            what, done, total = said["say"]
            say(f"{title}: {what}", done, total)
        else:
            return said.get("told", said)
    return None


def _end(child: subprocess.Popen[str]) -> None:
    """End a process that is still there: it was interrupted with us, or its answer was not waited for."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _last_words(messages: IO[str], code: int) -> str:
    messages.seek(0)
    lines = [line.strip() for line in messages if line.strip()]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"its process ended early ({how}){': ' + lines[-1] if lines else ''}"


# --- numbers ----------------------------------------------------------------------------------------------------


def _row(work: Work, ask: Ask, answer: Mapping[str, Any], objectives: int) -> dict[str, Any]:
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
        "prefs": list(ask.prefs),
        "set": list(ask.overrides),
        "machine": None if here is None else _machine(here),
    }


def measured(stamps: Sequence[Mapping[str, Any]], objectives: int) -> dict[str, Any]:
    """Return what the lines of metrics tell: seconds a step (medians), and rates per second.

    A step's time is what lies between two neighbouring lines of a phase, so the first step of each, which warms up, is
    left out. A rate is a count over the seconds of all stretches between two lines in which there was any: where
    sampling and updates are one step they share its seconds.

    Args:
        stamps: per line ``run``, ``phase``, ``step``, ``at`` (seconds) and the cost so far (``tokens_generated``,
            ``tokens_trained``, ``reward_calls``; None where the line has none), in the order written.
        objectives: scores of a response.
    """
    every = [(a, b) for a, b in pairwise(stamps) if a["run"] == b["run"]]
    steps = [(a, b) for a, b in every if a["phase"] == b["phase"] and b["step"] == a["step"] + 1]
    stages: dict[str, list[float]] = {}
    for a, b in steps:
        stages.setdefault(re.sub(r"-\d+(?=-|$)", "", a["phase"]), []).append(b["at"] - a["at"])
    times = [seconds for found in stages.values() for seconds in found]
    scored = _rate(every, "reward_calls")
    return {
        "seconds_per_step": statistics.median(times) if times else None,
        "steps_measured": len(times),
        "stages": {name: statistics.median(found) for name, found in stages.items()},
        "tokens_generated_per_second": _rate(every, "tokens_generated"),
        "tokens_trained_per_second": _rate(steps, "tokens_trained"),
        "responses_scored_per_second": None if scored is None else scored / objectives,
    }


def _rate(stretches: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], key: str) -> float | None:
    """Return the count per second over the stretches in which there was any; None where there was none."""
    count, seconds = 0, 0.0
    for a, b in stretches:
        if a[key] is not None and b[key] is not None and b[key] > a[key]:
            count += b[key] - a[key]
            seconds += b["at"] - a["at"]
    return count / seconds if seconds > 0 else None


def _machine(here: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of an environment the numbers depend on."""
    packages = here["packages"]
    kept = ("cpu", "cpus", "threads", "memory_bytes", "gpus", "python", "platform")
    return {**{key: here[key] for key in kept}, "torch": packages["torch"], "moalign": packages["moalign"]}

"""The runs of a comparison as jobs: trained here one after another or in processes of their own, then evaluated.

A job that fails is recorded as failed and the others go on. Runs are idempotent: the same command resumes a comparison
that was interrupted.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.comparison import executors, slots
from moalign.config import find, yaml_lines
from moalign.config.card import TaskCard
from moalign.core import preferences
from moalign.core.errors import MoalignError, RequestError, WorkError
from moalign.core.preferences import Preference
from moalign.core.progress import Progress
from moalign.evaluation import evaluate
from moalign.evaluation.evaluate import Evaluation
from moalign.experiment import train
from moalign.experiment.train import Plan
from moalign.methods.base import Method
from moalign.runs.run import Run
from moalign.tasks.task import Task
from moalign.training.job import RunContext

HEAVY = ("torch", "transformers", "peft")
"""Imported before the first run, so that their import does not count as its time."""


@dataclass(eq=False)
class Work:
    """One run of a comparison: planned or found, then evaluated, or failed."""

    method: Method
    seed: int
    identity: Mapping[str, Any]
    """Hashed to the run's identifier."""
    folder: Path
    command: list[str]
    """The arguments of ``moalign`` that make this run."""
    plan: Plan | None = None
    run: Run | None = None
    evaluation: Evaluation | None = None
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """lo and hi of the normaliser that its scores were made with."""
    table: str | None = None
    """Name of the table of its answers, once it is evaluated."""
    reported: Sequence[Mapping[str, Any]] = ()
    """Numbers from papers that its recipe quotes."""
    error: str | None = None
    trace: str | None = None
    """The traceback of ``error``, for ``--debug``."""

    @property
    def name(self) -> str:
        """The run's name in progress messages."""
        return f"{self.method.name} seed {self.seed}"

    @property
    def summary(self) -> dict[str, Any]:
        """The run as listed in a row of the comparison."""
        return {
            "run": str(self.folder),
            "run_id": self.folder.name,
            "seed": self.seed,
            "status": "done" if self.evaluation is not None else "failed",
            "command": shlex.join(["moalign", *self.command]),
            "error": self.error,
            "made": None if self.run is None else _origin(self.run.record.environment),
        }


def _origin(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a run's environment that its results may depend on."""
    packages = environment.get("packages") or {}
    origin = {key: environment.get(key) for key in ("commit", "dirty", "python", "cpu", "gpus")}
    return {**origin, "moalign": packages.get("moalign"), "torch": packages.get("torch")}


def planned(plan: Plan) -> Work:
    """Return the work of a checked request."""
    command = arguments(plan.as_given, plan.seed, plan.given, plan.request.results)
    reported = [number.model_dump() for number in plan.recipe.reported]
    return Work(plan.method, plan.seed, plan.identity, plan.folder, command, plan=plan, reported=reported)


def arguments(as_given: Mapping[str, Any], seed: int, prefs: Sequence[Preference] | None, results: Path) -> list[str]:
    """Return the ``moalign`` arguments that ask for a run again."""
    method, task = str(as_given["method"]), str(as_given["task"])
    parts = ["train", method, "--task", task]
    recipe = as_given.get("recipe_file")
    if recipe is not None and recipe != _default_recipe(task, method):
        parts += ["--recipe", str(recipe)]
    own = (as_given.get("recipe") or {}).get("prefs")
    if prefs and [list(row) for row in prefs] != own:
        parts += [part for row in prefs for part in ("--prefs", ",".join(map(repr, row)))]
    parts += [part for text in as_given.get("set") or [] for part in ("--set", str(text))]
    return [*parts, "--seed", str(seed), "--results", str(results)]


def _default_recipe(task: str, method: str) -> str | None:
    try:
        path = find.find_recipe_file(task, method)
    except RequestError:  # the task was moved since, so the recipe has to be named
        return None
    return None if path is None else yaml_lines.shown(path)


# --- training ---------------------------------------------------------------------------------------------------


def train_missing(works: Sequence[Work], executor: str, jobs: int | None, progress: Progress) -> None:
    """Train what is not trained yet, ``jobs`` at a time.

    Args:
        executor: one of :data:`moalign.comparison.executors.NAMES`.
        jobs: None: what :mod:`moalign.comparison.slots` says of this machine; with ray all that its cluster has room
            for.
    """
    missing = [work for work in works if not _finished(work)]
    if not missing:
        return
    task = _prepare(missing[0], progress)
    if executor == "local" and jobs is None:
        jobs = slots.requested() or slots.slots(task)
    if executor == "local" and (jobs == 1 or len(missing) == 1):
        train_here(missing, progress)
    else:
        train_apart(missing, executor, jobs, progress)


def train_here(works: Sequence[Work], progress: Progress) -> None:
    """Train one run after another in this process (they share its imports)."""
    for number, work in enumerate(works, start=1):
        with _failure_kept(work):
            assert work.plan is not None
            fresh_peak()
            work.run, _ = train.train(work.plan, prefixed(progress, f"{work.name} ({number}/{len(works)})"))
        work.plan = None  # frees its task and model before the next one loads its own
        gc.collect()


def train_apart(works: Sequence[Work], executor: str, jobs: int | None, progress: Progress) -> None:
    """Train runs in other processes, ``jobs`` at a time (None: all that find room).

    A process that crashes or is killed fails its own run only. An interruption is passed on to all of them.
    """
    with executors.opened(executor) as pool, ThreadPoolExecutor(max_workers=jobs or len(works)) as threads:
        waiting = {threads.submit(pool.run, work.command, prefixed(progress, work.name)): work for work in works}
        try:
            progress("training", 0, len(works))
            for number, future in enumerate(as_completed(waiting), start=1):
                work = waiting[future]
                with _failure_kept(work):
                    _collect(work, *future.result())
                progress(f"training: {work.name} {'failed' if work.error else 'done'}", number, len(works))
        except BaseException:
            pool.stop()
            threads.shutdown(cancel_futures=True)
            raise


def _collect(work: Work, code: int, messages: str) -> None:
    """Take over the run that a process made, or raise WorkError with the process's messages."""
    assert work.plan is not None
    run = work.plan.existing_run
    work.plan = None
    if code == 0 and run is not None and run.record.status == "done":
        work.run = run
        return
    if code == 0:
        raise WorkError(f"its process ended well, but left no finished run in {work.folder}; did a file of its change?")
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
    if run is not None and run.record.error:
        errors = [run.record.error]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    raise WorkError("; ".join(errors) if errors else f"its process ended without a word ({how})")


def _finished(work: Work) -> bool:
    """Whether the run is there already; it is then taken over."""
    if work.run is None and work.plan is not None:
        run = work.plan.existing_run
        if run is not None and run.record.status == "done":
            work.run, work.plan = run, None
    return work.run is not None


def _prepare(work: Work, progress: Progress) -> Task:
    """Make what all methods share, so that it counts as the cost of none: imports, base, normaliser."""
    assert work.plan is not None
    task = work.plan.task
    task.progress = prefixed(progress, "preparing")
    for name in HEAVY:
        importlib.import_module(name)
    _ = task.normaliser
    task.__dict__.pop("language_model", None)  # loaded again where it is needed: no two copies in memory
    gc.collect()
    return task


def fresh_peak() -> None:
    """Reset the peak of memory, so that a run's peak does not include the runs before it in this process.

    Works on Linux and for CUDA; elsewhere a run's peak includes that of the runs before it.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


# --- evaluation -------------------------------------------------------------------------------------------------


def evaluate_all(
    works: Sequence[Work],
    requested: Sequence[Preference] | None,
    progress: Progress,
    keep: bool = True,
    samples: int | None = None,
) -> None:
    """Evaluate every run that was trained; what was evaluated before is read back.

    ``samples``: answers to each prompt; None: the task card's.

    With ``keep`` a failure is recorded for its run and the others go on; without, a RequestError (a named run that
    cannot be evaluated) is raised.
    """
    trained = [work for work in works if work.run is not None]
    for number, work in enumerate(trained, start=1):
        with _failure_kept(work, RequestError if not keep else ()):
            assert work.run is not None
            progress = prefixed(progress, f"{work.name} ({number}/{len(trained)})")
            method, context = train.context_of(work.run, results_of(work.run), progress)
            vectors = evaluate.preferences_for(method, context, _served(method, context, requested))
            work.evaluation = evaluate.evaluate(method, context, vectors, progress, samples)
            work.table = evaluate.names(context.task, vectors, work.evaluation.told["samples"])[1]
            normaliser = context.task.judge_normaliser
            work.bounds = tuple(normaliser.lo), tuple(normaliser.hi)
        gc.collect()


def not_evaluated(works: Sequence[Work], card: TaskCard) -> str | None:
    """Return an error message when runs lack an evaluation on the task's grid (or their own vectors), else None.

    It names all of them, with the command that evaluates them.
    """
    lacking = []
    for work in works:
        assert work.run is not None
        file, _ = _evaluation_of(work, work.run, card, None)
        if not (work.run.path / f"{file}.json").is_file():
            lacking.append(str(work.run.path))
    if not lacking:
        return None
    who = f"run {lacking[0]}: it is" if len(lacking) == 1 else f"runs {', '.join(lacking)}: they are"
    command = shlex.join(["moalign", "eval", *lacking])
    return f"{who} finished but not evaluated; compare reads the runs that it is given: evaluate first, {command}"


def lost_answers(
    work: Work, card: TaskCard, requested: Sequence[Preference] | None, samples: int | None = None
) -> str | None:
    """Return an error message when a finished run has an evaluation without its table of answers, else None."""
    run = work.run if work.run is not None else work.plan.existing_run if work.plan is not None else None
    if run is None:
        return None
    file, table = _evaluation_of(work, run, card, requested, samples)
    if not (run.path / f"{file}.json").is_file() or (run.path / f"{table}.parquet").is_file():
        return None
    return (
        f"{run.path / table}.parquet: missing, and {file}.json beside it was made from it; put it back, or delete "
        f"{file}.json to have the run evaluated again"
    )


def _evaluation_of(
    work: Work, run: Run, card: TaskCard, requested: Sequence[Preference] | None, samples: int | None = None
) -> tuple[str, str]:
    """Return the names (without suffix) of a run's evaluation and of its answers, without loading a model."""
    grid = preferences.grid_of(len(card.objectives), card.grid)
    trained = [tuple(row) for row in run.record.preferences or grid]
    able = work.method.capabilities.steerable or (requested is not None and set(requested) <= set(trained))
    return evaluate.names_on(grid, (requested or grid) if able else trained, samples)


def _served(method: Method, context: RunContext, requested: Sequence[Preference] | None) -> Sequence[Preference] | None:
    """Return the preferences to evaluate: None (the method's own) when it cannot serve all that are requested."""
    if requested is None or method.capabilities.steerable or set(requested) <= set(context.preferences):
        return requested
    return None


def results_of(run: Run) -> Path:
    """Return the results folder that a run lies in (``<results>/runs/<task>/<method>/<run-id>``)."""
    return run.path.parents[3]


@contextlib.contextmanager
def _failure_kept(work: Work, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Record an exception as the work's failure, so that the others go on; interruptions and ``passing`` are raised."""
    try:
        yield
    except passing:
        raise
    except Exception as error:
        work.error = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        work.trace = traceback.format_exc()


def prefixed(progress: Progress, prefix: str) -> Progress:
    """Return a ``progress`` that puts ``prefix: `` before every message."""

    def report(what: str, done: int, total: int) -> None:
        progress(f"{prefix}: {what}", done, total)

    return report

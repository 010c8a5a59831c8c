"""The runs of a comparison as jobs: trained here one after another or in processes of their own, then evaluated.

A job that fails is recorded as failed and the others go on. Runs are idempotent: the same command resumes a comparison
that was interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moalign.comparison import executors
from moalign.comparison.result import RunSummary
from moalign.config.card import TaskCard
from moalign.config.recipe import ReportedSpec
from moalign.core import foreign, preferences
from moalign.core.errors import MoalignError, RequestError, WorkError
from moalign.core.memory import release
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, prefixed
from moalign.core.text import command as typed
from moalign.evaluation import evaluate
from moalign.evaluation.evaluate import Evaluation
from moalign.evaluation.result import EvalResult
from moalign.experiment import train
from moalign.experiment.train import Plan
from moalign.methods.base import Method
from moalign.report.figures import condense
from moalign.rewards.judge import total
from moalign.rewards.panel import usage_of
from moalign.runs.meter import fresh_peak
from moalign.runs.record import again
from moalign.runs.run import Run
from moalign.runs.store import results_of

HEAVY = ("torch", "transformers", "peft")
"""Imported before the first run, so that their import does not count as its time."""


@dataclass(eq=False)
class ComparedRun:
    """One run of a comparison: planned or finished before, then evaluated, or failed."""

    method: Method
    seed: int
    identity: Mapping[str, Any]
    """Hashed to the run's identifier."""
    folder: Path
    command: list[str]
    """The arguments of ``moalign`` that make this run."""
    plan: Plan | None = None
    """Until the run is trained."""
    run: Run | None = None
    """Once it is finished."""
    evaluation: Evaluation | None = None
    bounds: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """lo and hi of the normaliser that its scores were made with."""
    table: str | None = None
    """Name of the table of its answers, once it is evaluated."""
    asked: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What LLM judges were asked while the comparison was prepared with this run's task."""
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
    def known(self) -> Run | None:
        """The run, finished or as it was left; None: the request was not made before."""
        return self.run or (self.plan.existing_run if self.plan is not None else None)

    def take_over(self) -> bool:
        """Take the planned run over where it is finished already; return whether there is a finished run."""
        if self.run is None and (left := self.known) is not None and left.record.status == "done":
            self.run, self.plan = _readable(left), None
        return self.run is not None

    @property
    def summary(self) -> RunSummary:
        """The run as listed in an entry of the comparison."""
        return RunSummary(
            run=str(self.folder),
            run_id=self.folder.name,
            seed=self.seed,
            status="done" if self.evaluation is not None else "failed",
            command=typed(*self.command),
            error=self.error,
            made=None if self.run is None else _made(self.run),
        )


def planned(plan: Plan) -> ComparedRun:
    """Return the run of a checked request."""
    command = again(plan.as_given, plan.seed, plan.given, plan.request.results)
    reported = [number.model_dump() for number in plan.recipe.reported]
    return ComparedRun(plan.method, plan.seed, plan.identity, plan.folder, command, plan=plan, reported=reported)


def existing(run: Run, results: Path) -> ComparedRun:
    """Return a run that is finished; ``results`` as :func:`~moalign.runs.store.results_of` takes it."""
    record, method = run.record, train.method_of(run)
    with train.damaged(run):
        command = again(record.as_given, record.seed, record.preferences, results_of(run.path, results))
        # In older records it is an empty mapping.
        reported = [ReportedSpec.model_validate(number).model_dump() for number in record.recipe.get("reported") or []]
    return ComparedRun(method, record.seed, record.identity, run.path, command, run=_readable(run), reported=reported)


def _readable(run: Run) -> Run:
    """Return a finished run; RequestError where what a comparison reports of it, beside its evaluation, is damaged."""
    with train.damaged(run):
        _made(run)
        condense(run.metrics())
    return run


def _made(run: Run) -> dict[str, Any]:
    """Return where a run was trained."""
    environment = run.record.environment
    packages = environment.get("packages") or {}
    made = {key: environment.get(key) for key in ("commit", "dirty", "python", "cpu", "gpus")}
    return made | {key: packages.get(key) for key in ("moalign", "torch")}


# --- training ---------------------------------------------------------------------------------------------------


def train_missing(runs: Sequence[ComparedRun], executor: str, jobs: int | None, progress: Progress) -> None:
    """Train what is not trained yet, ``jobs`` at a time.

    Args:
        executor: one of :data:`moalign.comparison.executors.NAMES`.
        jobs: None: what :mod:`moalign.comparison.executors` says of this machine; with ray all that its cluster has
            room for.
    """
    missing = [run for run in runs if not run.take_over()]
    if not missing:
        return
    by_default = _prepare(missing[0], progress)
    if executor == "local" and jobs is None:
        jobs = executors.jobs_requested() or by_default
    try:
        if executor == "local" and (jobs == 1 or len(missing) == 1):
            train_here(missing, progress)
        else:
            train_apart(missing, executor, jobs, progress)
    finally:
        _note_asked(missing)


def _prepare(run: ComparedRun, progress: Progress) -> int:
    """Make what all methods share, so that it counts as the cost of none: imports, base, normaliser.

    Returns how many runs this machine trains at a time. No model stays in memory: each run loads its own, here or in
    another process.
    """
    assert run.plan is not None
    task = run.plan.task
    task.progress = prefixed(progress, "preparing")
    for name in HEAVY:
        importlib.import_module(name)
    _ = task.normaliser
    if any(spec.kind == "judge" for spec in task.card.objectives):
        run.asked = usage_of(task.panel)
    for models in ("language_model", "panel", "gold_panel", "judge_panel"):
        task.__dict__.pop(models, None)
    jobs = executors.jobs_by_default(task)
    release()
    return jobs


def _note_asked(runs: Sequence[ComparedRun]) -> None:
    """Add what judges were asked in preparation to the first run that was trained, as if it had been alone."""
    first, asked = next((run.run for run in runs if run.run is not None), None), runs[0].asked
    if first is None or not any(usage["verdicts"] for usage in asked.values()):
        return
    with first.lock(wait=True):
        judges = first.record.notes.get("judges", {})
        added = {name: total(usage, judges.get(name, {})) for name, usage in asked.items()}
        first.record.notes = {**first.record.notes, "judges": {**judges, **added}}
        first.save_record()


def train_here(runs: Sequence[ComparedRun], progress: Progress) -> None:
    """Train one run after another in this process (they share its imports)."""
    for number, run in enumerate(runs, start=1):
        with _failure_kept(run):
            assert run.plan is not None
            fresh_peak()
            run.run, _ = train.train(run.plan, prefixed(progress, f"{run.name} ({number}/{len(runs)})"))
        if run.plan is not None:
            run.plan.task.close()
        run.plan = None  # frees its task and model before the next one loads its own
        release()


def train_apart(runs: Sequence[ComparedRun], executor: str, jobs: int | None, progress: Progress) -> None:
    """Train runs in other processes, ``jobs`` at a time (None: all that find room).

    A process that crashes or is killed fails its own run only. An interruption is passed on to all of them.
    """
    with executors.opened(executor) as pool, ThreadPoolExecutor(max_workers=jobs or len(runs)) as threads:
        waiting = {threads.submit(pool.run, run.command, prefixed(progress, run.name)): run for run in runs}
        try:
            progress("training", 0, len(runs))
            for number, future in enumerate(as_completed(waiting), start=1):
                run = waiting[future]
                with _failure_kept(run):
                    _collect(run, *future.result())
                progress(f"training: {run.name} {'failed' if run.error else 'done'}", number, len(runs))
        except BaseException:
            pool.stop()
            threads.shutdown(cancel_futures=True)
            raise


def _collect(run: ComparedRun, code: int, messages: str) -> None:
    """Take over the run that a process made, or raise WorkError with the process's messages."""
    assert run.plan is not None
    left, run.plan = run.plan.existing_run, None
    if code == 0 and left is not None and left.record.status == "done":
        run.run = left
        return
    if code == 0:
        raise WorkError(f"its process ended well, but left no finished run in {run.folder}; did a file of its change?")
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors and code > 0:  # what a killed process wrote last says nothing of its end
        errors = lines[-1:]
    if left is not None and left.record.error:
        errors = [left.record.error]
    raise WorkError("; ".join(errors) if errors else f"its process ended without a word ({executors.ending(code)})")


# --- evaluation -------------------------------------------------------------------------------------------------


def evaluate_all(
    runs: Sequence[ComparedRun],
    requested: Sequence[Preference] | None,
    progress: Progress,
    results: Path,
    keep: bool = True,
    samples: int | None = None,
) -> None:
    """Evaluate every run that was trained; what was evaluated before is read back.

    Args:
        results: as :func:`~moalign.runs.store.results_of` takes it.
        keep: record a failure for its run and go on; else a RequestError (a named run that cannot be evaluated) is
            raised.
        samples: answers to each prompt; None: the task card's.
    """
    trained = [run for run in runs if run.run is not None]
    for number, run in enumerate(trained, start=1):
        with _failure_kept(run, RequestError if not keep else ()):
            report = prefixed(progress, f"{run.name} ({number}/{len(trained)})")
            _evaluate(run, requested, report, results, samples)
        release()


def _evaluate(
    run: ComparedRun,
    requested: Sequence[Preference] | None,
    progress: Progress,
    results: Path,
    samples: int | None,
) -> None:
    """Evaluate a run. A function of its own: nothing here holds its models once it returns."""
    assert run.run is not None
    method, context = train.context_of(run.run, results_of(run.run.path, results), progress)
    served = _served(method, context.preferences, context.task.grid, requested)
    with contextlib.closing(context.task):
        run.evaluation = evaluate.evaluate(method, context, served, progress, samples)
        run.table = evaluate.names(context.task, served, run.evaluation.result.samples)[1]
        normaliser = context.task.judge_normaliser
        run.bounds = tuple(normaliser.lo), tuple(normaliser.hi)


def _served(
    method: Method, trained: Sequence[Preference], grid: Sequence[Preference], requested: Sequence[Preference] | None
) -> list[Preference]:
    """Return the preferences to evaluate: those requested (None: the grid), or those that the run was trained on where
    its method serves no others.
    """
    able = method.capabilities.steerable or (requested is not None and set(requested) <= set(trained))
    return list((requested or grid) if able else trained)


def not_evaluated(runs: Sequence[ComparedRun], card: TaskCard) -> str | None:
    """Return an error message when runs lack an evaluation on the task's grid (or their own vectors), else None.

    It names all of them, with the command that evaluates them.
    """
    lacking = [str(run.folder) for run in runs if not _evaluation_files(run, card, None, None)[0].is_file()]
    if not lacking:
        return None
    who = f"run {lacking[0]}: it is" if len(lacking) == 1 else f"runs {', '.join(lacking)}: they are"
    first = typed("eval", *lacking)
    return f"{who} finished but not evaluated; compare reads the runs that it is given: evaluate first, {first}"


def unusable_evaluation(
    run: ComparedRun, card: TaskCard, requested: Sequence[Preference] | None, samples: int | None
) -> str | None:
    """Return an error message when a run's evaluation is damaged or without its table of answers, else None."""
    result, answers = _evaluation_files(run, card, requested, samples)
    if not result.is_file():
        return None
    try:
        EvalResult.load(result)
    except RequestError as error:
        return str(error)
    if answers.is_file():
        return None
    return (
        f"{answers}: missing, and {result.name} beside it was made from it; put it back, or delete {result.name} to "
        "have the run evaluated again"
    )


def _evaluation_files(
    run: ComparedRun, card: TaskCard, requested: Sequence[Preference] | None, samples: int | None
) -> tuple[Path, Path]:
    """Return the paths of a run's evaluation and of its answers, whether there are any or not; no model is loaded."""
    grid = preferences.grid_of(len(card.objectives), card.grid)
    known = run.known
    trained = [tuple(row) for row in (known.record.preferences if known is not None else None) or grid]
    file, table = evaluate.names_on(grid, _served(run.method, trained, grid, requested), samples)
    return run.folder / f"{file}.json", run.folder / f"{table}.parquet"


@contextlib.contextmanager
def _failure_kept(run: ComparedRun, passing: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Record an exception as the run's failure, so that the others go on; interruptions and ``passing`` are raised."""
    try:
        yield
    except foreign.STOPS:
        raise
    except passing:
        raise
    except BaseException as error:  # a method's sys.exit() too
        run.error = str(error) if isinstance(error, MoalignError) else f"{type(error).__name__}: {error}"
        run.trace = traceback.format_exc()

"""``moalign compare``: train what is missing, evaluate all runs alike, and say which method wins and how certainly.

Conditions are equal or the comparison is refused: all runs have the same task card, evaluation prompts and sampling
seeds, and their costs are counted in the same units.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moalign.comparison import artefacts, entries, executors, jobs, slots
from moalign.comparison.artefacts import OutputPaths
from moalign.comparison.jobs import Work
from moalign.comparison.ranking import ranking
from moalign.config import load, overrides
from moalign.config.card import TaskCard
from moalign.config.recipe import Recipe, ReportedSpec
from moalign.core import preferences
from moalign.core.errors import RequestError, unknown
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.experiment.train import DEFAULT_TASK, TrainRequest, context_of, plan
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.report import verdict
from moalign.runs import environment
from moalign.runs import store as stores
from moalign.runs.run import Run
from moalign.runs.store import RunStore


@dataclass(frozen=True)
class CompareRequest:
    """The user's request: finished runs, or methods on a task."""

    runs: Sequence[str] = ()
    """Folders or identifiers of finished, evaluated runs; empty: train and evaluate what is missing."""
    task: str | None = None
    methods: Sequence[str] | None = None
    """None or empty: the task card's suite."""
    seeds: int = 1
    """Training seeds per method: the recipe's own and those that follow it."""
    grid: int | None = None
    """Size of the evaluation grid; None: the task card's."""
    samples: int | None = None
    """Answers to each evaluation prompt at each preference; None: as many as the task card says."""
    jobs: int | None = None
    """Runs trained at a time, other than 1: in other processes. None: see :mod:`moalign.comparison.slots`; with ray all
    that find room."""
    executor: str = "local"
    """Where runs are trained: one of :data:`moalign.comparison.executors.NAMES`."""
    overrides: Sequence[str] = ()
    """``key=value``, for every method that has the setting; ``METHOD.key=value`` for one method."""
    results: Path = Path("results")
    figure: Path | None = None
    markdown: Path | None = None
    html: Path | None = None


@dataclass
class Comparison:
    """The result."""

    told: dict[str, Any]
    """The content of ``compare.json``."""
    traces: list[str] = field(default_factory=list)
    """Tracebacks of runs that failed, for ``--debug``."""

    @property
    def exit_code(self) -> int:
        """1 when a run failed, else 0."""
        return 1 if self.told["failed"] else 0


def compare(request: CompareRequest, progress: Progress = silent) -> Comparison:
    """Compare methods or runs; writes JSON, figure and Markdown.

    Runs that fail stay visible as rows of status ``failed`` (or ``partial``); the others go on.

    Raises:
        RequestError: every problem of the request at once, before anything is trained: unknown names, settings that
            no method has, runs of different task cards or without evaluation, paths that cannot be written.
    """
    works, card, card_hash = _named_runs(request) if request.runs else plan_all(request)
    requested = _requested_grid(request, card)
    samples = _samples(request, card)
    _refuse_lost_answers(works, card, requested, samples)
    paths = _output_paths(request, works, card, card_hash)
    jobs.train_missing(works, request.executor, request.jobs, progress)
    jobs.evaluate_all(works, requested, progress, keep=not request.runs, samples=samples)
    _refuse_not_finite(works, card)
    _same_bounds(works)
    grid = requested or preferences.grid_of(len(card.objectives), card.grid)
    record = _record(request, works, card, card_hash, grid)
    artefacts.write(record, paths, works, card)
    return Comparison(record, [work.trace for work in works if work.trace])


# --- what is compared -------------------------------------------------------------------------------------------


def plan_all(request: CompareRequest) -> tuple[list[Work], TaskCard, str]:
    """Check the request for every method and seed; nothing is trained yet."""
    problems = [
        f"--{name} {number}: allowed: 1 or more"
        for name, number in (("seeds", request.seeds), ("jobs", request.jobs))
        if number is not None and number < 1
    ]
    problems += executors.problems(request.executor)
    try:
        slots.requested()
    except RequestError as error:
        problems += error.problems
    methods: dict[str, Method] = {}
    try:
        for name in _names(request):
            methods[name] = registry.get(name)
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(*problems)
    works = []
    given = _overrides(request.overrides, methods)
    for name, method in methods.items():
        try:
            works += list(_plans(request, method, given[name]))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    busy = [work.plan.existing_run for work in works if work.plan is not None and work.plan.existing_run is not None]
    problems += [run.busy() for run in busy if run.status == "running"]
    if problems:
        raise RequestError(*problems)
    first = works[0].plan
    assert first is not None
    return works, first.card, first.task.hash


def _names(request: CompareRequest) -> list[str]:
    """Return the requested methods, or the card's suite; RequestError names all unknown ones at once."""
    names = list(request.methods or ())
    if not names:
        task = request.task or DEFAULT_TASK
        names = load.load_card(task, [text for text in request.overrides if text.lstrip().startswith("task.")]).suite
        if not names:
            raise RequestError(f"--task {task}: its card names no suite; name the methods with --methods a,b")
    known = registry.names()
    wrong = [str(unknown("method", name, known)) for name in names if name not in known]
    if wrong:
        raise RequestError(*dict.fromkeys(wrong))
    return list(dict.fromkeys(names))


def _plans(request: CompareRequest, method: Method, given: Sequence[str]) -> Iterator[Work]:
    """Yield the work of one method over its seeds; one seed for a method in which nothing is trained."""
    able = method.capabilities
    train_request = TrainRequest(
        method.name,
        task=request.task,
        # A method that answers only for the preferences it was trained on is trained on those of the evaluation.
        grid=None if able.steerable else request.grid,
        overrides=given,
        results=request.results,
    )
    first = plan(train_request)
    yield jobs.planned(first)
    for more in range(1, request.seeds if able.trains else 1):
        yield jobs.planned(plan(replace(train_request, seed=first.seed + more)))


def _overrides(texts: Sequence[str], methods: Mapping[str, Method]) -> dict[str, list[str]]:
    """Assign the ``--set`` options to methods.

    ``METHOD.key=value`` goes to that method; a key of the card or of every recipe goes to all; a method's own
    setting goes to the methods that have it. A setting that none has goes to all, whose plans then refuse it.
    """
    given: dict[str, list[str]] = {name: [] for name in methods}
    problems: list[str] = []
    for text in texts:
        try:
            keys, _ = overrides.parse(text)
        except RequestError as error:
            problems += error.problems
            continue
        if keys[0] in methods and len(keys) > 1:
            given[keys[0]].append(text.partition(".")[2])
            continue
        own = keys[1] if keys[0] == "config" and len(keys) > 1 else keys[0]
        shared = keys[0] == "task" or (keys[0] != "config" and keys[0] in Recipe.model_fields)
        fitting = [name for name, method in methods.items() if own in method.Config.model_fields]
        for name in methods if shared or not fitting else fitting:
            given[name].append(text)
    if problems:
        raise RequestError(*problems)
    return given


def _named_runs(request: CompareRequest) -> tuple[list[Work], TaskCard, str]:
    """Return the named runs; RequestError for those that are not finished, not evaluated or not of one task card."""
    refused = {
        "--methods": bool(request.methods),
        "--seeds": request.seeds != 1,
        "--set": bool(request.overrides),
    }
    problems = [
        f"{option}: finished runs are named, so nothing is trained; leave out the runs or {option}"
        for option, given in refused.items()
        if given
    ]
    problems += executors.problems(request.executor)
    store, named = RunStore(request.results), []
    for name in request.runs:
        try:
            run = store.find(name)
        except RequestError as error:
            problems += error.problems
            continue
        if run.status != "done":
            problems.append(f"run {run.path}: it is {run.status}, not done; finish it with its train command first")
        named.append(run)
    if problems:
        raise RequestError(*problems)
    runs = list({run.path.resolve(): run for run in named}.values())
    _same_card(runs)
    for run in runs:
        try:
            context_of(run, jobs.results_of(run))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)
    if request.task is not None and request.task != runs[0].record.task:
        raise RequestError(f"--task {request.task}: the runs named are of task {runs[0].record.task}; leave out --task")
    card = TaskCard.model_validate(runs[0].record.recipe["card"])
    works = [_of_run(run) for run in runs]
    lacking = jobs.not_evaluated(works, card)
    if lacking is not None:
        raise RequestError(lacking)
    return works, card, runs[0].record.card_hash


def _of_run(run: Run) -> Work:
    record = run.record
    command = jobs.arguments(record.as_given, record.seed, record.preferences, jobs.results_of(run))
    # In older records it is an empty mapping.
    reported = [ReportedSpec.model_validate(number).model_dump() for number in record.recipe.get("reported") or []]
    method = registry.get(record.method)
    return Work(method, record.seed, record.identity, run.path, command, run=run, reported=reported)


def _same_card(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        if other.record.card_hash != first.record.card_hash:
            names = [f"{run.path} is of {run.record.task} (card {run.record.card_hash})" for run in (first, other)]
            differ = _differences(first.record.recipe["card"], other.record.recipe["card"])
            where = f"; they differ in {', '.join(differ)}" if differ else "; their base models or data differ"
            raise RequestError(
                f"runs of different task cards cannot be compared: {names[0]}, {names[1]}{where}; "
                "train both on one card"
            )


def _differences(first: Mapping[str, Any], other: Mapping[str, Any], most: int = 4) -> list[str]:
    """Return the keys in which two cards differ, without those that do not affect results."""
    idle = ("description", "suite")
    keys = [key for key in {**first, **other} if key not in idle and first.get(key) != other.get(key)]
    more = [f"{len(keys) - most} more"] if len(keys) > most else []
    return keys[:most] + more


def _refuse_lost_answers(
    works: Sequence[Work], card: TaskCard, requested: Sequence[Preference] | None, samples: int | None
) -> None:
    """Raise RequestError for runs whose answers were deleted: they are needed for pairing."""
    problems = [lost for work in works if (lost := jobs.lost_answers(work, card, requested, samples)) is not None]
    if problems:
        raise RequestError(*problems)


def _requested_grid(request: CompareRequest, card: TaskCard) -> list[Preference] | None:
    return None if request.grid is None else preferences.grid_of(len(card.objectives), request.grid)


def _samples(request: CompareRequest, card: TaskCard) -> int | None:
    """Return the requested number of answers to each prompt, None where it is the card's."""
    return None if request.samples == card.evaluation.samples else request.samples


def _refuse_not_finite(works: Sequence[Work], card: TaskCard) -> None:
    """Raise RequestError for stored scores that are not finite; new evaluations never have any."""
    problems = []
    for work in works:
        if work.evaluation is not None and not np.isfinite(work.evaluation.scores).all():
            prompt, vector, objective = np.argwhere(~np.isfinite(work.evaluation.scores))[0]
            problems.append(
                f"{work.folder / str(work.table)}.parquet: {card.objective_names[objective]} is NaN or infinite at "
                f"prompt {prompt + 1}, preference {vector + 1}; allowed: finite scores; delete the file and the "
                f"eval*.json made from it, then {shlex.join(['moalign', 'eval', str(work.folder)])}"
            )
    if problems:
        raise RequestError(*problems)


def _same_bounds(works: Sequence[Work]) -> None:
    """Raise RequestError for runs whose normalisers differ (fitted twice, in different results folders)."""
    judged = [work for work in works if work.bounds is not None]
    for work in judged[1:]:
        if work.bounds != judged[0].bounds:
            raise RequestError(
                f"{judged[0].folder} and {work.folder}: their normalisers differ (each results folder fitted its own), "
                "so their scores cannot be compared; train both in one results folder"
            )


# --- the record -------------------------------------------------------------------------------------------------


def _record(
    request: CompareRequest, works: Sequence[Work], card: TaskCard, card_hash: str, grid: Sequence[Preference]
) -> dict[str, Any]:
    spec = card.evaluation
    judged = ranking(entries.entries_of(works), grid, spec.bootstrap, spec.seed)
    bounds = next((work.bounds for work in works if work.bounds is not None), None)
    record: dict[str, Any] = {
        "task": card.name,
        "description": card.description,
        "card_hash": card_hash,
        "objectives": card.objective_names,
        "ref": list(card.reference_point),
        "grid": [list(preference) for preference in grid],
        "prompts": next((work.evaluation.told["prompts"] for work in works if work.evaluation), None),
        "samples": request.samples or spec.samples,
        "draws": spec.bootstrap,
        "level": 0.95,
        "bounds": None if bounds is None else {"lo": list(bounds[0]), "hi": list(bounds[1])},
        **judged,
        "reported": _reported(works),
        "failed": [row["label"] for row in judged["rows"] if row["status"] != "done"],
        "command": _command(request),
        "environment": environment.capture(),
        "figure": None,
        "figures": {},
        "html": None,
        "markdown": None,
        "json": None,
    }
    record["verdict"] = verdict.sentences(record)
    return record


def _reported(works: Sequence[Work]) -> list[dict[str, Any]]:
    """Return the papers' numbers that the recipes quote, each once; they are kept apart from measured numbers."""
    numbers = [dict(number) for work in works for number in work.reported]
    return list({json.dumps(number, sort_keys=True): number for number in numbers}.values())


def _command(request: CompareRequest) -> str:
    """Return the command that reproduces this comparison."""
    parts = ["moalign", "compare", *request.runs]
    if request.task is not None:
        parts += ["--task", request.task]
    if request.methods:
        parts += ["--methods", ",".join(request.methods)]
    if request.seeds != 1:
        parts += ["--seeds", str(request.seeds)]
    if request.grid is not None:
        parts += ["--grid", str(request.grid)]
    if request.samples is not None:
        parts += ["--samples", str(request.samples)]
    parts += [part for text in request.overrides for part in ("--set", text)]
    return shlex.join([*parts, "--results", str(request.results)])


def _output_paths(request: CompareRequest, works: Sequence[Work], card: TaskCard, card_hash: str) -> OutputPaths:
    """Return the paths of the files, having checked that they can be written."""
    identity = {"card": card_hash, "runs": sorted(work.folder.name for work in works), "grid": request.grid}
    samples = _samples(request, card)
    if samples is not None:
        identity["samples"] = samples
    folder = request.results / "compare" / f"{card.name}-{stores.identity(identity)[:8]}"
    paths = OutputPaths(
        folder / "compare.json",
        request.figure or folder / "fronts.png",
        request.markdown or folder / "compare.md",
        request.html,
    )
    paths.require_writable()
    return paths

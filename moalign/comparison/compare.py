"""``moalign compare``: train what is missing, evaluate all runs alike, and say which method wins and how certainly.

Conditions are equal or the comparison is refused: all runs have the same task card, evaluation prompts and sampling
seeds, and their costs are counted in the same units.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moalign.comparison import artefacts, entries, executors, jobs
from moalign.comparison.artefacts import OutputPaths
from moalign.comparison.jobs import ComparedRun
from moalign.comparison.ranking import ranking
from moalign.comparison.result import CompareResult
from moalign.config import load, overrides
from moalign.config.card import TaskCard
from moalign.config.recipe import Recipe
from moalign.config.strict import RECORDED, Strict
from moalign.core import preferences
from moalign.core.errors import RequestError, unknown
from moalign.core.paths import cache_root
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.core.text import command as typed
from moalign.experiment.arguments import is_set
from moalign.experiment.train import DEFAULT_TASK, TrainRequest, checked, context_of, damaged, plan, resolve
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.report import verdict
from moalign.runs import atomic, environment
from moalign.runs import store as stores
from moalign.runs.run import Run
from moalign.runs.store import RunStore, results_of
from moalign.tasks.load import require_base

SUITES = {"full": "suite", "quick": "quick_suite"}
"""The suites that a card may have, with the key that each has there."""


@dataclass(frozen=True)
class CompareRequest:
    """The user's request: finished runs, or methods on a task."""

    runs: Sequence[str] = ()
    """Folders or identifiers of finished, evaluated runs; empty: train and evaluate what is missing."""
    task: str | None = None
    methods: Sequence[str] | None = None
    """None or empty: a suite of the task card."""
    suite: str = "full"
    """Which suite, where no methods are named: one of :data:`SUITES`."""
    seeds: int = 1
    """Training seeds per method: the recipe's own and those that follow it."""
    grid: int | None = None
    """Size of the evaluation grid; None: the task card's."""
    samples: int | None = None
    """Answers to each evaluation prompt at each preference; None: as many as the task card says."""
    jobs: int | None = None
    """Runs trained at a time, other than 1: in other processes. None: see
    :func:`moalign.comparison.executors.jobs_by_default`; with ray all that find room."""
    executor: str = "local"
    """Where runs are trained: one of :data:`moalign.comparison.executors.NAMES`."""
    overrides: Sequence[str] = ()
    """``key=value``, for every method that has the setting; ``METHOD.key=value`` for one method."""
    results: Path = Path("results")
    figure: Path | None = None
    markdown: Path | None = None
    html: Path | None = None


def compare(request: CompareRequest, progress: Progress = silent) -> CompareResult:
    """Compare methods or runs; writes JSON, figure and Markdown.

    Runs that fail stay visible in entries of status ``failed`` (or ``partial``); the others go on.

    Raises:
        RequestError: every problem of the request at once, before anything is trained: unknown names, settings that
            no method has, runs of different task cards or without evaluation, paths that cannot be written.
    """
    runs, card, card_hash = _named_runs(request) if request.runs else plan_all(request)
    requested = None if request.grid is None else preferences.grid_of(len(card.objectives), request.grid)
    samples = None if request.samples == card.evaluation.samples else request.samples
    unusable = [jobs.unusable_evaluation(run, card, requested, samples) for run in runs]
    if any(unusable):  # the answers are needed for pairing
        raise RequestError(*filter(None, unusable))
    paths = _output_paths(request, runs, card, card_hash, samples)
    _require_same_base(runs)
    jobs.train_missing(runs, request.executor, request.jobs, progress)
    jobs.evaluate_all(runs, requested, progress, request.results, keep=not request.runs, samples=samples)
    _require_finite(runs, card)
    _require_same_bounds(runs)
    _require_same_base(runs)  # runs trained by ray may come from other machines
    result = _result(request, runs, card, card_hash, requested)
    artefacts.write(result, paths, runs, card)
    result.traces = [run.trace for run in runs if run.trace]
    return result


# --- what is compared -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _collected(problems: list[str]) -> Iterator[None]:
    """Add the problems of a RequestError to the others, so that all of them are shown at once."""
    try:
        yield
    except RequestError as error:
        problems += error.problems


def plan_all(request: CompareRequest) -> tuple[list[ComparedRun], TaskCard, str]:
    """Check the request for every method and seed; nothing is trained yet."""
    problems = [
        f"--{name} {number}: allowed: 1 or more"
        for name, number in (("seeds", request.seeds), ("jobs", request.jobs))
        if number is not None and number < 1
    ]
    problems += executors.problems(request.executor)
    with _collected(problems):
        executors.jobs_requested()
    methods: dict[str, Method] = {}
    with _collected(problems):
        methods = {name: registry.get(name) for name in _names(request)}
    if problems:
        raise RequestError(*problems)
    runs: list[ComparedRun] = []
    settings = _settings(request.overrides, methods, problems)
    refused = bool(problems)
    for name, method in methods.items():
        with _collected(problems):
            if refused:  # what else is wrong is told with it; no model is fetched for that
                asked = _asked(request, method, settings[name])
                checked(asked, resolve(asked))
            else:
                runs += _plans(request, method, settings[name])
    if problems:
        raise RequestError(*dict.fromkeys(problems))
    existing = [run.plan.existing_run for run in runs if run.plan is not None]
    problems += [run.busy() for run in existing if run is not None and run.status == "running"]
    if problems:
        raise RequestError(*problems)
    first = runs[0].plan
    assert first is not None
    return runs, first.card, first.task.hash


def _names(request: CompareRequest) -> list[str]:
    """Return the requested methods, or those of a suite of the card; RequestError names all unknown ones at once."""
    if request.suite not in SUITES:
        raise unknown("suite", request.suite, list(SUITES))
    names, origin = list(request.methods or ()), None
    if names and request.suite != "full":
        raise RequestError(f"--suite {request.suite}: --methods says what to compare; leave out one of the two")
    if not names:
        task = DEFAULT_TASK if request.task is None else request.task
        of_card = [text for text in request.overrides if text.lstrip().startswith("task.")]
        names, origin = getattr(load.load_card(task, of_card), SUITES[request.suite]), load.card_origin(task, of_card)
        if not names:
            which = SUITES[request.suite]
            raise RequestError(f"--task {task}: its card names no {which}; name the methods with --methods a,b")
    known = registry.names()
    wrong = [(index, str(unknown("method", name, known))) for index, name in enumerate(names) if name not in known]
    if wrong:
        key = SUITES[request.suite]
        raise RequestError(*dict.fromkeys(origin.sentence((key, at), text) if origin else text for at, text in wrong))
    return list(dict.fromkeys(names))


def _plans(request: CompareRequest, method: Method, settings: Sequence[str]) -> list[ComparedRun]:
    """Return the runs of one method over its seeds; one seed for a method in which nothing is trained."""
    asked = _asked(request, method, settings)
    first = plan(asked)
    others = range(first.seed + 1, first.seed + (request.seeds if method.capabilities.trains else 1))
    of_all = [text for text in settings if is_set("seed", [text]) is None]  # the first has the seed that is set
    asked = replace(asked, overrides=of_all)
    return [jobs.planned(first), *(jobs.planned(plan(replace(asked, seed=seed))) for seed in others)]


def _asked(request: CompareRequest, method: Method, settings: Sequence[str]) -> TrainRequest:
    """Return the request for a method's run with the recipe's own seed."""
    return TrainRequest(
        method.name,
        task=request.task,
        # A method that answers only for the preferences it was trained on is trained on those of the evaluation.
        grid=None if method.capabilities.steerable else request.grid,
        overrides=settings,
        results=request.results,
    )


def _settings(texts: Sequence[str], methods: Mapping[str, Method], problems: list[str]) -> dict[str, list[str]]:
    """Assign the ``--set`` options to methods.

    ``METHOD.key=value`` goes to that method; a key of the card or of every recipe goes to all; a method's own
    setting goes to the methods that have it. A setting that none has is a problem.
    """
    settings: dict[str, list[str]] = {name: [] for name in methods}
    configs = {name: method.Config for name, method in methods.items()}
    for text in texts:
        with _collected(problems):
            keys, _ = overrides.parse(text)
            if keys[0] in methods and len(keys) > 1:
                if keys[1] == "task":
                    raise RequestError(f"--set {text}: the task is one for all methods; write {text.partition('.')[2]}")
                settings[keys[0]].append(text.partition(".")[2])
                continue
            of_config = keys[0] in {"config", "quick"} and len(keys) > 1
            own = keys[1] if of_config else keys[0]
            fitting = [name for name, config in configs.items() if own in config.model_fields]
            if keys == ("snapshots",):  # the others are compared as they are
                fitting = [name for name, method in methods.items() if method.capabilities.snapshots] or list(methods)
            elif keys[0] == "task" or (keys[0] in Recipe.model_fields and not of_config):
                fitting = list(methods)
            if not fitting:
                raise RequestError(f"--set {'.'.join(keys)}: {_of_none(keys, configs)}")
            for name in fitting:
                settings[name].append(text)
    return settings


def _of_none(keys: tuple[str, ...], configs: Mapping[str, type[Strict]]) -> str:
    """Return what is wrong with a setting that no method has; ``configs`` by method."""
    if keys[0] in registry.names() and len(keys) > 1:
        listed = ", ".join(configs)
        return f"{keys[0]} is not among the methods compared ({listed}); name one of them, or add it with --methods"
    return load.unknown_setting(keys, configs.values(), configs)


def _named_runs(request: CompareRequest) -> tuple[list[ComparedRun], TaskCard, str]:
    """Return the named runs; RequestError for those that are not finished, not evaluated or not of one task card."""
    refused = {
        "--methods": request.methods,
        "--suite": request.suite != "full",
        "--seeds": request.seeds != 1,
        "--set": request.overrides,
    }
    problems = [
        f"{option}: finished runs are named, so nothing is trained; leave out the runs or {option}"
        for option, given in refused.items()
        if given
    ]
    problems += executors.problems(request.executor)
    runs: dict[Path, Run] = {}
    same_request: dict[str, Path] = {}
    for name in request.runs:
        with _collected(problems):
            run = RunStore(request.results).find(name)
            runs.setdefault(run.path.resolve(), run)
            twin = same_request.setdefault(run.run_id, run.path)
            if twin.resolve() != run.path.resolve():
                problems.append(f"runs {twin} and {run.path} are of one request and seed; name one of them")
            run.require_done()
    if problems:
        raise RequestError(*problems)
    first, *others = runs.values()
    for other in others:
        _require_same_card(first, other)
    for run in runs.values():
        with _collected(problems):
            context_of(run, results_of(run.path, request.results))
    if problems:
        raise RequestError(*problems)
    if request.task is not None and request.task != first.record.task:
        raise RequestError(f"--task {request.task}: the runs named are of task {first.record.task}; leave out --task")
    with damaged(first):
        card = TaskCard.model_validate(first.record.recipe["card"], context=RECORDED)
    compared = [jobs.existing(run, request.results) for run in runs.values()]
    lacking = jobs.not_evaluated(compared, card)
    if lacking is not None:
        raise RequestError(lacking)
    return compared, card, first.record.card_hash


def _require_same_card(first: Run, other: Run) -> None:
    if other.record.card_hash == first.record.card_hash:
        return
    names = [f"{run.path} is of {run.record.task} (card {run.record.card_hash})" for run in (first, other)]
    recorded, idle = [run.record.recipe.get("card") for run in (first, other)], ("description", "suite", "quick_suite")
    cards = [card if isinstance(card, dict) else {} for card in recorded]
    keys = [key for key in cards[0] | cards[1] if key not in idle and cards[0].get(key) != cards[1].get(key)]
    if len(keys) > 4:
        keys[4:] = [f"{len(keys) - 4} more"]
    where = f"they differ in {', '.join(keys)}" if keys else "their base models or data differ"
    raise RequestError(
        f"runs of different task cards cannot be compared: {', '.join(names)}; {where}; train both on one card"
    )


def _require_finite(runs: Sequence[ComparedRun], card: TaskCard) -> None:
    """Raise RequestError for stored scores that are not finite; new evaluations never have any."""
    problems = []
    for run in runs:
        if run.evaluation is not None and not np.isfinite(run.evaluation.scores).all():
            prompt, vector, objective = np.argwhere(~np.isfinite(run.evaluation.scores))[0]
            problems.append(
                f"{run.folder / str(run.table)}.parquet: {card.objective_names[objective]} is NaN or infinite at "
                f"prompt {prompt + 1}, preference {vector + 1}; allowed: finite scores; delete the file and the "
                f"eval*.json made from it, then {typed('eval', run.folder)}"
            )
    if problems:
        raise RequestError(*problems)


def _require_same_bounds(runs: Sequence[ComparedRun]) -> None:
    """Raise RequestError for runs whose normalisers differ (fitted twice, in different results folders)."""
    judged = [run for run in runs if run.bounds is not None]
    for run in judged[1:]:
        if run.bounds != judged[0].bounds:
            raise RequestError(
                f"{judged[0].folder} and {run.folder}: their normalisers differ (each results folder fitted its own), "
                "so their scores cannot be compared; train both in one results folder"
            )


def _require_same_base(runs: Sequence[ComparedRun]) -> None:
    """Raise RequestError for finished runs on bases of other weights, also than those which the others will have.

    Older records do not say which base they had.
    """
    made = [(run, run.known) for run in runs]
    known = [(run.folder, of.record.notes["base"]) for run, of in made if of is not None and "base" in of.record.notes]
    if not known:
        return
    for folder, base in known[1:]:
        if base != known[0][1]:
            raise RequestError(
                f"{known[0][0]} and {folder}: their bases have other weights ({known[0][1]}, {base}): each machine "
                "trains the sandbox's base for itself, and other versions of torch may not make "
                "the same; train both on one"
            )
    planned = [run.plan for run, of in made if run.plan is not None and (of is None or of.status != "done")]
    if planned:
        require_base(planned[0].task, known[0][1], known[0][0])


# --- the result -------------------------------------------------------------------------------------------------


def _result(
    request: CompareRequest,
    runs: Sequence[ComparedRun],
    card: TaskCard,
    card_hash: str,
    requested: Sequence[Preference] | None,
) -> CompareResult:
    spec, grid = card.evaluation, requested or preferences.grid_of(len(card.objectives), card.grid)
    ranked = ranking(entries.entries_of(runs), grid, spec.bootstrap, spec.seed)
    bounds = next((run.bounds for run in runs if run.bounds is not None), None)
    # The papers' numbers that the recipes quote, each once; they are kept apart from measured numbers.
    reported = {json.dumps(number, sort_keys=True): dict(number) for run in runs for number in run.reported}
    result = CompareResult(
        task=card.name,
        description=card.description,
        card_hash=card_hash,
        objectives=tuple(card.objective_names),
        reference_point=tuple(card.reference_point),
        grid=tuple(grid),
        prompts=next((run.evaluation.result.prompts for run in runs if run.evaluation), None),
        samples=request.samples or spec.samples,
        draws=spec.bootstrap,
        level=0.95,
        bounds=None if bounds is None else {"lo": list(bounds[0]), "hi": list(bounds[1])},
        **dict(ranked),
        reported=list(reported.values()),
        failed=[entry.label for entry in ranked.entries if entry.status != "done"],
        command=_command(request),
        environment=environment.capture(),
    )
    result.verdict = verdict.sentences(result.content)
    return result


def _command(request: CompareRequest) -> str:
    """Return the command that reproduces this comparison."""
    options = {
        "--task": request.task,
        "--methods": ",".join(request.methods or ()) or None,
        "--suite": request.suite if request.suite != "full" else None,
        "--seeds": request.seeds if request.seeds != 1 else None,
        "--grid": request.grid,
        "--samples": request.samples,
    }
    given = [part for option, value in options.items() if value is not None for part in (option, str(value))]
    given += [part for text in request.overrides for part in ("--set", text)]
    return typed("compare", *request.runs, *given, "--results", str(request.results))


def _output_paths(
    request: CompareRequest, runs: Sequence[ComparedRun], card: TaskCard, card_hash: str, samples: int | None
) -> OutputPaths:
    """Return the paths of the files, having checked that they can be written."""
    identity = {"card": card_hash, "runs": sorted(run.folder.name for run in runs), "grid": request.grid}
    if samples is not None:
        identity["samples"] = samples
    # Of finished runs in a folder that is read-only the comparison goes to the user's cache; what trains is refused.
    elsewhere = all(run.take_over() for run in runs) and atomic.read_only(request.results)
    root = cache_root() if elsewhere else request.results
    folder = root / "compare" / f"{card.name}-{stores.identity(identity)[:8]}"
    paths = OutputPaths(
        folder / "compare.json",
        request.figure or folder / "fronts.png",
        request.markdown or folder / "compare.md",
        request.html,
    )
    paths.require_writable()
    return paths

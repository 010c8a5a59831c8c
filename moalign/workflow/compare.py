"""``moalign compare``: train what is missing, evaluate everything with one judge, say which wins and how sure that is.

A comparison is fair or it is not made: every run has the same task card, the same evaluation prompts and sampling
seeds, and its cost is counted in the same units.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moalign import preferences
from moalign.config import load, overrides
from moalign.config.card import TaskCard
from moalign.config.recipe import Recipe
from moalign.errors import RequestError, unknown
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.preferences import Preference
from moalign.report import figure, markdown, verdict
from moalign.runs import atomic, environment
from moalign.runs import store as stores
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.tasks.task import Say, silent
from moalign.workflow import jobs
from moalign.workflow.jobs import Work
from moalign.workflow.standings import Contender, standings
from moalign.workflow.train import DEFAULT_TASK, TrainRequest, context_of, plan


@dataclass(frozen=True)
class CompareRequest:
    """What the user asked for: finished runs, or methods on a task."""

    runs: Sequence[str] = ()
    """Folders or identifiers of finished runs; empty: train what is missing."""
    task: str | None = None
    methods: Sequence[str] | None = None
    """None or empty: the task card's suite."""
    seeds: int = 1
    """Training seeds per method: the recipe's own and those that follow it."""
    grid: int | None = None
    """Size of the evaluation grid; None: the task card's."""
    jobs: int | None = 1
    """Runs trained at a time (None: 1); more than one: each in a process of its own."""
    overrides: Sequence[str] = ()
    """``key=value``, for every method that has the setting; ``METHOD.key=value`` for one method."""
    results: Path = Path("results")
    figure: Path | None = None
    markdown: Path | None = None


@dataclass
class Comparison:
    """What came out."""

    told: dict[str, Any]
    """The content of ``compare.json``."""
    traces: list[str] = field(default_factory=list)
    """Tracebacks of runs that failed, for ``--debug``."""

    @property
    def exit_code(self) -> int:
        """1 when a run failed, else 0."""
        return 1 if self.told["failed"] else 0


def compare(request: CompareRequest, say: Say = silent) -> Comparison:
    """Compare methods or runs; writes JSON, figure and Markdown.

    Runs that fail stay visible as rows of status ``failed`` (or ``partial``); the others go on.

    Raises:
        RequestError: every problem of the request at once, before anything is trained: unknown names, settings that
            no method has, runs of different task cards, places that cannot be written.
    """
    works, card, card_hash = _found(request) if request.runs else _planned(request)
    wanted = _wanted(request, card)
    places = _places(request, works, card, card_hash)
    at_a_time = 1 if request.jobs is None else request.jobs
    if at_a_time > 1:
        jobs.train_apart(works, at_a_time, say)
    else:
        jobs.train_here(works, say)
    jobs.evaluate_all(works, wanted, say)
    _same_bounds(works)
    grid = wanted or preferences.grid_of(len(card.objectives), card.grid)
    told = _told(request, works, card, card_hash, grid)
    _write(told, places)
    return Comparison(told, [work.trace for work in works if work.trace])


# --- what is compared -------------------------------------------------------------------------------------------


def _planned(request: CompareRequest) -> tuple[list[Work], TaskCard, str]:
    """Check the request for every method and seed; nothing is trained yet."""
    problems = [
        f"--{name} {number}: allowed: 1 or more"
        for name, number in (("seeds", request.seeds), ("jobs", request.jobs))
        if number is not None and number < 1
    ]
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
    first = works[0].plan
    assert first is not None
    return works, first.resolved.card, first.task.hash


def _names(request: CompareRequest) -> list[str]:
    """Return the methods asked for, or the card's suite; every unknown name is told at once."""
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
    asked = TrainRequest(
        method.name,
        task=request.task,
        # What can serve only the preferences it was trained on is trained on those it will be asked for.
        grid=None if able.steerable else request.grid,
        overrides=given,
        results=request.results,
    )
    first = plan(asked)
    yield jobs.planned(first)
    for more in range(1, request.seeds if able.trains else 1):
        yield jobs.planned(plan(replace(asked, seed=first.seed + more)))


def _overrides(texts: Sequence[str], methods: Mapping[str, Method]) -> dict[str, list[str]]:
    """Hand out the ``--set`` options.

    ``METHOD.key=value`` goes to that method; a key of the card or of every recipe goes to all; a method's own
    setting goes to the methods that have it. What none of them has goes to all, whose plans then refuse it.
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


def _found(request: CompareRequest) -> tuple[list[Work], TaskCard, str]:
    """Find the runs named; refuse what is not finished and what is not of one task card."""
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
    store, found = RunStore(request.results), []
    for name in request.runs:
        try:
            run = store.find(name)
        except RequestError as error:
            problems += error.problems
            continue
        if run.status != "done":
            problems.append(f"run {run.path}: it is {run.status}, not done; finish it with its train command first")
        found.append(run)
    if problems:
        raise RequestError(*problems)
    runs = list({run.path.resolve(): run for run in found}.values())
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
    return [_of_run(run) for run in runs], card, runs[0].record.card_hash


def _of_run(run: Run) -> Work:
    record = run.record
    command = jobs.arguments(record.as_given, record.seed, record.preferences, jobs.results_of(run))
    return Work(registry.get(record.method), record.seed, record.identity, run.path, command, run=run)


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
    """Return the keys in which two cards differ, apart from what does not count."""
    idle = ("description", "suite")
    keys = [key for key in {**first, **other} if key not in idle and first.get(key) != other.get(key)]
    more = [f"{len(keys) - most} more"] if len(keys) > most else []
    return keys[:most] + more


def _wanted(request: CompareRequest, card: TaskCard) -> list[Preference] | None:
    return None if request.grid is None else preferences.grid_of(len(card.objectives), request.grid)


def _same_bounds(works: Sequence[Work]) -> None:
    """Refuse runs whose scores were normalised differently (fitted twice, on different machines)."""
    judged = [work for work in works if work.bounds is not None]
    for work in judged[1:]:
        if work.bounds != judged[0].bounds:
            raise RequestError(
                f"{judged[0].folder} and {work.folder}: their normalisers differ (each results folder fitted its own), "
                "so their scores cannot be compared; train both in one results folder"
            )


# --- what came out ----------------------------------------------------------------------------------------------


def contenders(works: Sequence[Work]) -> list[Contender]:
    """Group the runs into rows: one per method and setting, over seeds; labels are unique."""
    groups: dict[str, list[Work]] = {}
    for work in works:
        rest = {key: value for key, value in work.identity.items() if key != "seed"}
        groups.setdefault(json.dumps([work.method.name, rest], sort_keys=True), []).append(work)
    labels = _labels(list(groups.values()))
    rows = []
    for label, group in zip(labels, groups.values(), strict=True):
        group.sort(key=lambda work: work.seed)
        method = group[0].method
        row = Contender(label, method.name, seeded=method.capabilities.trains, runs=[work.told for work in group])
        for work in group:
            if work.evaluation is not None and work.run is not None:
                record = work.run.record
                row.seeds.append(work.seed)
                row.evaluations.append(work.evaluation)
                row.costs.append({**record.cost.model_dump(), "seconds": record.seconds})
        rows.append(row)
    return rows


def _labels(groups: Sequence[Sequence[Work]]) -> list[str]:
    """Name each row by its method; where a method has several, by the settings in which they differ."""
    labels = []
    for group in groups:
        one = group[0]
        rivals = [other[0] for other in groups if other[0].method.name == one.method.name]
        if len(rivals) == 1:
            labels.append(one.method.name)
            continue
        mine = dict(_flat(one.identity))
        telling = _telling([dict(_flat(rival.identity)) for rival in rivals])
        told = ", ".join(f"{key.removeprefix('config.')}={_short(mine.get(key))}" for key in telling)
        labels.append(f"{one.method.name} ({told})" if told else one.method.name)
    repeated = {label for label in labels if labels.count(label) > 1}
    return [
        f"{label} [{group[0].folder.name[:6]}]" if label in repeated else label
        for label, group in zip(labels, groups, strict=True)
    ]


def _telling(settings: Sequence[Mapping[str, Any]], most: int = 2) -> list[str]:
    """Return the keys that tell these settings apart best, the most telling first."""
    keys = [key for key in dict.fromkeys(key for one in settings for key in one) if key != "seed"]
    chosen: list[str] = []

    def apart(more: str) -> int:
        return len({tuple(str(one.get(key)) for key in (*chosen, more)) for one in settings})

    while keys and len(chosen) < most:
        best = max(keys, key=apart)
        if (chosen and apart(best) == apart(chosen[-1])) or apart(best) == 1:
            break
        chosen.append(best)
    return chosen


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), value


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 16 else text[:15] + "…"


def _told(
    request: CompareRequest, works: Sequence[Work], card: TaskCard, card_hash: str, grid: Sequence[Preference]
) -> dict[str, Any]:
    spec = card.evaluation
    judged = standings(contenders(works), grid, spec.bootstrap, spec.seed)
    told: dict[str, Any] = {
        "task": card.name,
        "description": card.description,
        "card_hash": card_hash,
        "objectives": card.objective_names,
        "ref": list(card.reference_point),
        "grid": [list(preference) for preference in grid],
        "prompts": next((work.evaluation.told["prompts"] for work in works if work.evaluation), None),
        "draws": spec.bootstrap,
        "level": 0.95,
        **judged,
        "failed": [row["label"] for row in judged["rows"] if row["status"] != "done"],
        "command": _command(request),
        "environment": environment.capture(),
        "figure": None,
        "markdown": None,
        "json": None,
    }
    told["verdict"] = verdict.sentences(told)
    return told


def _command(request: CompareRequest) -> str:
    """Return the command that makes this comparison again."""
    parts = ["moalign", "compare", *request.runs]
    if request.task is not None:
        parts += ["--task", request.task]
    if request.methods:
        parts += ["--methods", ",".join(request.methods)]
    if request.seeds != 1:
        parts += ["--seeds", str(request.seeds)]
    if request.grid is not None:
        parts += ["--grid", str(request.grid)]
    parts += [part for text in request.overrides for part in ("--set", text)]
    return shlex.join([*parts, "--results", str(request.results)])


# --- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    json: Path
    figure: Path
    markdown: Path


def _places(request: CompareRequest, works: Sequence[Work], card: TaskCard, card_hash: str) -> _Places:
    """Return where the three files go, having checked that they can be written there."""
    asked = {"card": card_hash, "runs": sorted(work.folder.name for work in works), "grid": request.grid}
    folder = request.results / "compare" / f"{card.name}-{stores.identity(asked)[:8]}"
    places = _Places(
        folder / "compare.json", request.figure or folder / "fronts.png", request.markdown or folder / "compare.md"
    )
    if places.figure.suffix not in figure.FORMATS:
        raise RequestError(f"--figure {places.figure}: allowed: a name ending in {', '.join(figure.FORMATS)}")
    for option, path in (("--figure", request.figure), ("--markdown", request.markdown)):
        if path is not None and path.is_dir():
            raise RequestError(f"{option} {path}: it is a folder; give the name of a file")
    for path in (places.json, places.figure, places.markdown):
        _check_writable(path.parent)
    return places


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, or made, before hours are spent on what would go there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RequestError(f"{folder}: cannot write here: {there} is not a folder; choose another place")
    with atomic.refusals(there), tempfile.TemporaryFile(dir=there) as file:
        file.write(b"\0" * 65536)


def _write(told: dict[str, Any], places: _Places) -> None:
    """Write figure, page and, last, the JSON that names them."""
    if any(row["points"] for row in told["rows"]):
        atomic.write_bytes(places.figure, figure.draw(told, places.figure.suffix))
        told["figure"] = str(places.figure)
    told["markdown"], told["json"] = str(places.markdown), str(places.json)
    atomic.write_text(places.markdown, markdown.page(told, places.markdown.parent))
    atomic.write_json(places.json, told)

"""``moalign train``: plan a run, find it finished, resume it or train it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign import preferences
from moalign.config import find, load
from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.errors import RequestError
from moalign.methods import registry
from moalign.methods.base import Job, Method, RunContext
from moalign.preferences import Preference
from moalign.runs.meter import Meter
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.tasks.load import make_task
from moalign.tasks.task import Say, Task, silent

if TYPE_CHECKING:
    from moalign.runs.record import RunRecord

DEFAULT_TASK = "sandbox"


@dataclass(frozen=True)
class TrainRequest:
    """What the user asked for."""

    method: str
    task: str | None = None
    recipe: Path | None = None
    prefs: Sequence[str] = ()
    grid: int | None = None
    overrides: Sequence[str] = ()
    seed: int | None = None
    results: Path = Path("results")


@dataclass
class Plan:
    """A checked request: nothing has been written or loaded yet."""

    request: TrainRequest
    method: Method
    resolved: ResolvedRequest
    task: Task
    seed: int
    preferences: list[Preference]
    """The vectors to train (one policy each) or, for one policy, to draw from when given."""
    given: list[Preference] | None
    store: RunStore
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the run is or will be."""
        return self.store.folder(self.method.name, self.task.card.name, self.identity)

    @property
    def found(self) -> Run | None:
        """The run, when this request was made before."""
        return self.store.lookup(self.method.name, self.task.card.name, self.identity)


def plan(request: TrainRequest, say: Say = silent) -> Plan:
    """Check a request and everything that it points to; raises RequestError with every problem."""
    method = registry.get(request.method)
    recipe = request.recipe
    if recipe is not None:
        named = load.recipe_names(recipe)[0]
        if named != request.method:
            raise RequestError(
                f"--recipe {recipe}: it is a recipe of {named}, but the method asked for is {request.method}"
            )
    else:
        recipe = find.find_recipe_file(request.task or DEFAULT_TASK, request.method)
    task_name = request.task or (None if request.recipe is not None else DEFAULT_TASK)
    resolved = load.load_recipe(recipe, request.method, task_name, request.overrides, method.Config)
    given = _preferences(request, resolved)
    task = make_task(resolved.card, request.results, say)
    if method.capabilities.objectives == "2" and len(task.names) != 2:
        raise RequestError(f"method {method.name} works with 2 objectives; task {task.card.name} has {len(task.names)}")
    seed = resolved.recipe.seed if request.seed is None else request.seed
    made = Plan(
        request=request,
        method=method,
        resolved=resolved,
        task=task,
        seed=seed,
        preferences=given or task.grid,
        given=given,
        store=RunStore(request.results),
    )
    made.identity = {
        "card": task.hash,
        "config": resolved.config.model_dump(mode="json"),
        "policy": resolved.recipe.policy.model_dump(mode="json"),
        "seed": seed,
        "prefs": given,
    }
    return made


def _preferences(request: TrainRequest, resolved: ResolvedRequest) -> list[Preference] | None:
    """Return the vectors asked for: ``--prefs``, ``--grid``, or the recipe's own; None for the task's distribution."""
    names = resolved.card.objective_names
    if request.prefs and request.grid is not None:
        raise RequestError("--prefs and --grid exclude each other: name the vectors, or the size of a grid")
    if request.prefs:
        found = [preferences.parse(text, names) for text in request.prefs]
    elif request.grid is not None:
        found = preferences.grid_of(len(names), request.grid)
    elif resolved.recipe.prefs is not None:
        found = [preferences.check(row, names, "recipe: prefs") for row in resolved.recipe.prefs]
    else:
        return None
    return list(dict.fromkeys(found))


def train(made: Plan, say: Say = silent) -> tuple[Run, bool]:
    """Train the planned run, or find it finished; returns (run, whether it was found finished).

    Raises RequestError when another process is training it; what was done before a failure or an interruption is
    kept, and the same request goes on from there.
    """
    found = made.found
    if found is not None and found.record.status == "done":
        return found, True
    recipe = made.resolved.recipe.model_dump(mode="json")
    run = made.store.open(
        made.method.name,
        made.task.card.name,
        made.identity,
        card_hash=made.task.hash,
        seed=made.seed,
        preferences=made.given,
        recipe={**recipe, "card": made.task.card.model_dump(mode="json")},
        as_given=made.resolved.as_given,
    )
    with run.lock():
        if run.record.status == "done":
            return run, True
        run.mark("running")
        meter = Meter()
        try:
            job = _job(made, run, meter, say)
            made.method.train(job)
        except KeyboardInterrupt:
            run.mark("interrupted")
            raise
        except Exception as error:
            run.mark("failed", error=f"{type(error).__name__}: {error}")
            raise
        run.record.notes = job.notes
        run.mark("done", meter=meter)
        run.drop_checkpoints()
    return run, False


def _job(made: Plan, run: Run, meter: Meter, say: Say) -> Job:
    made.task.say = say
    return Job(
        task=made.task,
        config=made.resolved.config,
        run=run,
        preferences=made.preferences,
        policy_spec=made.resolved.recipe.policy,
        panel=made.task.panel.with_normaliser(made.task.normaliser).with_meter(meter),
        seed=made.seed,
        meter=meter,
        given_preferences=made.given,
        say=say,
    )


def context_of(run: Run, results: Path, say: Say = silent) -> tuple[Method, RunContext]:
    """Return the method and context of a finished run, from its record alone.

    Raises RequestError when the run is not finished, or when what its card points to (base, data) is gone or
    has changed since.
    """
    record = run.record
    if run.status != "done":
        raise RequestError(f"run {run.path}: it is {run.status}, not done; finish it with the same train command first")
    method = registry.get(record.method)
    recipe = dict(record.recipe)
    card = TaskCard.model_validate(recipe.pop("card"))
    task = make_task(card, results, say)
    if task.hash != record.card_hash:
        raise RequestError(
            f"run {run.path}: its task card has changed since (hash {record.card_hash} then, {task.hash} now): "
            "the base model or the data it points to is not the same; restore it or train again"
        )
    from moalign.config.recipe import PolicySpec

    return method, RunContext(
        task=task,
        config=method.Config.model_validate(recipe["config"]),
        run=run,
        preferences=_trained(record, task),
        policy_spec=PolicySpec.model_validate(recipe["policy"]),
        panel=task.panel.with_normaliser(task.normaliser),
    )


def _trained(record: RunRecord, task: Task) -> list[Preference]:
    return [tuple(row) for row in record.preferences] if record.preferences else task.grid

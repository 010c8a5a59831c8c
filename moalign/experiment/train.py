"""``moalign train``: plan a run, find it finished, resume it or train it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moalign.config import find, load
from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.recipe import PolicySpec, Recipe
from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.experiment.arguments import refuse_both
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.runs import trackers
from moalign.runs.meter import Meter
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.tasks.load import make_task
from moalign.tasks.task import Task
from moalign.training.job import Job, RunContext

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
    holdout: list[Preference] = field(default_factory=list)
    """Vectors that training must not see."""
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the run is or will be."""
        return self.store.folder(self.method.name, self.task.card.name, self.identity)

    @property
    def existing_run(self) -> Run | None:
        """The run, when this request was made before."""
        return self.store.lookup(self.method.name, self.task.card.name, self.identity)

    def identified(self) -> Plan:
        """Return the plan with its identity: two requests with the same one are the same run."""
        identity = {
            "card": self.task.hash,
            "config": self.resolved.config.model_dump(mode="json"),
            "policy": self.resolved.recipe.policy.model_dump(mode="json"),
            "seed": self.seed,
            "prefs": self.given,
        }
        if self.holdout:  # without one the identity is what it was before there were any
            identity["holdout"] = self.holdout
        return replace(self, identity=identity)

    def open(self) -> Run:
        """Return the run, made now or found as it was left."""
        recipe = self.resolved.recipe.model_dump(mode="json")
        return self.store.open(
            self.method.name,
            self.task.card.name,
            self.identity,
            card_hash=self.task.hash,
            seed=self.seed,
            preferences=self.given,
            recipe={**recipe, "card": self.task.card.model_dump(mode="json")},
            as_given=self.resolved.as_given,
        )

    def context(self, run: Run) -> RunContext:
        """Return what a policy of the finished run needs."""
        return RunContext.of(self.task, run, **self._parts())

    def job(self, run: Run, meter: Meter, progress: Progress = silent) -> Job:
        """Return the run as a job to train; what it costs is counted by ``meter``."""
        self.task.progress = progress

        def experts(method: str, settings: dict[str, Any], wanted: Sequence[Preference]) -> Run:
            before = meter.seconds

            def told(what: str, done: int, total: int) -> None:
                progress(f"experts by {method}: {what}", done, total)

            found, _ = train(expert_plan(self, method, settings, wanted), told, wait=True)
            self.task.progress = progress
            meter.add_run(found.record.cost.model_dump(), found.record.seconds, meter.seconds - before)
            return found

        return Job.of(
            self.task,
            run,
            **self._parts(),
            meter=meter,
            seed=self.seed,
            given_preferences=self.given,
            progress=progress,
            experts=experts,
        )

    def mirrors(self, run: Run) -> trackers.Mirrors:
        """Return the recipe's trackers, which show the metrics of a run while it trains."""
        told = {"method": self.method.name, "task": self.task.card.name, "card": self.task.hash, "seed": self.seed}
        return trackers.Mirrors(self.resolved.recipe.trackers, run.path, {**told, **run.record.recipe["config"]})

    def _parts(self) -> dict[str, Any]:
        return {
            "config": self.resolved.config,
            "preferences": self.preferences,
            "policy_spec": self.resolved.recipe.policy,
        }


def resolve(request: TrainRequest) -> ResolvedRequest:
    """Check a request's recipe, settings and card; what they point to (model, data) is not looked at."""
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
    return load.load_recipe(recipe, request.method, task_name, request.overrides, method.Config)


def plan(request: TrainRequest, progress: Progress = silent) -> Plan:
    """Check a request and everything that it points to; raises RequestError with every problem."""
    method, resolved = registry.get(request.method), resolve(request)
    trackers.require_installed(resolved.recipe.trackers)
    given = _preferences(request, resolved)
    task = make_task(resolved.card, request.results, progress)
    if method.capabilities.objectives == "2" and len(task.names) != 2:
        raise RequestError(f"method {method.name} works with 2 objectives; task {task.card.name} has {len(task.names)}")
    seed = resolved.recipe.seed if request.seed is None else request.seed
    holdout = _holdout(method, resolved)
    if holdout:
        given = _without(given or task.grid, holdout)
    return Plan(
        request=request,
        method=method,
        resolved=resolved,
        task=task,
        seed=seed,
        preferences=given or task.grid,
        given=given,
        store=RunStore(request.results),
        holdout=holdout,
    ).identified()


def _preferences(request: TrainRequest, resolved: ResolvedRequest) -> list[Preference] | None:
    """Return the vectors asked for: ``--prefs``, ``--grid``, or the recipe's own; None for the task's distribution."""
    names = resolved.card.objective_names
    refuse_both(request.prefs, request.grid)
    if request.prefs:
        found = [preferences.parse(text, names) for text in request.prefs]
    elif request.grid is not None:
        found = preferences.grid_of(len(names), request.grid)
    elif resolved.recipe.prefs is not None:
        found = [preferences.validate(row, names, "recipe: prefs") for row in resolved.recipe.prefs]
    else:
        return None
    return list(dict.fromkeys(found))


def _holdout(method: Method, resolved: ResolvedRequest) -> list[Preference]:
    """Return the recipe's held-out vectors; raises RequestError when the method could not answer for them."""
    names = resolved.card.objective_names
    found = [preferences.validate(row, names, "recipe: holdout") for row in resolved.recipe.holdout or ()]
    if found and not (method.capabilities.steerable and method.capabilities.one_policy):
        raise RequestError(
            f"holdout: {method.name} answers only for preferences that it was trained on, so there is nothing to hold "
            "out; leave holdout away, or train a method with one policy for every preference (moalign ls methods)"
        )
    return list(dict.fromkeys(found))


def _without(vectors: Sequence[Preference], holdout: Sequence[Preference]) -> list[Preference]:
    """Return the vectors to train on; raises RequestError when none are left."""
    left = [w for w in vectors if not any(preferences.same(w, held) for held in holdout)]
    if not left:
        raise RequestError("holdout: it holds every preference to train on; leave at least one to be trained")
    return left


def train(made: Plan, progress: Progress = silent, wait: bool = False) -> tuple[Run, bool]:
    """Train the planned run, or find it finished; returns (run, whether it was found finished).

    Raises RequestError when another process is training it (``wait``: waits for that process instead); what was done
    before a failure or an interruption is kept, and the same request goes on from there.
    """
    found = made.existing_run
    if found is not None and found.record.status == "done":
        return found, True
    run = made.open()
    if wait and run.is_locked():
        progress(f"waiting for {run.path.name}, which another process trains", 0, 1)
    with run.lock(wait):
        if run.record.status == "done":
            return run, True
        run.mark("running")
        meter = Meter()
        try:
            job = made.job(run, meter, progress)
            with made.mirrors(run) as run.mirrors:
                made.method.train(job)
        except KeyboardInterrupt:
            run.mark("interrupted")
            raise
        except Exception as error:
            run.mark("failed", error=f"{type(error).__name__}: {error}")
            raise
        overlong = made.task.overlong()
        run.record.notes = {**job.notes, "overlong": overlong} if overlong else job.notes
        run.mark("done", meter=meter)
        run.drop_checkpoints()
    return run, False


def expert_plan(made: Plan, name: str, settings: Mapping[str, Any], wanted: Sequence[Preference]) -> Plan:
    """Return the plan of the run that ``made`` takes its experts from.

    Same task, base, adapters and seed; ``name`` is a method with one policy per preference, ``settings`` are checked
    by its ``Config``. It is the very run that a user would get by asking for it.
    """
    method = registry.get(name)
    given = made.resolved.recipe
    try:
        config = method.Config.model_validate(dict(settings))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}".lstrip(": ") for one in error.errors())
        raise RequestError(f"experts of {made.method.name}, trained by {name}: {told}") from None
    plain = config.model_dump(mode="json")
    recipe = Recipe(
        method=name, task=given.task, policy=given.policy, config=plain, prefs=list(map(list, wanted)), seed=made.seed
    )
    own = made.resolved.as_given
    sets = [text for text in own["set"] if str(text).startswith("task.")]
    sets += [
        f"policy={given.policy.model_dump_json()}",
        *(f"{key}={json.dumps(value)}" for key, value in plain.items()),
    ]
    as_given = {"method": name, "task": own["task"], "recipe_file": None, "recipe": None, "set": sets}
    resolved = replace(made.resolved, recipe=recipe, config=config, as_given=as_given, recipe_path=None)
    vectors = list(wanted)
    return replace(made, method=method, resolved=resolved, preferences=vectors, given=vectors).identified()


def context_of(run: Run, results: Path, progress: Progress = silent) -> tuple[Method, RunContext]:
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
    task = make_task(card, results, progress)
    if task.hash != record.card_hash:
        raise RequestError(
            f"run {run.path}: its task card has changed since (hash {record.card_hash} then, {task.hash} now): "
            "the base model or the data it points to is not the same; restore it or train again"
        )
    return method, RunContext.of(
        task,
        run,
        config=method.Config.model_validate(recipe["config"]),
        preferences=_trained(record, task),
        policy_spec=PolicySpec.model_validate(recipe["policy"]),
    )


def _trained(record: RunRecord, task: Task) -> list[Preference]:
    return [tuple(row) for row in record.preferences] if record.preferences else task.grid

"""``moalign train``: from a request to a plan, and from a plan to its finished run: found, resumed or trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moalign.config import find, load
from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.recipe import PolicySpec, Recipe, RewardsSpec, RolloutSpec
from moalign.config.strict import RECORDED, faults
from moalign.core import preferences, processes
from moalign.core.errors import RequestError
from moalign.core.memory import release
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, prefixed, silent
from moalign.experiment.arguments import refuse_both, refuse_contradiction
from moalign.lm import backends, model_folder
from moalign.lm.vllm_engine import VllmEngine
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.preflight.inputs import require_rows
from moalign.preflight.request import of_recipe, require_sound, require_suited, to_train
from moalign.rewards.judge import total
from moalign.rewards.panel import usage_of
from moalign.runs import trackers
from moalign.runs.meter import Meter
from moalign.runs.record import FILE
from moalign.runs.run import Run
from moalign.runs.shadow import held
from moalign.runs.store import RunStore
from moalign.tasks.load import make_task
from moalign.tasks.task import WHERE, Task, fingerprint
from moalign.training.job import Job, RunContext
from moalign.training.settings import GroupsUsers, NamesFiles, NamesModels

DEFAULT_TASK = "sandbox"


@dataclass(frozen=True)
class TrainRequest:
    """A request as the user wrote it."""

    method: str
    task: str | None = None
    recipe: Path | None = None
    prefs: Sequence[str] = ()
    grid: int | None = None
    overrides: Sequence[str] = ()
    seed: int | None = None
    results: Path = Path("results")


@dataclass(frozen=True)
class Plan(ResolvedRequest):
    """A checked request with its task: nothing has been written or loaded yet."""

    request: TrainRequest
    method: Method
    task: Task
    seed: int
    given: list[Preference] | None
    """The vectors that were named; None: the task's distribution."""
    holdout: list[Preference] = field(default_factory=list)
    """Vectors that training must not see."""

    @property
    def preferences(self) -> list[Preference]:
        """The vectors to train (one policy each) or, for one policy, to draw from when given."""
        return self.given or self.task.grid

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the run's identifier is the hash of. Settings at their default are left out: new ones change nothing."""
        identity = {
            "card": self.task.hash,
            "config": self.config.model_dump(mode="json", exclude_defaults=True),
            "policy": self.recipe.policy.model_dump(mode="json", exclude_defaults=True),
            "seed": self.seed,
            "prefs": self.given,
        }
        if self.holdout:
            identity["holdout"] = self.holdout
        rollout = self.recipe.rollout.model_dump(mode="json", exclude_defaults=True, exclude={"gpu_memory"})
        if rollout:  # other random numbers: other samples
            identity["rollout"] = rollout
        if self.recipe.snapshots:
            identity["snapshots"] = self.recipe.snapshots
        models = self.config.models if isinstance(self.config, NamesModels) else {}
        if models:  # their content: another model in the same folder makes another run
            identity["models"] = {name: fingerprint(model, None, name) for name, model in models.items()}
        if isinstance(self.config, NamesFiles) and (contents := self.config.contents()):
            identity["files"] = contents
        return identity

    @property
    def store(self) -> RunStore:
        """The results folder's runs."""
        return RunStore(self.request.results)

    @property
    def folder(self) -> Path:
        """Where the run is or will be."""
        return self.store.folder(self.method.name, self.card.name, self.identity)

    @property
    def existing_run(self) -> Run | None:
        """The run, when this request was made before; RequestError when that was under other defaults."""
        return self.store.lookup(self.method.name, self.card.name, self.identity, self.recipe.model_dump(mode="json"))

    def open(self) -> Run:
        """Return the run, made now or as it was left; before it is made, what cannot be built or served is refused."""
        if self.method.capabilities.trains and self.card.template.chat:
            require_rows(self.task, self.config)
        if self.card.rewards is None:  # reward models of the task's own are trained on first use
            _ = self.task.panel
        if self.task.engine is not None and self.method.capabilities.needs_online_rewards:
            _ = self.task.engine.llm
        return self.store.open(
            self.method.name,
            self.card.name,
            self.identity,
            card_hash=self.task.hash,
            seed=self.seed,
            preferences=self.given,
            recipe={**self.recipe.model_dump(mode="json"), "card": self.card.model_dump(mode="json")},
            as_given=self.as_given,
        )

    def context(self, run: Run) -> RunContext:
        """Return what a policy of the finished run needs."""
        return RunContext.of(
            self.task, run, config=self.config, preferences=self.preferences, policy_spec=self.recipe.policy
        )

    def job(self, run: Run, meter: Meter, progress: Progress = silent) -> Job:
        """Return the run as a job to train; what it costs is counted by ``meter``."""
        self.task.progress = progress

        def experts(method: str, settings: dict[str, Any], wanted: Sequence[Preference]) -> Run:
            before = meter.seconds
            report = prefixed(progress, f"experts by {method}")
            expert, _ = train(expert_plan(self, method, settings, wanted), report, wait=True)
            self.task.progress = progress
            expert.require_weights()
            meter.add_run(expert.record.cost.model_dump(), expert.record.seconds, meter.seconds - before)
            return expert

        return Job.of(
            self.task,
            run,
            config=self.config,
            preferences=self.preferences,
            policy_spec=self.recipe.policy,
            meter=meter,
            seed=self.seed,
            given_preferences=self.given,
            progress=progress,
            snapshots=self.recipe.snapshots,
            experts=experts,
        )

    def mirrors(self, run: Run) -> trackers.Mirrors:
        """Return the recipe's trackers, which show the metrics of a run while it trains."""
        about = {"method": self.method.name, "task": self.card.name, "card": self.task.hash, "seed": self.seed}
        shown = self.recipe.trackers if processes.is_writer() else []
        return trackers.Mirrors(shown, run.path, {**about, **run.record.recipe["config"]})


# -- planning --------------------------------------------------------------------------------------------------------


def resolve(request: TrainRequest) -> ResolvedRequest:
    """Check a request's recipe, settings and card; what they point to (model, data) is not looked at."""
    method = registry.get(request.method)
    recipe = request.recipe
    if recipe is None:
        task = DEFAULT_TASK if request.task is None else request.task
        recipe = find.find_recipe_file(task, request.method)
        return load.load_recipe(recipe, method.name, task, request.overrides, method.Config)
    of = load.recipe_names(recipe)[0]
    if of != request.method:
        raise RequestError(f"--recipe {recipe}: it is a recipe of {of}, but the method asked for is {request.method}")
    return load.load_recipe(recipe, method.name, request.task, request.overrides, method.Config)


def checked(request: TrainRequest, resolved: ResolvedRequest) -> tuple[int, list[Preference] | None, list[Preference]]:
    """Return seed, vectors to train on and vectors held out; refuses what is wrong whatever model and data are."""
    method, seed = registry.get(request.method), resolved.recipe.seed if request.seed is None else request.seed
    wanted = _preferences(request, resolved)
    if seed != resolved.recipe.seed:
        refuse_contradiction("--seed", "seed", request.overrides)
    if wanted != of_recipe(resolved):
        refuse_contradiction("--prefs" if request.prefs else "--grid", "prefs", request.overrides)
    require_sound(method, resolved, seed)
    trained, holdout = to_train(method, resolved, wanted)
    require_suited(resolved, trained)
    return seed, trained, holdout


def plan(request: TrainRequest, progress: Progress = silent) -> Plan:
    """Check a request and everything that it points to; raises RequestError with every problem."""
    method, resolved = registry.get(request.method), resolve(request)
    seed, given, holdout = checked(request, resolved)
    recipe = resolved.recipe
    task = make_task(resolved.card, request.results, progress, recipe.policy, recipe.rewards)
    task.engine = _engine(method, task, recipe.policy, recipe.rollout)
    made = Plan(**vars(resolved), request=request, method=method, task=task, seed=seed, given=given, holdout=holdout)
    _ = made.identity  # a model that is not there is a problem of the request
    if isinstance(made.config, GroupsUsers):
        task.require_groups(made.config.clusters, "clusters")
    return made


def _engine(method: Method, task: Task, policy: PolicySpec, rollout: RolloutSpec) -> VllmEngine | None:
    """Return what samples for a run where that is not our own engine; nothing is loaded yet."""
    if rollout.engine == "hf":
        return None
    experts = len(task.names) if method.capabilities.interpolates else 1
    return VllmEngine(
        rollout,
        lambda: model_folder.resolve(*task.base_source(), WHERE),
        task.card.dtype,
        policy.lora.r * experts,
        task.card.generation.max_tokens,
    )


def _preferences(request: TrainRequest, resolved: ResolvedRequest) -> list[Preference] | None:
    """Return the vectors of ``--prefs``, ``--grid``, or the recipe; None for the task's distribution."""
    names = resolved.card.objective_names
    refuse_both(request.prefs, request.grid)
    if request.prefs:
        return [preferences.parse(text, resolved.card.objective_words) for text in request.prefs]
    return of_recipe(resolved) if request.grid is None else preferences.grid_of(len(names), request.grid)


def expert_plan(of: Plan, name: str, settings: Mapping[str, Any], wanted: Sequence[Preference]) -> Plan:
    """Return the plan of the run that ``of`` takes its experts from.

    Same task, base, adapters and seed; ``name`` is a method with one policy per preference, ``settings`` are checked
    by its ``Config``. It is the very run that a user would get by asking for it.
    """
    method = registry.get(name)
    try:
        config = method.Config.model_validate(dict(settings))
    except ValidationError as error:
        raise RequestError(f"experts of {of.method.name}, trained by {name}: {'; '.join(faults(error))}") from None
    plain, policy, vectors = config.model_dump(mode="json"), of.recipe.policy, list(wanted)
    recipe = Recipe(
        method=name, task=of.recipe.task, policy=policy, rewards=of.recipe.rewards, rollout=of.recipe.rollout,
        config=plain, prefs=list(map(list, vectors)), seed=of.seed,
    )  # fmt: skip
    sets = [text for text in of.as_given["set"] if str(text).startswith("task.")]
    sets += [f"policy={policy.model_dump_json()}", *(f"{key}={json.dumps(value)}" for key, value in plain.items())]
    if of.recipe.rewards != RewardsSpec():
        sets.append(f"rewards={of.recipe.rewards.model_dump_json()}")
    if of.recipe.rollout != RolloutSpec():
        sets.append(f"rollout={of.recipe.rollout.model_dump_json()}")
    as_given = {"method": name, "task": of.as_given["task"], "recipe_file": None, "recipe": None, "set": sets}
    return replace(
        of, method=method, recipe=recipe, config=config, as_given=as_given, recipe_path=None, given=vectors, holdout=[]
    )


# -- training --------------------------------------------------------------------------------------------------------


def train(plan: Plan, progress: Progress = silent, wait: bool = False) -> tuple[Run, bool]:
    """Train the planned run, or find it finished; returns (run, whether it was found finished).

    Raises RequestError when another process is training it (``wait``: waits for that process instead); what was done
    before a failure or an interruption is kept, and the same request goes on from there. Several processes
    (:mod:`moalign.core.processes`) train the run together.
    """
    existing = plan.existing_run
    if processes.agree(existing is not None and existing.record.status == "done"):
        run = existing or Run.load(plan.folder)
        if processes.is_writer():
            run.drop_leftovers()
        return run, True
    judges: dict[str, dict[str, Any]] = {}
    if plan.card.gold_objectives:
        judges = _asked_before(plan, progress)
        release()
    run = plan.open()
    if wait and run.is_locked():
        progress(f"waiting for {run.path.name}, which another process trains", 0, 1)
    with held(run, wait) as (mine, meter):
        if meter is not None:
            with _counting_judges(plan, mine, judges):
                job = plan.job(mine, meter, progress)
                with plan.mirrors(mine) as mine.mirrors:
                    plan.method.train(job)
                overlong = plan.task.overlong()
                found = {"overlong": overlong or None, "base": plan.task.base_sum}
                mine.record.notes = {**job.notes, **{key: value for key, value in found.items() if value is not None}}
    return (run if processes.is_writer() else Run.load(run.path)), meter is None


def _asked_before(plan: Plan, progress: Progress) -> dict[str, dict[str, Any]]:
    """Let the judge's own scorers judge the base, and return what judges were asked for it.

    A judge that cannot judge is seen before training so. A function of its own: what it loads is let go of.
    """
    judging = make_task(plan.card, plan.request.results, progress)
    _ = judging.judge_normaliser
    return usage_of(judging.panel, judging.gold_panel)


@contextlib.contextmanager
def _counting_judges(plan: Plan, run: Run, asked: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """Note what LLM judges were asked for a run, before the block and in it, also when it fails or is interrupted.

    Of several processes' questions those of the others are known when the block has ended well.
    """
    judged = any(spec.kind == "judge" for spec in (*plan.card.objectives, *(plan.card.gold_objectives or ())))
    earlier, parts = run.record.notes.get("judges", {}), [asked]
    try:
        yield
        parts += processes.gather(usage_of(plan.task.panel)) if judged else []
    except BaseException:
        if judged:  # the panel of learned rewards may be what was interrupted: it would be trained on here
            parts.append(usage_of(plan.task.panel))
        raise
    finally:
        if judged:
            judges = dict(earlier)
            for part in parts:
                judges |= {name: total(usage, judges.get(name, {})) for name, usage in part.items()}
            run.record.notes = {**run.record.notes, "judges": judges}


@contextlib.contextmanager
def damaged(run: Run) -> Iterator[None]:
    """Turn what a record without a part, or with one of another kind, leads to into a RequestError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            why = "; ".join(faults(error)[:3])
        raise RequestError(
            f"{run.path / FILE}: not the record of a run that this moalign can read ({why}); move the run's folder "
            "away to train it again"
        ) from error


RENAMED = {"kl_target": "kl_budget"}
"""Settings by the names that older records have."""


def _by_todays_names(config: Any) -> Any:
    """Return a record's settings, those of stages and experts included, with today's names."""
    if not isinstance(config, dict):
        return config
    return {RENAMED.get(name, name): _by_todays_names(value) for name, value in config.items()}


def is_reward_model(run: Run) -> bool:
    """Whether a run is one of ``moalign reward train``."""
    return "card" not in run.record.recipe and "settings" in run.record.recipe


def method_of(run: Run) -> Method:
    """Return the method that a run was trained by; RequestError for a reward model's run."""
    if is_reward_model(run):
        raise RequestError(
            f"run {run.path}: it is no run of moalign train: its record (loss {run.record.method}) is a reward "
            f"model's; moalign reward eval looks at it, and an objective has it as its model ({run.path}/model)"
        )
    return registry.get(run.record.method)


def context_of(run: Run, results: Path, progress: Progress = silent) -> tuple[Method, RunContext]:
    """Return the method and context of a finished run, from its record alone.

    Raises RequestError when the run is not finished, or when what its card points to (base, data) is gone or
    has changed since.
    """
    record = run.record
    run.require_done()
    method = method_of(run)
    with damaged(run):
        card = TaskCard.model_validate(record.recipe["card"], context=RECORDED)
        config = method.Config.model_validate(_by_todays_names(record.recipe["config"]))
        policy = PolicySpec.model_validate(record.recipe["policy"])
        rewards = RewardsSpec.model_validate(record.recipe.get("rewards") or {})
        rollout = RolloutSpec.model_validate(record.recipe.get("rollout") or {})
    if wrong := backends.problems(policy, card):
        raise RequestError(*(f"run {run.path}: {text}" for text in wrong))
    task = make_task(card, results, progress, policy, rewards)
    if task.hash != record.card_hash:
        raise RequestError(
            f"run {run.path}: its task card has changed since (hash {record.card_hash} then, {task.hash} now): "
            "the base model or the data it points to is not the same (restore it), or an older moalign, whose hashes "
            "were made otherwise, made this run; train again"
        )
    if rollout.engine != "hf" and backends.vllm_answers(card):  # else it answers by our own engine
        task.engine = _engine(method, task, policy, rollout)
    return method, RunContext.of(
        task,
        run,
        config=config,
        preferences=[tuple(row) for row in record.preferences or task.grid],
        policy_spec=policy,
    )

"""``moalign eval``: the same evaluation for all methods.

Policies answer the task's evaluation prompts at every preference of a grid, the reward panel scores the answers, and
``pareto/`` turns the score matrix into indicators. Methods are not told apart by name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.config.objectives import JudgeObjective, ObjectiveSpec
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, WorkError
from moalign.core.preferences import Preference, same, typed
from moalign.core.progress import Progress, silent
from moalign.core.text import command
from moalign.evaluation import answers, at_kl
from moalign.evaluation.answers import respond
from moalign.evaluation.divergence import KlToBase
from moalign.evaluation.result import (
    AnsweringCost,
    EvalResult,
    EvaluatedPoint,
    Generalisation,
    Indicators,
    Interval,
    Judgement,
    Optimum,
    ProxyPoint,
    ProxyReward,
    Quality,
    SecondReference,
    Side,
    Volume,
)
from moalign.evaluation.user_groups import of_groups
from moalign.lm import quality
from moalign.methods.base import Method
from moalign.pareto import front, indicators, statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.report import verdict
from moalign.rewards.panel import usage_of
from moalign.runs import atomic
from moalign.tasks.task import Task
from moalign.training.job import RunContext

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` returns: the result, and the scores it was made from."""

    result: EvalResult
    scores: Matrix
    """Normalised scores ``[prompts, preferences, objectives]``: the unit of every paired comparison."""


def preferences_for(method: Method, context: RunContext, requested: Sequence[Preference] | None) -> list[Preference]:
    """Return the preferences to evaluate: those requested, else the task's grid, or the trained ones where a method is
    not ``steerable``. One of these that was typed with fewer digits is that one.

    Raises RequestError when such a method is requested to answer for others.
    """
    steerable = method.capabilities.steerable
    known = list(context.task.grid if steerable else context.preferences)
    found = []
    for preference in requested or ():
        own = next((w for w in known if same(w, preference)), None)
        if own is None and not steerable:
            raise RequestError(
                f"--prefs {typed(preference)}: {method.name} answers only for the preferences it was trained on: "
                f"{'; '.join(map(typed, known))}"
            )
        found.append(preference if own is None else own)
    return list(dict.fromkeys(found)) or known  # two spellings of one preference are asked once


def names(task: Task, preferences: Sequence[Preference], samples: int | None = None) -> tuple[str, str]:
    """Return the names (without suffix) of an evaluation's record and answers; ``eval`` on the task's own grid."""
    return names_on(task.grid, preferences, None if samples == task.card.evaluation.samples else samples)


def names_on(
    grid: Sequence[Preference], preferences: Sequence[Preference], samples: int | None = None
) -> tuple[str, str]:
    """Return the same for a task whose own grid is ``grid``; ``samples`` None: as many as its card says."""
    key = ""
    if list(preferences) != list(grid):
        key += "-" + hashlib.sha256(json.dumps([list(w) for w in preferences]).encode()).hexdigest()[:8]
    if samples is not None:
        key += f"-x{samples}"
    return f"eval{key}", f"responses{key}"


def evaluate(
    method: Method,
    context: RunContext,
    requested: Sequence[Preference] | None = None,
    progress: Progress = silent,
    samples: int | None = None,
) -> Evaluation:
    """Evaluate a finished run, or read its stored evaluation.

    The answers for all preferences are generated and scored in batches. Responses with their scores go to
    ``responses*.parquet``, the record to ``eval*.json``, both in the run's folder.

    Args:
        requested: the preferences to answer for; None: see :func:`preferences_for`.
        samples: answers to each prompt at each preference, averaged before resampling; None: the task card's.
            More samples estimate the same numbers with less noise.
    """
    preferences = preferences_for(method, context, requested)
    samples = samples or context.task.card.evaluation.samples
    file, table_name = names(context.task, preferences, samples)
    path = context.run.path / f"{file}.json"
    stored = _stored(context, path, table_name, preferences, samples)
    if stored is not None:
        return stored
    atomic.require_new(path)
    answered = respond(method, context, preferences, samples, table_name, progress)
    started, table, divergences = time.monotonic(), answered.table, answered.divergences
    context.run.write_table(table_name, table)
    scores = scores_of(context, table, preferences, samples)
    judgement = judge(context.task, preferences, scores)
    _describe(judgement.points, context.task, table["response"].tolist(), divergences)
    proxy = proxy_reward(context, table, preferences, samples)
    judges = usage_of(context.task.panel, context.task.gold_panel)
    judged = quality_of(context.task, table["response"].tolist(), divergences)
    result = EvalResult(
        **about(method, context),
        **dict(judgement),
        samples=samples,
        quality=judged,
        cost=AnsweringCost(
            tokens_generated=answered.tokens_generated,
            reward_calls=answered.reward_calls,
            seconds=round(answered.seconds + time.monotonic() - started, 3),
            peak_memory_bytes=answered.peak_memory_bytes,
        ),
        proxy_reward=proxy,
        gap=None if proxy is None else proxy.hypervolume - judgement.hypervolume,
        overlong=context.task.overlong() or None,
        judges=judges or None,
        engine=None if context.task.engine is None else "vllm",
        generalisation=_generalisation(method, context, preferences, scores, progress, samples),
        groups=of_groups(context.task, preferences, scores),
        warnings=_warnings(context, judged, judgement, judges) or None,
    )
    atomic.write_json(path, result.content)
    answers.judged(context, table_name)
    at_kl.add(result, context.task)  # may take half a minute once: should it be interrupted, it is added when read
    if result.frontier is not None:
        atomic.write_json(path, result.content)
    return Evaluation(result, scores)


def _warnings(context: RunContext, judged: Quality, judgement: Judgement, judges: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the run's own warnings, and those about its answers and its judges."""
    points = [point.content for point in judgement.points]
    of_answers = [*verdict.cautions(judged.content), *verdict.cautions_at(judged.content, points)]
    recorded = context.run.record.recipe.get("rollout") or {}
    if recorded.get("engine") == "vllm" and context.task.engine is None:
        of_answers.append("answers by our own engine: vLLM, which sampled in training, cannot sample here")
    return (*context.run.record.notes.get("warnings", ()), *of_answers, *verdict.unread(judges))


def about(method: Method, context: RunContext) -> dict[str, Any]:
    """Return the fields of :class:`~moalign.evaluation.result.EvaluatedRun`."""
    return {
        "run": str(context.run.path),
        "run_id": context.run.record.run_id,
        "method": method.name,
        "task": context.task.card.name,
        "card_hash": context.task.hash,
        "seed": context.run.record.seed,
        "objectives": tuple(context.task.names),
    }


def held_out(context: RunContext) -> list[Preference]:
    """Return the preferences that were held out of the run's training."""
    return [tuple(row) for row in context.run.record.recipe.get("holdout") or ()]


def _has(vectors: Sequence[Preference], preference: Preference) -> bool:
    return any(same(vector, preference) for vector in vectors)


def _generalisation(
    method: Method,
    context: RunContext,
    preferences: Sequence[Preference],
    scores: Matrix,
    progress: Progress,
    samples: int,
) -> Generalisation | None:
    """Return the numbers of the evaluation separately for trained and for held-out preferences.

    Held-out preferences that are not among ``preferences`` get an evaluation of their own. None where none was held
    out, or where ``preferences`` are such alone.
    """
    held = held_out(context)
    if all(_has(held, w) for w in preferences) or not held:
        return None
    unseen = [k for k, w in enumerate(preferences) if _has(held, w)]
    if all(_has(preferences, w) for w in held):
        others, their_scores = [preferences[k] for k in unseen], scores[:, unseen]
    else:
        others, their_scores = list(held), evaluate(method, context, held, progress, samples).scores
    seen = [k for k in range(len(preferences)) if k not in unseen]

    def side(vectors: Sequence[Preference], part: Matrix) -> Side:
        judgement = judge(context.task, vectors, part)
        share = None
        if judgement.optimum is not None:
            most = indicators.inner_product(np.array(vectors), judgement.optimum.points)
            share = judgement.indicators.inner_product / most
        volume = {name: getattr(judgement, name) for name in Volume.model_fields}
        return Side(**volume, prefs=tuple(vectors), utility_share=share)

    return Generalisation(
        trained=side([preferences[k] for k in seen], scores[:, seen]), held_out=side(others, their_scores)
    )


def _describe(
    points: Sequence[EvaluatedPoint], task: Task, responses: list[str], divergences: Sequence[KlToBase]
) -> None:
    """Add the KL to base and the collapse of each preference to its point."""
    each = len(responses) // len(points)
    for k, (point, kl) in enumerate(zip(points, divergences, strict=True)):
        own = quality_of(task, responses[k * each : (k + 1) * each], [kl])
        point.kl, point.kl_bound = kl.nats, kl.bound
        point.collapsed, point.mean_length = own.rate, own.mean_length


def quality_of(task: Task, responses: list[str], divergences: Sequence[KlToBase]) -> Quality:
    """Return how many responses are collapsed, and the mean KL to base over the preferences, None if one is unknown."""
    known = [kl.nats for kl in divergences if kl.nats is not None]
    mean = float(np.mean(known)) if len(known) == len(divergences) else None
    collapse = quality.collapse_report(task.tokens(responses), task.short_below)
    return Quality(**collapse, kl=mean, kl_bound=any(kl.bound for kl in divergences))


def _stored(
    context: RunContext, path: Path, table_name: str, preferences: Sequence[Preference], samples: int
) -> Evaluation | None:
    """Return the stored evaluation; None for none, and for one of another task card."""
    if not path.is_file():
        return None
    stored = EvalResult.load(path)
    if stored.card_hash != context.task.hash:
        return None
    if stored.frontier is None:  # of a version that did not know it
        at_kl.add(stored, context.task)
    scores = _stored_scores(context, table_name, path, preferences, samples)
    _require_same_scale(context.task, stored, scores, path)
    answers.judged(context, table_name)  # should a kill have come between the two
    return Evaluation(stored, scores)


def _stored_scores(
    context: RunContext, name: str, made: Path, preferences: Sequence[Preference], samples: int
) -> Matrix:
    """Return the scores of a stored table of answers; RequestError unless it is the one that ``made`` comes from."""
    again = f"delete both and evaluate again: {command('eval', context.run.path)}"
    table = context.run.read_table(name, f"{made.name} was made from it; {again}")
    try:
        return scores_of(context, table, preferences, samples)
    except (LookupError, TypeError, ValueError) as error:
        raise RequestError(
            f"{context.run.path / name}.parquet: not the answers that {made.name} was made from "
            f"({type(error).__name__}: {error}); {again}"
        ) from error


def _require_same_scale(task: Task, stored: EvalResult, scores: Matrix, path: Path) -> None:
    """Raise RequestError where the task's scale is another one than the stored points were put on."""
    stored_means, means = np.array([point.mean for point in stored.points]), scores.mean(axis=0)
    if stored_means.shape != means.shape:
        raise RequestError(
            f"{path}: it has {len(stored_means)} preferences, and its answers are for {len(means)}; delete {path.name} "
            f"and evaluate again: {command('eval', path.parent)}"
        )
    if np.isfinite(means).all() and not np.allclose(means, stored_means, rtol=0, atol=1e-6):
        raise RequestError(
            f"{path}: judged on another scale than that of {task.folder} (its normaliser was fitted again, or is that "
            f"of another machine); put the scale back that came with the run, take a results folder without one, or "
            f"delete {path.name} and evaluate again: {command('eval', path.parent)}"
        )


def scores_of(context: RunContext, table: pd.DataFrame, preferences: Sequence[Preference], samples: int) -> Matrix:
    """Return normalised scores ``[prompts, preferences, objectives]``, several samples of a prompt averaged."""
    card = context.task.card
    raw = table[context.task.names].to_numpy(dtype=np.float64)
    unit = context.task.judge_normaliser.unit(raw)
    return _per_prompt(unit, preferences, samples, _with_gaps((*card.objectives, *(card.gold_objectives or ()))))


def _with_gaps(specs: Sequence[ObjectiveSpec]) -> list[bool]:
    """Return of each objective whether its judge may leave a score out; of two of a name the later one judges."""
    judged = {spec.name: spec for spec in specs}
    return [isinstance(spec, JudgeObjective) and spec.unreadable == "leave-out" for spec in judged.values()]


def _per_prompt(unit: Matrix, preferences: Sequence[Preference], samples: int, gaps: Sequence[bool]) -> Matrix:
    """Return scores ``[preferences x prompts x samples, objectives]`` as ``[prompts, preferences, objectives]``.

    A score that a judge left out (NaN; of objectives with ``gaps``) is in no mean: that of its prompt is over the other
    samples, and a prompt without any counts as the mean of the others at its preference. WorkError where that has none,
    either. Any other NaN is damage, and stays.
    """
    each = unit.reshape(len(preferences), -1, samples, unit.shape[-1])
    means: Matrix = each.mean(axis=2)
    if np.isnan(means[..., list(gaps)]).any():
        known = np.ma.masked_invalid(each).mean(axis=2)
        of_preference = known.mean(axis=1, keepdims=True)
        if np.ma.getmaskarray(of_preference)[..., list(gaps)].any():
            raise WorkError(
                "a judge left out every score of an objective at a preference, so that it has no mean; moalign check "
                "shows what the judge answers to an example"
            )
        filled = np.where(np.ma.getmaskarray(known), of_preference.data, known.data)
        means = np.where(np.array(gaps), filled, means)
    return means.transpose(1, 0, 2)


def judge(task: Task, preferences: Sequence[Preference], scores: Matrix) -> Judgement:
    """Return points, hypervolume, optimal share and indicators of normalised scores ``[prompts, k, m]``."""
    spec, grid, normaliser = task.card.evaluation, np.array(preferences), task.judge_normaliser
    lo, hi = np.array(normaliser.lo), np.array(normaliser.hi)
    ref, second = task.card.reference_point, task.card.sensitivity_point
    means = scores.mean(axis=0)
    drawn = statistics.resample([scores], spec.bootstrap, spec.seed)
    bounds = statistics.interval(drawn)
    mask = front.nondominated(means)
    steered = indicators.controllability(grid, means)
    judgement = Judgement(
        hypervolume=hypervolume(means, ref),
        hypervolume_interval=_of_hypervolume(drawn, ref),
        indicators=Indicators(
            tau=steered["tau"] if len(set(preferences)) > 1 else None,
            tau_per_objective=tuple(steered["per_objective"]),
            inner_product=indicators.inner_product(grid, means),
            expected_utility=indicators.expected_utility(grid, means),
            spacing=indicators.spacing(means),
        ),
        points=tuple(
            EvaluatedPoint(
                preference=preference,
                mean=means[k].tolist(),
                interval=bounds[:, k].T.tolist(),
                raw=(lo + means[k] * (hi - lo)).tolist(),
                raw_interval=(lo + bounds[:, k] * (hi - lo)).T.tolist(),
                nondominated=bool(mask[k]),
            )
            for k, preference in enumerate(preferences)
        ),
        reference_point=tuple(ref),
        sensitivity=SecondReference(reference_point=tuple(second), hypervolume=hypervolume(means, second)),
        front=int(mask.sum()),
        prompts=len(scores),
    )
    best = task.optimum(preferences, task.eval_prompts)
    if best is not None:
        unit = normaliser.unit(best)
        judgement.indicators.regret = float(np.mean(indicators.regret(grid, means, unit)))
        judgement.indicators.igd_plus = indicators.igd_plus(means, unit)
        _add_optimum(judgement, unit)
    return judgement


def _of_hypervolume(drawn: statistics.Resampled, ref: Sequence[float]) -> Interval:
    low, high = statistics.interval(drawn.each(lambda means: hypervolume(means, ref)), least=0.0)
    return float(low), float(high)


def _add_optimum(judgement: Judgement, points: Matrix) -> None:
    """Fill in the optimum, given by its points ``[k, m]``, and the share of it that was reached."""
    most = hypervolume(points, judgement.reference_point)
    judgement.optimum = Optimum(hypervolume=most, points=tuple(map(tuple, points.tolist())))
    # A reference point above the whole optimum leaves no volume to take a share of.
    low, high = judgement.hypervolume_interval
    judgement.optimal_share = judgement.hypervolume / most if most > 0 else None
    judgement.optimal_share_interval = (low / most, high / most) if most > 0 else None


def at_reference(evaluation: Evaluation, task: Task, ref: Sequence[float]) -> EvalResult:
    """Return the result with hypervolume, interval and optimal share from another reference point, ``[objectives]``.

    The interval is of the same resamples. The stored file is not changed.
    """
    spec = task.card.evaluation
    drawn = statistics.resample([evaluation.scores], spec.bootstrap, spec.seed)
    volume, believed, gap = hypervolume(evaluation.scores.mean(axis=0), ref), evaluation.result.proxy_reward, None
    if believed is not None:
        there = {"hypervolume": hypervolume([point.mean for point in believed.points], ref)}
        believed = believed.model_copy(update={**there, "hypervolume_interval": None})
        gap = believed.hypervolume - volume
    changed = evaluation.result.model_copy(
        update={
            "hypervolume": volume,
            "proxy_reward": believed,
            "gap": gap,
            "hypervolume_interval": _of_hypervolume(drawn, ref),
            "reference_point": tuple(float(number) for number in ref),
            "generalisation": None,  # its hypervolumes are from the card's own reference point
        }
    )
    if changed.optimum is not None:
        _add_optimum(changed, np.array(changed.optimum.points))
    return changed


def proxy_reward(
    context: RunContext, table: pd.DataFrame, preferences: Sequence[Preference], samples: int
) -> ProxyReward | None:
    """Return points and hypervolume by the rewards that the method was trained on, where these are not the judge's."""
    task = context.task
    if task.judge_panel is task.panel:
        return None
    spec, ref = task.card.evaluation, task.card.reference_point
    raw = task.panel.score(table["prompt"].tolist(), table["response"].tolist(), gaps=True)
    scores = _per_prompt(task.normaliser.unit(raw), preferences, samples, _with_gaps(task.card.objectives))
    means = scores.mean(axis=0)
    points = [ProxyPoint(preference=w, mean=row) for w, row in zip(preferences, means.tolist(), strict=True)]
    return ProxyReward(
        points=tuple(points),
        hypervolume=hypervolume(means, ref),
        hypervolume_interval=_of_hypervolume(statistics.resample([scores], spec.bootstrap, spec.seed), ref),
    )

"""``moalign eval``: the same evaluation for all methods.

Policies answer the task's evaluation prompts at every preference of a grid, the reward panel scores the answers, and
``pareto/`` turns the score matrix into indicators. Methods are not told apart by name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label, same
from moalign.core.progress import Progress, silent
from moalign.evaluation import divergence
from moalign.evaluation.divergence import KlToBase
from moalign.lm import quality
from moalign.methods.base import Method
from moalign.pareto import front, hypervolume, indicators, statistics
from moalign.runs.record import read_evaluation
from moalign.tasks.responses import columns
from moalign.tasks.task import Task
from moalign.training.job import RunContext

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Evaluation:
    """Scores of one run on one grid, and the record made from them."""

    told: dict[str, Any]
    """The content of ``eval.json``."""
    scores: Matrix
    """Normalised scores ``[prompts, preferences, objectives]``: the unit of every paired comparison."""


def preferences_for(method: Method, context: RunContext, requested: Sequence[Preference] | None) -> list[Preference]:
    """Return the preferences to evaluate: those requested, else the task's grid, or the trained ones where a method is
    not ``steerable``.

    Raises RequestError when such a method is requested to answer for others.
    """
    if method.capabilities.steerable:
        return list(requested) if requested else context.task.grid
    if requested:
        unseen = [w for w in requested if w not in context.preferences]
        if unseen:
            served = "; ".join(label(w) for w in context.preferences)
            raise RequestError(
                f"--prefs {label(unseen[0])}: {method.name} answers only for the preferences it was trained on: "
                f"{served}"
            )
        return list(requested)
    return list(context.preferences)


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
    if path.is_file():
        record = read_evaluation(path)
        if record["card_hash"] == context.task.hash:
            stored = _scores(context, context.run.read_table(table_name), preferences, samples)
            return Evaluation({"samples": samples, **record}, stored)  # older records lack it
    started = time.monotonic()
    table, cost, divergences = respond(method, context, preferences, progress, samples)
    context.run.write_table(table_name, table)
    scores = _scores(context, table, preferences, samples)
    record = {
        "run": str(context.run.path),
        "run_id": context.run.record.run_id,
        "method": method.name,
        "task": context.task.card.name,
        "card_hash": context.task.hash,
        "seed": context.run.record.seed,
        "objectives": context.task.names,
        **judge(context.task, preferences, scores),
        "samples": samples,
        **proxy_reward(context, table, preferences),
        "quality": {**_collapse(context.task, table), **_kl(divergences)},
        "cost": {**cost, "seconds": round(time.monotonic() - started, 3)},
    }
    overlong = context.task.overlong()
    if overlong:
        record["overlong"] = overlong
    for point, kl in zip(record["points"], divergences, strict=True):
        point.update(kl=kl.nats, kl_bound=kl.bound)
    held = held_out(context)
    if held and not all(_has(held, w) for w in preferences):
        record["generalisation"] = _generalisation(method, context, preferences, scores, held, progress, samples)
    from moalign.runs import atomic

    atomic.write_json(path, record)
    return Evaluation(read_evaluation(path), scores)


def held_out(context: RunContext) -> list[Preference]:
    """Return the preferences that were held out of the run's training (its recipe's ``holdout``)."""
    return [tuple(row) for row in context.run.record.recipe.get("holdout") or ()]


def _has(vectors: Sequence[Preference], preference: Preference) -> bool:
    return any(same(vector, preference) for vector in vectors)


def _generalisation(
    method: Method,
    context: RunContext,
    preferences: Sequence[Preference],
    scores: Matrix,
    held: Sequence[Preference],
    progress: Progress,
    samples: int,
) -> dict[str, Any]:
    """Return the numbers of the evaluation separately for trained and for held-out preferences.

    The optimal share of each side is relative to the optimum for its own preferences. To compare the sides use the
    utility share (mean w.n over that of the optimum), since a hypervolume depends on how close its preferences lie.
    Held-out preferences that are not among ``preferences`` get an evaluation of their own.
    """
    if all(_has(preferences, w) for w in held):
        unseen = [k for k, w in enumerate(preferences) if _has(held, w)]
        others, their_scores = [preferences[k] for k in unseen], scores[:, unseen]
    else:
        others, their_scores = list(held), evaluate(method, context, held, progress, samples).scores
    seen = [k for k, w in enumerate(preferences) if not _has(held, w)]
    sides = {}
    for name, vectors, part in (
        ("trained", [preferences[k] for k in seen], scores[:, seen]),
        ("held_out", others, their_scores),
    ):
        judged = judge(context.task, vectors, part)
        keys = ("hypervolume", "hypervolume_ci", "optimal_share", "optimal_share_ci", "indicators")
        sides[name] = {"prefs": [list(w) for w in vectors], **{key: judged[key] for key in keys if key in judged}}
        if "optimum" in judged:
            most = indicators.inner_product(np.array(vectors), judged["optimum"]["points"])
            sides[name]["utility_share"] = judged["indicators"]["inner_product"] / most
    return sides


def respond(
    method: Method,
    context: RunContext,
    preferences: Sequence[Preference],
    progress: Progress = silent,
    samples: int | None = None,
) -> tuple[pd.DataFrame, dict[str, int], list[KlToBase]]:
    """Answer every evaluation prompt at every preference ``samples`` times (None: the card's), and score the answers.

    Returns the table (prompt, preference, response, one raw score per objective), the cost, and how far the policy of
    each preference has moved from the base.
    """
    import pandas as pd

    from moalign.policies.policy import respond_all
    from moalign.runs.meter import Meter

    spec = context.task.card.evaluation
    prompts = [prompt for prompt in context.task.eval_prompts for _ in range(samples or spec.samples)]
    meter = Meter()
    # Scores by which a policy chooses its answer are a cost of answering; those of the evaluation are not.
    metered = replace(context, panel=context.panel.with_meter(meter))
    done, total = 0, len(prompts) * len(preferences)

    def answered(count: int) -> None:
        nonlocal done
        done += count
        progress("answering", min(done, total), total)

    with _generators_restored():
        policies = [method.policy(metered, preference) for preference in preferences]
        sampling = context.task.sampling(spec.seed)
        answers = respond_all(policies, prompts, sampling, answered)
        divergences = divergence.from_base(context.task, policies, prompts, answers, sampling, progress)
        flat = [text for row in answers.responses for text in row]
        raw = context.task.judge_panel.score(prompts * len(preferences), flat, lambda d, n: progress("scoring", d, n))
    records = [response for k in range(len(preferences)) for response in answers.records(k)]
    table = pd.DataFrame(
        {
            "prompt": prompts * len(preferences),
            "preference": [label(w) for w in preferences for _ in prompts],
            **columns(records),
        }
    )
    for column, name in enumerate(context.task.names):
        table[name] = raw[:, column]
    return table, {"tokens_generated": answers.tokens, "reward_calls": meter.reward_calls}, divergences


def _collapse(task: Task, table: pd.DataFrame) -> quality.CollapseReport:
    return quality.collapse_report(task.tokens(table["response"].tolist()), task.short_below)


def _kl(divergences: Sequence[KlToBase]) -> dict[str, Any]:
    """Return the mean KL to base over the preferences, None where one is not known, and whether it is a bound."""
    known = [kl.nats for kl in divergences if kl.nats is not None]
    mean = float(np.mean(known)) if len(known) == len(divergences) else None
    return {"kl": mean, "kl_bound": any(kl.bound for kl in divergences)}


def _generators_restored() -> AbstractContextManager[None]:
    """Restore the state of torch's global generators afterwards: loading an adapter draws its initial weights."""
    import torch

    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _scores(context: RunContext, table: pd.DataFrame, preferences: Sequence[Preference], samples: int) -> Matrix:
    """Return normalised scores ``[prompts, preferences, objectives]``, several samples of a prompt averaged."""
    raw = table[context.task.names].to_numpy(dtype=np.float64)
    unit = context.task.judge_normaliser.unit(raw).reshape(len(preferences), -1, len(context.task.names))
    return unit.reshape(len(preferences), -1, samples, unit.shape[-1]).mean(axis=2).transpose(1, 0, 2)


def judge(task: Task, preferences: Sequence[Preference], scores: Matrix) -> dict[str, Any]:
    """Return points, hypervolume, optimal share and indicators of normalised scores ``[prompts, k, m]``."""
    spec, grid = task.card.evaluation, np.array(preferences)
    normaliser = task.judge_normaliser
    lo, hi = np.array(normaliser.lo), np.array(normaliser.hi)
    ref, second = task.card.reference_point, task.card.sensitivity_point
    means = scores.mean(axis=0)
    drawn = statistics.bootstrap_means(scores, spec.bootstrap, spec.seed)
    bounds = statistics.intervals(drawn)
    volumes = statistics.each_draw(drawn, lambda m: hypervolume.hypervolume(m, ref))
    volume = hypervolume.hypervolume(means, ref)
    mask = front.nondominated(means)
    points = [
        {
            "prefs": list(preferences[k]),
            "mean": means[k].tolist(),
            "ci": bounds[:, k].T.tolist(),
            "raw": (lo + means[k] * (hi - lo)).tolist(),
            "raw_ci": (lo + bounds[:, k] * (hi - lo)).T.tolist(),
            "nondominated": bool(mask[k]),
        }
        for k in range(len(preferences))
    ]
    record: dict[str, Any] = {
        "points": points,
        "hypervolume": volume,
        "hypervolume_ci": list(statistics.interval(volumes)),
        "ref": list(ref),
        "sensitivity": {"ref": list(second), "hypervolume": hypervolume.hypervolume(means, second)},
        "front": int(mask.sum()),
        "prompts": len(scores),
        "optimal_share": None,
        "indicators": _indicators(grid, means),
    }
    best = task.optimum(preferences, task.eval_prompts)
    if best is not None:
        unit = normaliser.unit(best)
        most = hypervolume.hypervolume(unit, ref)
        regrets = indicators.regret(grid, means, unit)
        record["optimal_share"] = volume / most
        record["optimal_share_ci"] = [value / most for value in record["hypervolume_ci"]]
        record["indicators"]["regret"] = float(np.mean(regrets))
        record["indicators"]["igd_plus"] = indicators.igd_plus(means, unit)
        record["optimum"] = {"hypervolume": most, "points": unit.tolist()}
    return record


def proxy_reward(context: RunContext, table: pd.DataFrame, preferences: Sequence[Preference]) -> dict[str, Any]:
    """Return the evaluation by the rewards that the method was trained on, where these are not the judge's.

    ``proxy_reward``: points and hypervolume by the training rewards, in their own normalised units; ``gap``: that
    hypervolume minus the judge's. A gap that grows during training is reward hacking.
    """
    task = context.task
    if task.judge_panel is task.panel:
        return {}
    raw = task.panel.score(table["prompt"].tolist(), table["response"].tolist())
    means = task.normaliser.unit(raw).reshape(len(preferences), -1, len(task.names)).mean(axis=1)
    truth = task.judge_normaliser.unit(table[task.names].to_numpy(dtype=np.float64))
    judged = truth.reshape(len(preferences), -1, len(task.names)).mean(axis=1)
    ref = task.card.reference_point
    volume = hypervolume.hypervolume(means, ref)
    points = [{"prefs": list(w), "mean": row.tolist()} for w, row in zip(preferences, means, strict=True)]
    return {
        "proxy_reward": {"points": points, "hypervolume": volume},
        "gap": volume - hypervolume.hypervolume(judged, ref),
    }


def _indicators(grid: Matrix, means: Matrix) -> dict[str, Any]:
    steered = indicators.controllability(grid, means)
    return {
        "tau": float(steered["tau"]),
        "tau_per_objective": [float(t) for t in steered["per_objective"]],
        "inner_product": indicators.inner_product(grid, means),
        "expected_utility": indicators.expected_utility(grid, means),
        "spacing": indicators.spacing(means),
    }

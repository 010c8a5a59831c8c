"""``moalign eval``: one judge for all methods.

Texts in, numbers out: a policy is asked for every preference of a grid on the task's evaluation prompts, the reward
panel scores the answers, and ``pareto/`` turns the score matrix into indicators. Nothing here knows a method's name.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label, same
from moalign.core.progress import Say, silent
from moalign.evaluation import divergence
from moalign.evaluation.divergence import KlToBase
from moalign.lm import quality
from moalign.methods.base import Method
from moalign.pareto import front, hypervolume, indicators, statistics
from moalign.tasks.task import Task, columns
from moalign.training.job import RunContext

if TYPE_CHECKING:
    import pandas as pd

    from moalign.runs.run import Run

Matrix = NDArray[np.float64]


@dataclass
class Evaluation:
    """Scores of one run on one grid, and what follows from them."""

    told: dict[str, Any]
    """The content of ``eval.json``."""
    scores: Matrix
    """Normalised scores ``[prompts, preferences, objectives]``: the unit of every paired comparison."""


def preferences_for(method: Method, context: RunContext, wanted: Sequence[Preference] | None) -> list[Preference]:
    """Return the vectors to evaluate: those wanted, else the task's grid, or the trained ones of a method that
    can serve no others (it says so by its capability)."""
    if method.capabilities.steerable:
        return list(wanted) if wanted else context.task.grid
    if wanted:
        unseen = [w for w in wanted if w not in context.preferences]
        if unseen:
            served = "; ".join(label(w) for w in context.preferences)
            raise RequestError(
                f"--prefs {label(unseen[0])}: {method.name} answers only for the preferences it was trained on: "
                f"{served}"
            )
        return list(wanted)
    return list(context.preferences)


def names(task: Task, wanted: Sequence[Preference], samples: int | None = None) -> tuple[str, str]:
    """Return the file names (without suffix) of an evaluation: the task's own, on its own grid, is plain ``eval``."""
    return names_on(task.grid, wanted, None if samples == task.card.evaluation.samples else samples)


def names_on(grid: Sequence[Preference], wanted: Sequence[Preference], samples: int | None = None) -> tuple[str, str]:
    """Return the same for a task whose own grid is ``grid``; ``samples`` None: as many as its card says."""
    key = ""
    if list(wanted) != list(grid):
        key += "-" + hashlib.sha256(json.dumps([list(w) for w in wanted]).encode()).hexdigest()[:8]
    if samples is not None:
        key += f"-x{samples}"
    return f"eval{key}", f"responses{key}"


def evaluate(
    method: Method,
    context: RunContext,
    wanted: Sequence[Preference] | None = None,
    say: Say = silent,
    samples: int | None = None,
) -> Evaluation:
    """Evaluate a finished run; what was evaluated before is read back.

    All preferences are generated and scored in batched passes. Responses with their scores go to
    ``responses*.parquet``, the numbers to ``eval*.json``, both inside the run.

    Args:
        wanted: the vectors to answer for; None: see :func:`preferences_for`.
        samples: answers to each prompt at each preference, averaged before anything is resampled; None: the task
            card's. With more of them the same numbers are estimated with less noise.
    """
    asked = preferences_for(method, context, wanted)
    samples = samples or context.task.card.evaluation.samples
    file, table_name = names(context.task, asked, samples)
    path = context.run.path / f"{file}.json"
    if path.is_file():
        told = _read(path)
        if told["card_hash"] == context.task.hash:
            stored = _scores(context, context.run.read_table(table_name), asked, samples)
            return Evaluation({"samples": samples, **told}, stored)  # files of before did not say how many
    started = time.monotonic()
    table, cost, moved = respond(method, context, asked, say, samples)
    context.run.write_table(table_name, table)
    scores = _scores(context, table, asked, samples)
    told = {
        "run": str(context.run.path),
        "run_id": context.run.record.run_id,
        "method": method.name,
        "task": context.task.card.name,
        "card_hash": context.task.hash,
        "seed": context.run.record.seed,
        "objectives": context.task.names,
        **judge(context.task, asked, scores),
        "samples": samples,
        **believed(context, table, asked),
        "quality": {**_collapse(context.task, table), **_moved(moved)},
        "cost": {**cost, "seconds": round(time.monotonic() - started, 3)},
    }
    overlong = context.task.overlong()
    if overlong:
        told["overlong"] = overlong
    for point, one in zip(told["points"], moved, strict=True):
        point.update(kl=one.nats, kl_bound=one.bound)
    held = held_out(context)
    if held and not all(_has(held, w) for w in asked):
        told["generalisation"] = _generalisation(method, context, asked, scores, held, say, samples)
    from moalign.runs import atomic

    atomic.write_json(path, told)
    return Evaluation(_read(path), scores)


def held_out(context: RunContext) -> list[Preference]:
    """Return the vectors that the run's training was not allowed to see (its recipe's ``holdout``)."""
    return [tuple(row) for row in context.run.record.recipe.get("holdout") or ()]


def _has(vectors: Sequence[Preference], wanted: Preference) -> bool:
    return any(same(vector, wanted) for vector in vectors)


def _generalisation(
    method: Method,
    context: RunContext,
    asked: Sequence[Preference],
    scores: Matrix,
    held: Sequence[Preference],
    say: Say,
    samples: int,
) -> dict[str, Any]:
    """Return the judge's numbers apart for trained and for held-out vectors.

    Each side's optimal share is against the optimum for its own vectors; the utility share (mean w.n over that of the
    optimum) is the one to compare between sides, since a hypervolume depends on how close its vectors lie. Held-out
    vectors that are not among those asked for are answered too, as an evaluation of their own.
    """
    if all(_has(asked, w) for w in held):
        unseen = [k for k, w in enumerate(asked) if _has(held, w)]
        others, their_scores = [asked[k] for k in unseen], scores[:, unseen]
    else:
        others, their_scores = list(held), evaluate(method, context, held, say, samples).scores
    seen = [k for k, w in enumerate(asked) if not _has(held, w)]
    told = {}
    for name, vectors, part in (
        ("trained", [asked[k] for k in seen], scores[:, seen]),
        ("held_out", others, their_scores),
    ):
        judged = judge(context.task, vectors, part)
        kept = ("hypervolume", "hypervolume_ci", "optimal_share", "optimal_share_ci", "indicators")
        told[name] = {"prefs": [list(w) for w in vectors], **{key: judged[key] for key in kept if key in judged}}
        if "optimum" in judged:
            most = indicators.inner_product(np.array(vectors), judged["optimum"]["points"])
            told[name]["utility_share"] = judged["indicators"]["inner_product"] / most
    return told


def respond(
    method: Method,
    context: RunContext,
    asked: Sequence[Preference],
    say: Say = silent,
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
    # What a policy scores to choose its answer is a cost of answering; what the judge scores is not.
    metered = replace(context, panel=context.panel.with_meter(meter))
    done, total = 0, len(prompts) * len(asked)

    def moved(count: int) -> None:
        nonlocal done
        done += count
        say("answering", min(done, total), total)

    with _generators_kept():
        policies = [method.policy(metered, preference) for preference in asked]
        sampling = context.task.sampling(spec.seed)
        answers = respond_all(policies, prompts, sampling, moved)
        away = divergence.from_base(context.task, policies, prompts, answers, sampling, say)
        flat = [text for row in answers.responses for text in row]
        raw = context.task.judge_panel.score(prompts * len(asked), flat, lambda d, n: say("scoring", d, n))
    records = [response for k in range(len(asked)) for response in answers.records(k)]
    table = pd.DataFrame(
        {
            "prompt": prompts * len(asked),
            "preference": [label(w) for w in asked for _ in prompts],
            **columns(records),
        }
    )
    for column, name in enumerate(context.task.names):
        table[name] = raw[:, column]
    return table, {"tokens_generated": answers.tokens, "reward_calls": meter.reward_calls}, away


def _collapse(task: Task, table: pd.DataFrame) -> quality.CollapseReport:
    return quality.collapse_report(task.tokens(table["response"].tolist()), task.short_below)


def _moved(policies: Sequence[KlToBase]) -> dict[str, Any]:
    """Return the mean KL to base over the preferences, None where one is not known, and whether it is a bound."""
    known = [one.nats for one in policies if one.nats is not None]
    mean = float(np.mean(known)) if len(known) == len(policies) else None
    return {"kl": mean, "kl_bound": any(one.bound for one in policies)}


def _generators_kept() -> AbstractContextManager[None]:
    """Give torch's global generators their state back afterwards: loading an adapter draws its first weights."""
    import torch

    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


def _scores(context: RunContext, table: pd.DataFrame, asked: Sequence[Preference], samples: int) -> Matrix:
    """Return normalised scores ``[prompts, preferences, objectives]``, several samples of a prompt averaged."""
    raw = table[context.task.names].to_numpy(dtype=np.float64)
    unit = context.task.judge_normaliser.unit(raw).reshape(len(asked), -1, len(context.task.names))
    return unit.reshape(len(asked), -1, samples, unit.shape[-1]).mean(axis=2).transpose(1, 0, 2)


def judge(task: Task, asked: Sequence[Preference], scores: Matrix) -> dict[str, Any]:
    """Return points, hypervolume, optimal share and indicators of normalised scores ``[prompts, k, m]``."""
    spec, grid = task.card.evaluation, np.array(asked)
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
            "prefs": list(asked[k]),
            "mean": means[k].tolist(),
            "ci": bounds[:, k].T.tolist(),
            "raw": (lo + means[k] * (hi - lo)).tolist(),
            "raw_ci": (lo + bounds[:, k] * (hi - lo)).T.tolist(),
            "nondominated": bool(mask[k]),
        }
        for k in range(len(asked))
    ]
    told: dict[str, Any] = {
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
    best = task.optimum(asked, task.eval_prompts)
    if best is not None:
        unit = normaliser.unit(best)
        most = hypervolume.hypervolume(unit, ref)
        regrets = indicators.regret(grid, means, unit)
        told["optimal_share"] = volume / most
        told["optimal_share_ci"] = [value / most for value in told["hypervolume_ci"]]
        told["indicators"]["regret"] = float(np.mean(regrets))
        told["indicators"]["igd_plus"] = indicators.igd_plus(means, unit)
        told["optimum"] = {"hypervolume": most, "points": unit.tolist()}
    return told


def believed(context: RunContext, table: pd.DataFrame, asked: Sequence[Preference]) -> dict[str, Any]:
    """Return what the rewards that the method was trained on say of its answers, where the judge's are others.

    ``believed``: points and hypervolume in those rewards' own normalised units; ``gap``: how much that hypervolume
    lies above the judge's. A gap that grows with training is reward hacking.
    """
    task = context.task
    if task.judge_panel is task.panel:
        return {}
    raw = task.panel.score(table["prompt"].tolist(), table["response"].tolist())
    means = task.normaliser.unit(raw).reshape(len(asked), -1, len(task.names)).mean(axis=1)
    truth = task.judge_normaliser.unit(table[task.names].to_numpy(dtype=np.float64))
    judged = truth.reshape(len(asked), -1, len(task.names)).mean(axis=1)
    ref = task.card.reference_point
    volume = hypervolume.hypervolume(means, ref)
    points = [{"prefs": list(w), "mean": row.tolist()} for w, row in zip(asked, means, strict=True)]
    return {
        "believed": {"points": points, "hypervolume": volume},
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


def _read(path: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


def result_of(run: Run) -> dict[str, Any] | None:
    """Return a run's stored evaluation on the task's own grid, or None."""
    path = run.path / "eval.json"
    return _read(path) if path.is_file() else None

"""From the score matrices of several methods to rows, paired differences, a ranking and (perhaps) a winner.

Pure numbers: nothing is trained, read or drawn here, and no method's name means anything. The unit of every
comparison is the evaluation prompt, which all methods answered: one resample of prompts serves all of them (the same
seed), so what two methods share by answering the same prompt cancels in their difference. Training seeds are the
second level.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics as plain_statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign.core.errors import WorkError
from moalign.evaluation.evaluate import Evaluation
from moalign.pareto import front, hypervolume, indicators, statistics

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]
"""Of the mean points of all preferences, ``[k, m]``."""

COUNTED = ("tokens_generated", "tokens_trained", "reward_calls", "seconds")
"""Costs that add up; a hypervolume is also told per unit of each."""


@dataclass
class Contender:
    """One row to be: a method with one setting, over its training seeds."""

    label: str
    method: str
    seeded: bool = True
    """False: nothing in it depends on the training seed, so its one run stands for every seed."""
    seeds: list[int] = field(default_factory=list)
    """The seeds that finished, in the order of ``evaluations`` and ``costs``."""
    evaluations: list[Evaluation] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)
    """Cost of training, per seed."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """One entry per seed asked for: run, seed, status, command, error."""
    diagnostics: list[Mapping[str, Any]] = field(default_factory=list)
    """What each seed's training measured of itself: names of the method's own, numbers."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Learning curves of each seed (:func:`moalign.report.curves.condense`)."""

    @property
    def status(self) -> str:
        """``done``; ``partial`` when some seeds failed; ``failed`` when none finished."""
        if not self.evaluations:
            return "failed"
        return "done" if all(run["status"] == "done" for run in self.runs) else "partial"


def standings(
    contenders: Sequence[Contender], grid: Sequence[Sequence[float]], draws: int, seed: int
) -> dict[str, Any]:
    """Compare the contenders; returns ``rows`` (best first, failed ones last), ``pairs``, ``winner`` and more.

    Args:
        contenders: at least one; all evaluated on the same prompts.
        grid: the comparison's preferences; a contender evaluated on others is marked ``own_preferences``.
        draws: bootstrap resamples.
        seed: of the bootstrap; the task card's, so that intervals agree with those of ``moalign eval``.

    ``winner`` is the label of the contender whose paired difference in hypervolume to every other one is above 0
    with certainty (see :func:`_pair`), or None. Contenders that lost a seed can be beaten but cannot win. Pairs that
    were asked for the same preferences also tell their difference in inner product: a hypervolume counts the best
    points of a front, whoever asked for them.
    """
    judged = sorted((one for one in contenders if one.evaluations), key=lambda one: (-_mean(_volumes(one)), one.label))
    _same_prompts(judged)
    samples = {one.label: _samples(one, one.seeds, draws, seed) for one in judged}
    asked = [list(preference) for preference in grid]
    rows = [
        {**_row(one, judged, samples[one.label], draws, seed), "own_preferences": _grid_of(one) != asked}
        for one in judged
    ]
    for row in rows:  # equal hypervolumes share the better rank
        row["rank"] = 1 + sum(other["hypervolume"] > row["hypervolume"] for other in rows)
    rows += [_failed(one) for one in contenders if not one.evaluations]
    utilities = {one.label: _samples(one, one.seeds, draws, seed, _utility(one)) for one in judged}
    pairs = [
        {
            **_pair(a, b, samples, draws, seed),
            "inner_product": _pair(a, b, utilities, draws, seed, _utility(a)) if _grid_of(a) == _grid_of(b) else None,
        }
        for a, b in itertools.combinations(judged, 2)
    ]
    best = _optimum(judged, asked)
    return {
        "rows": rows,
        "pairs": pairs,
        "winner": _winner(rows, pairs),
        "sensitivity": _sensitivity(rows, judged),
        "optimum": best,
        "igd_plus_to": "optimum" if best is not None else "union front",
    }


def _row(one: Contender, judged: Sequence[Contender], samples: Array, draws: int, seed: int) -> dict[str, Any]:
    volumes = _volumes(one)
    told = [evaluation.told for evaluation in one.evaluations]
    volume, ci = _mean(volumes), statistics.interval(samples)
    cost = _cost(one)
    shares = [t["optimal_share"] for t in told]
    known = all(share is not None for share in shares)
    most = told[0]["optimum"]["hypervolume"] if known else None
    return {
        "method": one.method,
        "label": one.label,
        "status": one.status,
        "rank": None,
        "hypervolume": volume,
        "ci": list(ci),
        "hypervolume_by_seed": volumes,
        "hypervolume_median": plain_statistics.median(volumes),
        "hypervolume_iqm": statistics.interquartile_mean(volumes),
        "optimal_share": _mean(shares) if known else None,
        "optimal_share_ci": [bound / most for bound in ci] if most else None,
        "sensitivity_hypervolume": _mean([t["sensitivity"]["hypervolume"] for t in told]),
        "indicators": _indicators(one, judged),
        "quality": _quality(told),
        "diagnostics": _diagnostics(one.diagnostics),
        "generalisation": _generalisation(told),
        "gap": _mean([t["gap"] for t in told]) if all("gap" in t for t in told) else None,
        "curves": one.curves,
        "cost": cost,
        "hypervolume_per_cost": {unit: volume / cost[unit] if cost[unit] else None for unit in COUNTED},
        "points": _points(one, draws, seed),
        "front": _mean([t["front"] for t in told]),
        "seeded": one.seeded,
        "seeds": list(one.seeds),
        "runs": one.runs,
        "error": next((run["error"] for run in one.runs if run.get("error")), None),
    }


def _failed(one: Contender) -> dict[str, Any]:
    """A method that failed keeps its row: what is known is what went wrong."""
    empty = (
        "rank hypervolume ci hypervolume_median hypervolume_iqm optimal_share optimal_share_ci "
        "sensitivity_hypervolume indicators quality cost hypervolume_per_cost front generalisation gap"
    )
    return {
        "method": one.method,
        "label": one.label,
        "status": one.status,
        **dict.fromkeys(empty.split()),
        "hypervolume_by_seed": [],
        "points": [],
        "diagnostics": {},
        "curves": [],
        "own_preferences": False,
        "seeded": one.seeded,
        "seeds": [],
        "runs": one.runs,
        "error": next((run["error"] for run in one.runs if run.get("error")), None),
    }


def _pair(
    a: Contender,
    b: Contender,
    samples: Mapping[str, Array],
    draws: int,
    seed: int,
    statistic: Statistic | None = None,
) -> dict[str, Any]:
    """Return the paired difference in a statistic of the mean points (None: hypervolume), a minus b.

    ``samples`` holds its resamples by label, over all seeds. ``ci`` is the percentile interval; ``ci_reflected`` the
    basic one, which does not mistake the spread that noise alone gives to nearly equal points for a front
    (:func:`moalign.pareto.statistics.basic_interval`). The pair is ``certain`` only when both exclude 0.
    """
    seeds = None
    if a.seeded and b.seeded and a.seeds != b.seeds:
        seeds = sorted(set(a.seeds) & set(b.seeds)) or None
    if seeds is None:
        of_a, of_b = samples[a.label], samples[b.label]
    else:
        of_a, of_b = (_samples(one, seeds, draws, seed, statistic) for one in (a, b))
    observed = _observed(a, seeds, statistic) - _observed(b, seeds, statistic)
    found = statistics.paired_difference(of_a, of_b, observed)
    reflected = statistics.basic_interval(of_a - of_b, observed)
    lo, hi = min(found["ci"][0], reflected[0]), max(found["ci"][1], reflected[1])
    return {
        "a": a.label,
        "b": b.label,
        "difference": found["difference"],
        "ci": list(found["ci"]),
        "ci_reflected": list(reflected),
        "p_improve": found["p_improve"],
        "certain": lo > 0 or hi < 0,
        "seeds": seeds if seeds is not None else sorted({*a.seeds, *b.seeds}),
    }


def _winner(rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> str | None:
    judged = [row for row in rows if row["status"] != "failed"]
    for row in judged:
        label = row["label"]
        won = [
            pair for pair in pairs if pair["certain"] and (pair["a"] if pair["difference"] > 0 else pair["b"]) == label
        ]
        if row["status"] == "done" and len(judged) > 1 and len(won) == len(judged) - 1:
            return str(label)
    return None


def _sensitivity(rows: Sequence[dict[str, Any]], judged: Sequence[Contender]) -> dict[str, Any] | None:
    """Rank again under the second reference point; tell which pairs change places."""
    if not judged:
        return None
    found = [row for row in rows if row["status"] != "failed"]
    again = sorted(found, key=lambda row: (-row["sensitivity_hypervolume"], row["label"]))
    flipped = [
        [a["label"], b["label"]]
        for a, b in itertools.combinations(found, 2)
        if a["hypervolume"] > b["hypervolume"] and a["sensitivity_hypervolume"] < b["sensitivity_hypervolume"]
    ]
    return {
        "ref": judged[0].evaluations[0].told["sensitivity"]["ref"],
        "ranking": [row["label"] for row in again],
        "flips": bool(flipped),
        "flipped": flipped,
    }


# --- one contender ----------------------------------------------------------------------------------------------


def _volumes(one: Contender, seeds: Sequence[int] | None = None) -> list[float]:
    return [
        float(evaluation.told["hypervolume"])
        for seed, evaluation in zip(one.seeds, one.evaluations, strict=True)
        if seeds is None or seed in seeds
    ]


def _utility(one: Contender) -> Statistic:
    """Return the inner product with the preferences that a contender was asked for."""
    return functools.partial(indicators.inner_product, _grid_of(one))


def _observed(one: Contender, seeds: Sequence[int] | None, statistic: Statistic | None) -> float:
    """Return a statistic of the mean points (None: hypervolume), averaged over the seeds (None: all)."""
    if statistic is None:
        return _mean(_volumes(one, seeds))
    pairs = zip(one.seeds, one.evaluations, strict=True)
    return _mean([statistic(_means(evaluation)) for seed, evaluation in pairs if seeds is None or seed in seeds])


def _samples(one: Contender, seeds: Sequence[int], draws: int, seed: int, statistic: Statistic | None = None) -> Array:
    """Return a resampled statistic (None: hypervolume) ``[draws]``, averaged over resampled training seeds."""
    if statistic is None:
        statistic = functools.partial(hypervolume.hypervolume, ref=one.evaluations[0].told["ref"])
    chosen = [e.scores for s, e in zip(one.seeds, one.evaluations, strict=True) if s in seeds]
    return statistics.two_level_bootstrap(chosen, statistic, draws, seed)


def _points(one: Contender, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the mean point of each preference over the seeds, with its interval."""
    if len(one.evaluations) == 1:
        kept = ("prefs", "mean", "ci", "raw")
        return [{key: point[key] for key in kept} for point in one.evaluations[0].told["points"]]
    told = [evaluation.told["points"] for evaluation in one.evaluations]
    drawn = statistics.two_level_means([evaluation.scores for evaluation in one.evaluations], draws, seed)
    bounds = statistics.intervals(drawn)
    return [
        {
            "prefs": told[0][i]["prefs"],
            "mean": np.mean([points[i]["mean"] for points in told], axis=0).tolist(),
            "ci": bounds[:, i].T.tolist(),
            "raw": np.mean([points[i]["raw"] for points in told], axis=0).tolist(),
        }
        for i in range(len(told[0]))
    ]


def _diagnostics(seeds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average what the seeds' training measured; what one seed lacks is averaged over the others."""
    found: dict[str, list[float]] = {}
    for one in seeds:
        for name, value in one.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, []).append(float(value))
    return {name: _mean(values) for name, values in found.items()}


def _generalisation(told: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]] | None:
    """Average, over the seeds, what holds for preferences that were trained on and for those that were held out."""
    if not all("generalisation" in one for one in told):
        return None
    sides: dict[str, dict[str, float | None]] = {}
    for side in ("trained", "held_out"):
        parts = [one["generalisation"][side] for one in told]
        shares = {name: [part.get(name) for part in parts] for name in ("optimal_share", "utility_share")}
        sides[side] = {
            "preferences": len(parts[0]["prefs"]),
            "hypervolume": _mean([part["hypervolume"] for part in parts]),
            **{name: None if None in values else _mean(values) for name, values in shares.items()},
            **{name: _mean([part["indicators"][name] for part in parts]) for name in ("tau", "inner_product")},
        }
    return sides


def _indicators(one: Contender, judged: Sequence[Contender]) -> dict[str, Any]:
    """Average the indicators over the seeds; IGD+ is to the optimum, or to the best of all methods together."""
    # Spacing is taken from the points, which every evaluation has; those of older versions do not hold it.
    stored = [evaluation.told["indicators"] for evaluation in one.evaluations]
    found = average([{name: value for name, value in told.items() if name != "spacing"} for told in stored])
    means = [_means(evaluation) for evaluation in one.evaluations]
    if "igd_plus" not in found:
        union = np.concatenate([_means(e) for other in judged for e in other.evaluations])
        union = union[front.nondominated(union)]
        found["igd_plus"] = _mean([indicators.igd_plus(points, union) for points in means])
    found["spacing"] = _mean([indicators.spacing(points) for points in means])
    return found


def _quality(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the quality guards; KL to base is None where a seed lacks it (older versions did not measure it)."""
    kept = [{"kl": None, **one["quality"]} for one in told]
    bound = any(one.pop("kl_bound", False) for one in kept)
    return {**average(kept), "kl_bound": bound}


def _cost(one: Contender) -> dict[str, Any]:
    """Return the mean cost of training per seed (the largest for memory), and of answering the evaluation."""
    cost: dict[str, Any] = {unit: _mean([spent[unit] for spent in one.costs]) for unit in COUNTED}
    cost["peak_memory_bytes"] = max(int(spent["peak_memory_bytes"]) for spent in one.costs)
    cost["answering"] = average([evaluation.told["cost"] for evaluation in one.evaluations])
    return cost


def average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average equally built (nested) mappings of numbers and lists of numbers; None where one of them has None."""

    def of(values: Sequence[Any]) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], Mapping):
            return average(values)
        if isinstance(values[0], list):
            return [of(parts) for parts in zip(*values, strict=True)]
        return _mean(values)

    return {key: of([row[key] for row in rows]) for key in rows[0]}


def _means(evaluation: Evaluation) -> Array:
    return np.array([point["mean"] for point in evaluation.told["points"]], dtype=np.float64)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


# --- all together -----------------------------------------------------------------------------------------------


def _grid_of(one: Contender) -> list[list[float]]:
    return [list(point["prefs"]) for point in one.evaluations[0].told["points"]]


def _optimum(judged: Sequence[Contender], grid: list[list[float]]) -> dict[str, Any] | None:
    """Return the known optimum on the comparison's own preferences, or on the first contender's."""
    found = [(_grid_of(one) != grid, one.evaluations[0].told.get("optimum")) for one in judged]
    best: dict[str, Any] | None = min(found, key=lambda pair: pair[0])[1] if found else None
    return best


def _same_prompts(judged: Sequence[Contender]) -> None:
    """Refuse what cannot be paired."""
    counts = {len(e.scores): one.label for one in judged for e in one.evaluations}
    if len(counts) > 1:
        found = ", ".join(f"{label} answered {count}" for count, label in sorted(counts.items()))
        raise WorkError(f"compare: evaluations of different numbers of prompts cannot be paired: {found}")

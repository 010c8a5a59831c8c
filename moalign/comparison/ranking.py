"""From the score matrices of several methods to rows, paired differences, a ranking and, if there is one, a winner.

Nothing is trained, read or drawn here, and methods are not told apart by name. The unit of resampling is the
evaluation prompt, which all methods answered: all of them share the same resamples of prompts (the same seed), so that
what two methods have in common on a prompt cancels in their difference. Training seeds are the second level.
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
"""A number computed from the mean points of all preferences, ``[k, m]``."""

COUNTED = ("tokens_generated", "tokens_trained", "reward_calls", "seconds")
"""Costs that add up; rows also give the hypervolume per unit of each."""


@dataclass
class Entry:
    """One entry of the ranking: a method with one setting, over its training seeds; it becomes a row."""

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
    """One per requested seed: run, seed, status, command, error."""
    diagnostics: list[Mapping[str, Any]] = field(default_factory=list)
    """Per seed, diagnostics of its training by the method's own names."""
    curves: list[dict[str, Any]] = field(default_factory=list)
    """Learning curves of each seed (:func:`moalign.report.curves.condense`)."""

    @property
    def status(self) -> str:
        """``done``; ``partial`` when some seeds failed; ``failed`` when none finished."""
        if not self.evaluations:
            return "failed"
        return "done" if all(run["status"] == "done" for run in self.runs) else "partial"


def ranking(entries: Sequence[Entry], grid: Sequence[Sequence[float]], draws: int, seed: int) -> dict[str, Any]:
    """Compare the entries; returns ``rows`` (best first, failed ones last), ``pairs``, ``winner`` and more.

    Args:
        entries: at least one; all evaluated on the same prompts.
        grid: the comparison's preferences; an entry evaluated on others is marked ``own_preferences``.
        draws: bootstrap resamples.
        seed: of the bootstrap; the task card's, so that intervals agree with those of ``moalign eval``.

    ``winner`` is the label of the entry whose paired difference in hypervolume to every other entry is above 0 with
    certainty (see :func:`_pair`), or None. An entry that lost a seed can be beaten but cannot win. Pairs evaluated on
    the same preferences also have their difference in inner product: a hypervolume counts the best points of a front,
    whichever preferences they answer.
    """
    judged = sorted(
        (entry for entry in entries if entry.evaluations), key=lambda entry: (-_mean(_volumes(entry)), entry.label)
    )
    _same_prompts(judged)
    samples = {entry.label: _samples(entry, entry.seeds, draws, seed) for entry in judged}
    shared = [list(preference) for preference in grid]
    rows = [
        {**_row(entry, judged, samples[entry.label], draws, seed), "own_preferences": _grid_of(entry) != shared}
        for entry in judged
    ]
    for row in rows:  # equal hypervolumes share the better rank
        row["rank"] = 1 + sum(other["hypervolume"] > row["hypervolume"] for other in rows)
    rows += [_failed(entry) for entry in entries if not entry.evaluations]
    utilities = {entry.label: _samples(entry, entry.seeds, draws, seed, _utility(entry)) for entry in judged}
    pairs = [
        {
            **_pair(a, b, samples, draws, seed),
            "inner_product": _pair(a, b, utilities, draws, seed, _utility(a)) if _grid_of(a) == _grid_of(b) else None,
        }
        for a, b in itertools.combinations(judged, 2)
    ]
    best = _optimum(judged, shared)
    return {
        "rows": rows,
        "pairs": pairs,
        "winner": _winner(rows, pairs),
        "sensitivity": _sensitivity(rows, judged),
        "optimum": best,
        "igd_plus_to": "optimum" if best is not None else "union front",
    }


def _row(entry: Entry, judged: Sequence[Entry], samples: Array, draws: int, seed: int) -> dict[str, Any]:
    volumes = _volumes(entry)
    results = [evaluation.told for evaluation in entry.evaluations]
    volume, ci = _mean(volumes), statistics.interval(samples)
    cost = _cost(entry)
    shares = [result["optimal_share"] for result in results]
    known = all(share is not None for share in shares)
    most = results[0]["optimum"]["hypervolume"] if known else None
    return {
        "method": entry.method,
        "label": entry.label,
        "status": entry.status,
        "rank": None,
        "hypervolume": volume,
        "ci": list(ci),
        "hypervolume_by_seed": volumes,
        "hypervolume_median": plain_statistics.median(volumes),
        "hypervolume_iqm": statistics.interquartile_mean(volumes),
        "optimal_share": _mean(shares) if known else None,
        "optimal_share_ci": [bound / most for bound in ci] if most else None,
        "sensitivity_hypervolume": _mean([result["sensitivity"]["hypervolume"] for result in results]),
        "indicators": _indicators(entry, judged),
        "quality": _quality(results),
        "diagnostics": _diagnostics(entry.diagnostics),
        "generalisation": _generalisation(results),
        "gap": _mean([result["gap"] for result in results]) if all("gap" in result for result in results) else None,
        "curves": entry.curves,
        "cost": cost,
        "hypervolume_per_cost": {unit: volume / cost[unit] if cost[unit] else None for unit in COUNTED},
        "points": _points(entry, draws, seed),
        "front": _mean([result["front"] for result in results]),
        "seeded": entry.seeded,
        "seeds": list(entry.seeds),
        "runs": entry.runs,
        "error": next((run["error"] for run in entry.runs if run.get("error")), None),
    }


def _failed(entry: Entry) -> dict[str, Any]:
    """Return the row of an entry without a finished run: its runs and its error, and None for every number."""
    empty = (
        "rank hypervolume ci hypervolume_median hypervolume_iqm optimal_share optimal_share_ci "
        "sensitivity_hypervolume indicators quality cost hypervolume_per_cost front generalisation gap"
    )
    return {
        "method": entry.method,
        "label": entry.label,
        "status": entry.status,
        **dict.fromkeys(empty.split()),
        "hypervolume_by_seed": [],
        "points": [],
        "diagnostics": {},
        "curves": [],
        "own_preferences": False,
        "seeded": entry.seeded,
        "seeds": [],
        "runs": entry.runs,
        "error": next((run["error"] for run in entry.runs if run.get("error")), None),
    }


def _pair(
    a: Entry,
    b: Entry,
    samples: Mapping[str, Array],
    draws: int,
    seed: int,
    statistic: Statistic | None = None,
) -> dict[str, Any]:
    """Return the paired difference in a statistic of the mean points (None: hypervolume), a minus b.

    ``samples`` holds its resamples by label, over all seeds. ``ci`` is the percentile interval; ``ci_reflected`` the
    basic one, which does not mistake the spread that noise alone gives nearly equal points for a front
    (:func:`moalign.pareto.statistics.basic_interval`). The pair is ``certain`` only when both exclude 0.
    """
    seeds = None
    if a.seeded and b.seeded and a.seeds != b.seeds:
        seeds = sorted(set(a.seeds) & set(b.seeds)) or None
    if seeds is None:
        of_a, of_b = samples[a.label], samples[b.label]
    else:
        of_a, of_b = (_samples(entry, seeds, draws, seed, statistic) for entry in (a, b))
    observed = _observed(a, seeds, statistic) - _observed(b, seeds, statistic)
    paired = statistics.paired_difference(of_a, of_b, observed)
    reflected = statistics.basic_interval(of_a - of_b, observed)
    lo, hi = min(paired["ci"][0], reflected[0]), max(paired["ci"][1], reflected[1])
    return {
        "a": a.label,
        "b": b.label,
        "difference": paired["difference"],
        "ci": list(paired["ci"]),
        "ci_reflected": list(reflected),
        "p_improve": paired["p_improve"],
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


def _sensitivity(rows: Sequence[dict[str, Any]], judged: Sequence[Entry]) -> dict[str, Any] | None:
    """Rank again under the second reference point; ``flipped`` are the pairs that change places."""
    if not judged:
        return None
    ranked = [row for row in rows if row["status"] != "failed"]
    again = sorted(ranked, key=lambda row: (-row["sensitivity_hypervolume"], row["label"]))
    flipped = [
        [a["label"], b["label"]]
        for a, b in itertools.combinations(ranked, 2)
        if a["hypervolume"] > b["hypervolume"] and a["sensitivity_hypervolume"] < b["sensitivity_hypervolume"]
    ]
    return {
        "ref": judged[0].evaluations[0].told["sensitivity"]["ref"],
        "ranking": [row["label"] for row in again],
        "flips": bool(flipped),
        "flipped": flipped,
    }


# --- one entry --------------------------------------------------------------------------------------------------


def _volumes(entry: Entry, seeds: Sequence[int] | None = None) -> list[float]:
    return [
        float(evaluation.told["hypervolume"])
        for seed, evaluation in zip(entry.seeds, entry.evaluations, strict=True)
        if seeds is None or seed in seeds
    ]


def _utility(entry: Entry) -> Statistic:
    """Return the inner product with the preferences that an entry was evaluated on."""
    return functools.partial(indicators.inner_product, _grid_of(entry))


def _observed(entry: Entry, seeds: Sequence[int] | None, statistic: Statistic | None) -> float:
    """Return a statistic of the mean points (None: hypervolume), averaged over the seeds (None: all)."""
    if statistic is None:
        return _mean(_volumes(entry, seeds))
    pairs = zip(entry.seeds, entry.evaluations, strict=True)
    return _mean([statistic(_means(evaluation)) for seed, evaluation in pairs if seeds is None or seed in seeds])


def _samples(entry: Entry, seeds: Sequence[int], draws: int, seed: int, statistic: Statistic | None = None) -> Array:
    """Return a resampled statistic (None: hypervolume) ``[draws]``, averaged over resampled training seeds."""
    if statistic is None:
        statistic = functools.partial(hypervolume.hypervolume, ref=entry.evaluations[0].told["ref"])
    chosen = [e.scores for s, e in zip(entry.seeds, entry.evaluations, strict=True) if s in seeds]
    return statistics.two_level_bootstrap(chosen, statistic, draws, seed)


def _points(entry: Entry, draws: int, seed: int) -> list[dict[str, Any]]:
    """Return the mean point of each preference over the seeds, with its interval."""
    if len(entry.evaluations) == 1:
        keys = ("prefs", "mean", "ci", "raw")
        return [{key: point[key] for key in keys} for point in entry.evaluations[0].told["points"]]
    by_seed = [evaluation.told["points"] for evaluation in entry.evaluations]
    drawn = statistics.two_level_means([evaluation.scores for evaluation in entry.evaluations], draws, seed)
    bounds = statistics.intervals(drawn)
    return [
        {
            "prefs": by_seed[0][i]["prefs"],
            "mean": np.mean([points[i]["mean"] for points in by_seed], axis=0).tolist(),
            "ci": bounds[:, i].T.tolist(),
            "raw": np.mean([points[i]["raw"] for points in by_seed], axis=0).tolist(),
        }
        for i in range(len(by_seed[0]))
    ]


def _diagnostics(seeds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average the diagnostics over the seeds that have them; values that are not finite numbers are left out."""
    values: dict[str, list[float]] = {}
    for measured in seeds:
        for name, value in measured.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: _mean(numbers) for name, numbers in values.items()}


def _generalisation(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]] | None:
    """Average over the seeds, separately for preferences that were trained on and for those that were held out."""
    if not all("generalisation" in result for result in results):
        return None
    sides: dict[str, dict[str, float | None]] = {}
    for side in ("trained", "held_out"):
        parts = [result["generalisation"][side] for result in results]
        shares = {name: [part.get(name) for part in parts] for name in ("optimal_share", "utility_share")}
        sides[side] = {
            "preferences": len(parts[0]["prefs"]),
            "hypervolume": _mean([part["hypervolume"] for part in parts]),
            **{name: None if None in values else _mean(values) for name, values in shares.items()},
            **{name: _mean([part["indicators"][name] for part in parts]) for name in ("tau", "inner_product")},
        }
    return sides


def _indicators(entry: Entry, judged: Sequence[Entry]) -> dict[str, Any]:
    """Average the indicators over the seeds; IGD+ is to the optimum, or to the best of all methods together."""
    # Spacing is computed from the points: evaluations of older versions do not hold it.
    stored = [evaluation.told["indicators"] for evaluation in entry.evaluations]
    averages = average([{name: value for name, value in record.items() if name != "spacing"} for record in stored])
    means = [_means(evaluation) for evaluation in entry.evaluations]
    if "igd_plus" not in averages:
        union = np.concatenate([_means(e) for other in judged for e in other.evaluations])
        union = union[front.nondominated(union)]
        averages["igd_plus"] = _mean([indicators.igd_plus(points, union) for points in means])
    averages["spacing"] = _mean([indicators.spacing(points) for points in means])
    return averages


def _quality(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the quality guards; KL to base is None where a seed lacks it (older versions did not measure it)."""
    guards = [{"kl": None, **result["quality"]} for result in results]
    bound = any(result.pop("kl_bound", False) for result in guards)
    return {**average(guards), "kl_bound": bound}


def _cost(entry: Entry) -> dict[str, Any]:
    """Return the mean cost of training per seed (the largest for memory), and of answering the evaluation."""
    cost: dict[str, Any] = {unit: _mean([spent[unit] for spent in entry.costs]) for unit in COUNTED}
    cost["peak_memory_bytes"] = max(int(spent["peak_memory_bytes"]) for spent in entry.costs)
    cost["answering"] = average([evaluation.told["cost"] for evaluation in entry.evaluations])
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


def _grid_of(entry: Entry) -> list[list[float]]:
    return [list(point["prefs"]) for point in entry.evaluations[0].told["points"]]


def _optimum(judged: Sequence[Entry], grid: list[list[float]]) -> dict[str, Any] | None:
    """Return the known optimum on the comparison's own preferences, or on the first entry's. None: not known."""
    optima = [(_grid_of(entry) != grid, entry.evaluations[0].told.get("optimum")) for entry in judged]
    best: dict[str, Any] | None = min(optima, key=lambda pair: pair[0])[1] if optima else None
    return best


def _same_prompts(judged: Sequence[Entry]) -> None:
    """Raise WorkError when entries were evaluated on different numbers of prompts."""
    counts = {len(e.scores): entry.label for entry in judged for e in entry.evaluations}
    if len(counts) > 1:
        answered = ", ".join(f"{label} answered {count}" for count, label in sorted(counts.items()))
        raise WorkError(f"compare: evaluations of different numbers of prompts cannot be paired: {answered}")

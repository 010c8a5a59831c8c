"""From the score matrices of several methods to entries, paired differences, a ranking and, if there is one, a winner.

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
from typing import Any, TypeVar

import numpy as np

from moalign.comparison import believed
from moalign.comparison.result import (
    Difference,
    Entry,
    HeldOutSummary,
    Pair,
    Ranking,
    RunSummary,
    Sensitivity,
    TrainingCost,
)
from moalign.core.arrays import Matrix
from moalign.core.errors import WorkError
from moalign.core.preferences import Preference
from moalign.evaluation.evaluate import Evaluation
from moalign.evaluation.result import AnsweringCost, EvalResult, Indicators, Point, Quality
from moalign.methods.base import Family
from moalign.pareto import front, indicators, statistics
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.statistics import Resampled

COUNTED = ("tokens_generated", "tokens_trained", "reward_calls", "seconds")
"""Costs that add up; entries also have the hypervolume per unit of each."""


@dataclass
class SeedResult:
    """What one finished run brings to its entry."""

    seed: int
    evaluation: Evaluation
    cost: Mapping[str, float]
    """Of training: tokens, reward calls, seconds, peak memory."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """Of training, by the method's own names."""
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    """Learning curves (:func:`moalign.report.figures.condense`)."""
    warnings: Sequence[str] = ()
    """Of training."""

    @property
    def means(self) -> Matrix:
        """Mean points of all preferences, ``[k, m]``."""
        return np.array([point.mean for point in self.evaluation.result.points], dtype=np.float64)


@dataclass
class EntryRuns:
    """The runs of one entry: a method with one setting, over its training seeds."""

    label: str
    method: str
    runs: list[RunSummary]
    """One per requested seed."""
    finished: list[SeedResult] = field(default_factory=list)
    seeded: bool = True
    """False: nothing in it depends on the training seed, so its one run stands for every seed."""
    family: Family = "other"
    """Of the method."""

    @property
    def seeds(self) -> list[int]:
        """The seeds that finished."""
        return [run.seed for run in self.finished]

    @property
    def results(self) -> list[EvalResult]:
        """Of the seeds that finished."""
        return [run.evaluation.result for run in self.finished]

    @property
    def grid(self) -> list[Preference]:
        """The preferences that it was evaluated on."""
        return [point.preference for point in self.results[0].points]

    def observed(self, number: Number) -> float:
        """Return a number of the mean points, averaged over the seeds."""
        return _mean([number(self)(run.means) for run in self.finished])

    def resampled(self, number: Number, draws: int, seed: int) -> Resampled:
        """Return the same of each seed, as observed and in resamples of the prompts."""
        return statistics.resample([run.evaluation.scores for run in self.finished], draws, seed).each(number(self))


Number = Callable[[EntryRuns], Callable[[Matrix], float]]
"""A number of the mean points ``[k, m]`` that an entry has at its preferences."""


D = TypeVar("D", bound=Difference)


def _hypervolume(group: EntryRuns) -> Callable[[Matrix], float]:
    return functools.partial(hypervolume, ref=group.results[0].reference_point)


def _inner_product(group: EntryRuns) -> Callable[[Matrix], float]:
    return functools.partial(indicators.inner_product, group.grid)


def ranking(groups: Sequence[EntryRuns], grid: Sequence[Preference], draws: int, seed: int) -> Ranking:
    """Compare the entries.

    Args:
        groups: at least one; all evaluated on the same prompts.
        grid: the comparison's preferences; an entry evaluated on others is marked ``own_preferences``.
        draws: bootstrap resamples.
        seed: of the bootstrap; the task card's, so that intervals agree with those of ``moalign eval``.

    The ``winner`` is the entry whose paired difference in hypervolume to every other entry is above 0 with certainty
    (see :func:`_difference`). An entry that lost a seed can be beaten but cannot win. Pairs evaluated on the same
    preferences also have their difference in inner product: a hypervolume counts the best points of a front, whichever
    preferences they answer.
    """
    judged = sorted(
        (group for group in groups if group.finished),
        key=lambda group: (-group.observed(_hypervolume), group.label),
    )
    _require_same_prompts(judged)
    samples = {group.label: group.resampled(_hypervolume, draws, seed) for group in judged}
    entries = [_entry(group, judged, samples[group.label], draws, seed) for group in judged]
    for entry, group in zip(entries, judged, strict=True):
        entry.own_preferences = group.grid != list(grid)
        # Equal hypervolumes share the better rank.
        entry.rank = 1 + sum(other.observed(_hypervolume) > group.observed(_hypervolume) for other in judged)
    products = {group.label: group.resampled(_inner_product, draws, seed) for group in judged}
    pairs = []
    for a, b in itertools.combinations(judged, 2):
        pair = _difference(Pair, a, b, _hypervolume, samples, seed)
        if a.grid == b.grid:
            pair.inner_product = _difference(Difference, a, b, _inner_product, products, seed)
        pairs.append(pair)
    believed.mark(entries, pairs)
    # The optimum for the comparison's own preferences, or else for the first entry's.
    results = [group.results[0] for group in sorted(judged, key=lambda group: group.grid != list(grid))]
    optimum = results[0].optimum if results else None
    return Ranking(
        entries=entries + [Entry(**_header(group)) for group in groups if not group.finished],
        pairs=pairs,
        winner=_winner(entries, pairs),
        sensitivity=_sensitivity(entries, judged),
        optimum=optimum,
        frontier=next((result.frontier for result in results if result.frontier is not None), None),
        igd_plus_to="optimum" if optimum is not None else "union front",
    )


def _entry(group: EntryRuns, judged: Sequence[EntryRuns], samples: Resampled, draws: int, seed: int) -> Entry:
    results, cost = group.results, _cost(group)
    volume, (low, high) = group.observed(_hypervolume), statistics.interval(samples, least=0.0).tolist()
    most = results[0].optimum.hypervolume if results[0].optimum else None
    volumes = [result.hypervolume for result in results]
    return Entry(
        **_header(group),
        hypervolume=volume,
        interval=(low, high),
        hypervolume_by_seed=volumes,
        hypervolume_median=plain_statistics.median(volumes),
        hypervolume_iqm=statistics.interquartile_mean(volumes),
        optimal_share=_mean_if_known([result.optimal_share for result in results]),
        optimal_share_interval=(low / most, high / most) if most else None,
        share_at_kl=_mean_if_known([result.share_at_kl for result in results]),
        worst_group=_mean_if_known([result.groups.worst if result.groups else None for result in results]),
        sensitivity_hypervolume=_mean([result.sensitivity.hypervolume for result in results]),
        indicators=_indicators(group, judged),
        quality=Quality(
            **{
                **average([result.quality.model_dump() for result in results]),
                "kl_bound": any(result.quality.kl_bound for result in results),
            }
        ),
        diagnostics=_diagnostics(group),
        warnings=list(dict.fromkeys(text for run in group.finished for text in run.warnings)),
        generalisation=_generalisation(results),
        gap=_mean_if_known([result.gap for result in results]),
        believed=believed.of_seeds([result.proxy_reward for result in results]),
        curves=[run.curves for run in group.finished],
        cost=cost,
        hypervolume_per_cost={unit: volume / spent if (spent := getattr(cost, unit)) else None for unit in COUNTED},
        points=_points(group, draws, seed),
        front=_mean([result.front for result in results]),
    )


def _header(group: EntryRuns) -> dict[str, Any]:
    """Return the fields of an :class:`Entry` that one without a finished run has, too."""
    complete = all(run.status == "done" for run in group.runs)
    return {
        "method": group.method,
        "family": group.family,
        "label": group.label,
        "status": "failed" if not group.finished else "done" if complete else "partial",
        "seeded": group.seeded,
        "seeds": group.seeds,
        "runs": group.runs,
        "error": next((run.error for run in group.runs if run.error), None),
    }


def _difference(
    kind: type[D], a: EntryRuns, b: EntryRuns, number: Number, samples: Mapping[str, Resampled], seed: int
) -> D:
    """Return the difference in a number of the mean points, paired over prompts and, if both have the same, seeds.

    It is that of the numbers that the entries are ranked by, over all seeds of each; ``samples`` holds its resamples by
    label.
    """
    of_a, of_b = samples[a.label], samples[b.label]
    observed = a.observed(number) - b.observed(number)
    parts = [of_a - of_b] if a.seeds == b.seeds else [of_a, -of_b]
    low, high = statistics.interval(*parts).tolist()
    return kind(
        a=a.label,
        b=b.label,
        difference=observed,
        interval=(low, high),
        certain=low > 0 or high < 0,
        share_above_zero=statistics.share_above_zero(*parts, seed=seed),
        probability_of_improvement=_improves(a, b, samples),
        seeds=sorted({*a.seeds, *b.seeds}),
    )


def _improves(a: EntryRuns, b: EntryRuns, samples: Mapping[str, Resampled]) -> float | None:
    """Return how often a seed of ``a`` beats one of ``b``; None where a single seed stands for all that could be."""
    if any(group.seeded and len(group.finished) == 1 for group in (a, b)) or not (a.seeded or b.seeded):
        return None
    return statistics.probability_of_improvement(samples[a.label].observed, samples[b.label].observed)


def _winner(judged: Sequence[Entry], pairs: Sequence[Pair]) -> str | None:
    won = [pair.a if pair.difference > 0 else pair.b for pair in pairs if pair.certain]
    for entry in judged:
        if entry.status == "done" and len(judged) > 1 and won.count(entry.label) == len(judged) - 1:
            return entry.label
    return None


def _sensitivity(entries: Sequence[Entry], judged: Sequence[EntryRuns]) -> Sensitivity | None:
    """Rank again from the second reference point."""
    if not judged:
        return None
    volumes = {entry.label: (entry.hypervolume or 0.0, entry.sensitivity_hypervolume or 0.0) for entry in entries}
    flipped = [
        (a, b)
        for a, b in itertools.combinations(volumes, 2)
        if volumes[a][0] > volumes[b][0] and volumes[a][1] < volumes[b][1]
    ]
    return Sensitivity(
        reference_point=judged[0].results[0].sensitivity.reference_point,
        ranking=sorted(volumes, key=lambda label: (-volumes[label][1], label)),
        flips=bool(flipped),
        flipped=flipped,
    )


# --- one entry --------------------------------------------------------------------------------------------------


def _points(group: EntryRuns, draws: int, seed: int) -> list[Point]:
    """Return the mean point of each preference over the seeds, with its interval."""
    if len(group.finished) == 1:
        return [Point(**point.model_dump(include=set(Point.model_fields))) for point in group.results[0].points]
    bounds = statistics.interval(statistics.resample([run.evaluation.scores for run in group.finished], draws, seed))
    return [
        Point(
            preference=points[0].preference,
            mean=np.mean([point.mean for point in points], axis=0).tolist(),
            interval=bounds[:, k].T.tolist(),
            raw=np.mean([point.raw for point in points], axis=0).tolist(),
            kl=_mean_if_known([point.kl for point in points]),
            kl_bound=any(point.kl_bound for point in points),
        )
        for k, points in enumerate(zip(*(result.points for result in group.results), strict=True))
    ]


def _diagnostics(group: EntryRuns) -> dict[str, float]:
    """Average the diagnostics over the seeds that have them; values that are not finite numbers are left out."""
    values: dict[str, list[float]] = {}
    for run in group.finished:
        for name, value in run.diagnostics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    return {name: _mean(numbers) for name, numbers in values.items()}


def _generalisation(results: Sequence[EvalResult]) -> dict[str, HeldOutSummary] | None:
    """Average over the seeds, separately for preferences that were trained on and for those that were held out."""
    separate = [result.generalisation for result in results if result.generalisation is not None]
    if len(separate) < len(results):
        return None
    summaries = {}
    for name in ("trained", "held_out"):
        sides = [getattr(both, name) for both in separate]
        summaries[name] = HeldOutSummary(
            preferences=len(sides[0].prefs),
            hypervolume=_mean([side.hypervolume for side in sides]),
            optimal_share=_mean_if_known([side.optimal_share for side in sides]),
            utility_share=_mean_if_known([side.utility_share for side in sides]),
            tau=_mean_if_known([side.indicators.tau for side in sides]),
            inner_product=_mean([side.indicators.inner_product for side in sides]),
        )
    return summaries


def _indicators(group: EntryRuns, judged: Sequence[EntryRuns]) -> Indicators:
    """Average the indicators over the seeds; IGD+ is to the optimum, or to the best of all methods together."""
    means = Indicators(**average([result.indicators.model_dump() for result in group.results]))
    if means.igd_plus is None:
        union = np.concatenate([run.means for other in judged for run in other.finished])
        union = union[front.nondominated(union)]
        means.igd_plus = _mean([indicators.igd_plus(run.means, union) for run in group.finished])
    return means


def _cost(group: EntryRuns) -> TrainingCost:
    spent = [run.cost for run in group.finished]
    answering = [result.cost.model_dump() for result in group.results]
    peaks = [cost.pop("peak_memory_bytes") for cost in answering]
    return TrainingCost(
        **{unit: _mean([cost[unit] for cost in spent]) for unit in COUNTED},
        peak_memory_bytes=max(int(cost["peak_memory_bytes"]) for cost in spent),
        answering=AnsweringCost(**average(answering), peak_memory_bytes=None if None in peaks else max(peaks)),
    )


def average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average equally built (nested) mappings of numbers and lists of numbers; None where one of them has None."""

    def of(values: Sequence[Any]) -> Any:
        if any(value is None for value in values):
            return None
        if isinstance(values[0], Mapping):
            return average(values)
        if isinstance(values[0], list | tuple):
            return [of(parts) for parts in zip(*values, strict=True)]
        return _mean(values)

    return {key: of([row[key] for row in rows]) for key in rows[0]}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if len(known) == len(values) else None


def _require_same_prompts(judged: Sequence[EntryRuns]) -> None:
    """Raise WorkError when entries were evaluated on different numbers of prompts."""
    counts = {len(run.evaluation.scores): group.label for group in judged for run in group.finished}
    if len(counts) > 1:
        answered = ", ".join(f"{label} answered {count}" for count, label in sorted(counts.items()))
        raise WorkError(f"compare: evaluations of different numbers of prompts cannot be paired: {answered}")

"""The result of a comparison, as ``compare.json`` holds it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import AliasChoices, Field, SerializerFunctionWrapHandler, model_serializer

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.evaluation.result import (
    AnsweringCost,
    Content,
    FrontierCurve,
    Indicators,
    Interval,
    Optimum,
    Point,
    Quality,
    StoredResult,
)
from moalign.methods import registry
from moalign.methods.base import Family

if TYPE_CHECKING:
    import pandas as pd


class RunSummary(Content):
    """One run of an entry."""

    run: str
    """The run's folder."""
    run_id: str
    seed: int
    status: Literal["done", "failed"]
    command: str
    """The command that makes the run."""
    error: str | None = None
    made: dict[str, Any] | None = None
    """Where it was trained: commit, versions, CPU, GPUs."""


class TrainingCost(Content):
    """Mean cost of a training over the seeds (of memory the largest), and of answering the evaluation."""

    tokens_generated: float
    tokens_trained: float
    reward_calls: float
    seconds: float
    peak_memory_bytes: int
    answering: AnsweringCost


class HeldOutSummary(Content):
    """Means over the seeds for the trained or the held-out preferences."""

    preferences: int
    hypervolume: float
    optimal_share: float | None
    utility_share: float | None
    tau: float | None
    inner_product: float


class FalseWin(Content):
    """A lead over another entry in believed reward that is none in truth (:mod:`moalign.comparison.believed`)."""

    over: str
    """The other entry's label."""
    quantity: Literal["hypervolume", "inner_product"]
    believed: float
    """The believed lead: above 0."""
    difference: float
    """The true one: below 0."""
    interval: Interval
    """Of ``difference``."""
    certain: bool
    """The interval excludes 0."""
    nearest_to_base: bool = False
    """``over`` is the entry with the lowest KL to base."""


class Believed(Content):
    """An entry by the rewards that it was trained on, where these are not the judge's; means over its seeds."""

    hypervolume: float
    inner_product: float
    false_wins: list[FalseWin] = Field(default_factory=list)


class Entry(Content):
    """A method with one setting, over its training seeds; None for every number of an entry that failed."""

    method: str
    family: Family = "other"
    """Of the method; older files do not have it."""
    label: str
    """The method, with its settings where several entries are of one method."""
    status: Literal["done", "partial", "failed"]
    """``partial``: some seeds failed; ``failed``: all did."""
    rank: int | None = None
    """1 is best; equal hypervolumes share a rank."""
    hypervolume: float | None = None
    interval: Interval | None = None
    """Of the hypervolume: over prompts and seeds."""
    hypervolume_by_seed: list[float] = Field(default_factory=list)
    hypervolume_median: float | None = None
    hypervolume_iqm: float | None = None
    """The interquartile mean."""
    optimal_share: float | None = None
    """The hypervolume over that of the exact optimum; None where no optimum is known."""
    optimal_share_interval: Interval | None = None
    share_at_kl: float | None = None
    """Share of what the optimum gains over the base at the same KL (:mod:`moalign.evaluation.at_kl`)."""
    worst_group: float | None = None
    """Utility of the worst-off group of users, at the preference where it is best off
    (:class:`~moalign.evaluation.result.GroupUtilities`); the key is left out where no groups are known."""
    sensitivity_hypervolume: float | None = None
    """From the second reference point."""
    indicators: Indicators | None = None
    quality: Quality | None = None
    diagnostics: dict[str, float] = Field(default_factory=dict)
    """Of training, by the method's own names."""
    warnings: list[str] = Field(default_factory=list)
    """Of the trainings, and of single preferences."""
    generalisation: dict[str, HeldOutSummary] | None = None
    """``trained`` and ``held_out``, where preferences were held out of training."""
    gap: float | None = None
    """Believed hypervolume minus the true one, where the rewards that were trained on are not the judge's."""
    believed: Believed | None = None
    curves: list[dict[str, list[list[float]]]] = Field(default_factory=list)
    """Learning curves of each seed (:func:`moalign.report.figures.condense`)."""
    cost: TrainingCost | None = None
    hypervolume_per_cost: dict[str, float | None] | None = None
    points: list[Point] = Field(default_factory=list)
    front: float | None = None
    """Mean number of points on the front."""
    seeded: bool
    """False: nothing in it depends on the training seed, so its one run stands for every seed."""
    seeds: list[int] = Field(default_factory=list)
    """Those that finished."""
    runs: list[RunSummary]
    """One per requested seed."""
    error: str | None = None
    """Of the first run that failed."""
    own_preferences: bool = False
    """It was evaluated on other preferences than those of the comparison."""

    @model_serializer(mode="wrap")
    def _without_what_few_tasks_have(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        if self.worst_group is None:
            content.pop("worst_group", None)
        return content


class Difference(Content):
    """Entry ``a`` minus entry ``b`` in one number, paired over prompts and, where both have the same, over seeds."""

    a: str
    b: str
    difference: float
    interval: Interval
    certain: bool
    """The interval excludes 0."""
    share_above_zero: float = Field(validation_alias=AliasChoices("share_above_zero", "p_improve"))
    """In what share of the resamples ``a`` is above ``b``; ties count half. Older files call it ``p_improve``."""
    probability_of_improvement: float | None = None
    """That a random training seed of ``a`` beats a random one of ``b``; None where one of them has a single seed."""
    seeds: list[int]
    """Those that either has."""


class Pair(Difference):
    """The difference in hypervolume."""

    inner_product: Difference | None = None
    """The same for the inner product; None for entries that were evaluated on different preferences."""


class Sensitivity(Content):
    """The ranking from the second reference point."""

    reference_point: tuple[float, ...]
    ranking: list[str]
    flips: bool
    flipped: list[tuple[str, str]]
    """Pairs of labels that change places."""


class Conditions(StoredResult):
    """What all entries have in common."""

    task: str
    description: str = ""
    card_hash: str
    objectives: tuple[str, ...]
    reference_point: tuple[float, ...]
    grid: tuple[Preference, ...]
    prompts: int | None = None
    """None where no run finished."""
    samples: int
    """Answers to each prompt at each preference."""
    draws: int
    """Bootstrap resamples."""
    level: float
    """Of every interval."""
    bounds: dict[Literal["lo", "hi"], list[float]] | None = None
    """Raw scores that are 0 and 1 in normalised units, ``[objectives]``."""


class Ranking(Content):
    """The entries in order, and what is certain about it."""

    entries: list[Entry]
    """Best first, failed ones last."""
    pairs: list[Pair]
    winner: str | None
    """The label of the entry that beats every other one with certainty; None without one."""
    sensitivity: Sensitivity | None
    optimum: Optimum | None
    frontier: tuple[FrontierCurve, ...] | None = None
    """The optimum by KL to base at some of the preferences, where it is known."""
    igd_plus_to: str
    """``optimum`` or ``union front``: what the indicator ``igd_plus`` is the distance to."""


def _family(method: object) -> Family:
    """Return the family of a method that is known here, by name."""
    with contextlib.suppress(RequestError):
        if isinstance(method, str):
            return registry.get(method).capabilities.family
    return "other"


class CompareResult(Ranking, Conditions):
    """Which method is best, by how much, and how sure that is."""

    KIND: ClassVar[str] = "a comparison"
    REMEDY: ClassVar[str] = "write it again with moalign compare"

    reported: list[dict[str, Any]] = Field(default_factory=list)
    """Numbers of papers that the recipes quote; none of them was measured here."""
    failed: list[str]
    """Labels of the entries of which a run failed."""
    verdict: list[str] = Field(default_factory=list)
    """The result in sentences, and what speaks against it."""
    command: str
    """The command that repeats the comparison."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Of the machine where it was made (:func:`moalign.runs.environment.capture`)."""
    figure: str | None = None
    figures: dict[str, str] = Field(default_factory=dict)
    markdown: str | None = None
    json_file: str | None = None
    html: str | None = None
    traces: list[str] = Field(default=[], exclude=True)
    """Tracebacks of the runs that failed here; not in the file."""

    @classmethod
    def migrated(cls, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        """See :meth:`StoredResult.migrated`."""
        rows = content.get("rows")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and "family" not in row:  # older files lack it
                row["family"] = _family(row.get("method"))
        return {"samples": 1, **content}  # files of version 0 may lack it: there was one answer then

    def __repr__(self) -> str:
        ranking = ", ".join(f"{entry.rank} {entry.label}" for entry in self.entries if entry.rank is not None)
        return f"CompareResult({self.task}: {ranking}; winner {self.winner})"

    @property
    def files(self) -> dict[str, Path]:
        """Where ``json``, ``markdown``, ``figure`` and, if requested, ``html`` were written."""
        paths = {"json": self.json_file, "markdown": self.markdown, "figure": self.figure, "html": self.html}
        return {name: Path(path) for name, path in paths.items() if path is not None}

    def to_frame(self) -> pd.DataFrame:
        """Return one row an entry, best first: label, rank, hypervolume with its interval, optimal share, cost."""
        import pandas as pd

        rows = []
        for entry in self.entries:
            row: dict[str, Any] = {name: getattr(entry, name) for name in ("label", "method", "status", "rank")}
            row["hypervolume"], (row["low"], row["high"]) = entry.hypervolume, entry.interval or (None, None)
            cost = {} if entry.cost is None else entry.cost.model_dump(exclude={"answering"})
            rows.append({**row, "optimal_share": entry.optimal_share, **cost})
        return pd.DataFrame(rows)

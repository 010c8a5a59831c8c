"""The result of an evaluation, typed: what Python callers get for the content of ``eval.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moalign.core.preferences import Preference

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]
"""Lower and upper bound of a 95 % bootstrap interval over prompts."""


@dataclass(frozen=True)
class Point:
    """The mean rewards of a run's answers at one preference."""

    preference: Preference
    mean: tuple[float, ...]
    """Mean rewards in normalised units, ``[objectives]``; larger is better."""
    interval: tuple[Interval, ...]
    """Of ``mean``, ``[objectives]``."""
    raw: tuple[float, ...]
    """The same means in the units of the task's scorers, larger is better."""
    nondominated: bool
    """Whether no other point of the run is at least as good in every objective and better in one."""
    kl: float | None
    """KL divergence of the policy from the base, in nats per response; None where it is not known."""


@dataclass(frozen=True)
class EvalResult:
    """Points, hypervolume and indicators of one run, from one judge.

    Rewards are in normalised units, unless they are called raw: 0 and 1 are the 1 % and 99 % quantiles of what the base
    and the data score on the task's calibration split.
    """

    run: str
    """The run's folder."""
    method: str
    task: str
    seed: int
    objectives: tuple[str, ...]
    points: tuple[Point, ...]
    """One for each preference, in the order in which they were asked for."""
    reference_point: tuple[float, ...]
    hypervolume: float
    """Volume between the points' front and the reference point."""
    hypervolume_interval: Interval
    optimal_share: float | None
    """The hypervolume over that of the exact optimum; None where no optimum is known."""
    indicators: Mapping[str, Any]
    """``tau``, ``inner_product``, ``expected_utility``, ``spacing`` and, where the optimum is known, ``regret`` ..."""
    content: Mapping[str, Any]
    """Everything, as ``moalign eval --json`` prints it."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> EvalResult:
        """Return the result that an ``eval.json`` holds."""
        low, high = content["hypervolume_ci"]
        return cls(
            run=content["run"],
            method=content["method"],
            task=content["task"],
            seed=content["seed"],
            objectives=tuple(content["objectives"]),
            points=tuple(_point(point) for point in content["points"]),
            reference_point=tuple(content["ref"]),
            hypervolume=content["hypervolume"],
            hypervolume_interval=(low, high),
            optimal_share=content.get("optimal_share"),
            indicators=content["indicators"],
            content=content,
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row a point: ``preference``, mean, bounds (``_low``, ``_high``) and ``_raw`` per objective."""
        import pandas as pd

        rows = []
        for point in self.points:
            row: dict[str, Any] = {"preference": point.preference}
            for k, name in enumerate(self.objectives):
                row[name], (row[f"{name}_low"], row[f"{name}_high"]) = point.mean[k], point.interval[k]
                row[f"{name}_raw"] = point.raw[k]
            rows.append({**row, "nondominated": point.nondominated, "kl": point.kl})
        return pd.DataFrame(rows)


def _point(content: Mapping[str, Any]) -> Point:
    return Point(
        preference=tuple(content["prefs"]),
        mean=tuple(content["mean"]),
        interval=tuple((low, high) for low, high in content["ci"]),
        raw=tuple(content["raw"]),
        nondominated=content["nondominated"],
        kl=content.get("kl"),
    )

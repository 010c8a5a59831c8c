"""The result of a comparison, typed: what Python callers get for the content of ``compare.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Entry:
    """A method with one setting, over its training seeds."""

    label: str
    """The method, with its settings where several entries are of one method."""
    method: str
    status: str
    """``done``; ``partial``: some seeds failed; ``failed``: all did."""
    rank: int | None
    """1 is best; equal hypervolumes share a rank. None for a failed entry, as all that follows."""
    hypervolume: float | None
    interval: tuple[float, float] | None
    """Of the hypervolume: 95 % bootstrap over prompts and seeds."""
    optimal_share: float | None
    """The hypervolume over that of the exact optimum; None where no optimum is known."""
    cost: Mapping[str, float]
    """Mean cost of a training: tokens generated and trained, reward calls, seconds, peak memory in bytes."""
    runs: tuple[str, ...]
    """The folders of its runs, one per seed."""


@dataclass(frozen=True, repr=False)
class CompareResult:
    """Which method is best, by how much, and how sure that is."""

    content: Mapping[str, Any]
    """Everything, as ``moalign compare --json`` prints it: paired differences, indicators, costs, curves."""
    traces: tuple[str, ...] = ()
    """Tracebacks of the runs that failed here."""

    def __repr__(self) -> str:
        ranking = ", ".join(f"{entry.rank} {entry.label}" for entry in self.entries if entry.rank is not None)
        return f"CompareResult({self.task}: {ranking}; winner {self.winner})"

    @property
    def task(self) -> str:
        """The task's name."""
        return str(self.content["task"])

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the task's objectives, in the order of preferences and scores."""
        return tuple(self.content["objectives"])

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The methods, best first, failed ones last."""
        return tuple(_entry(row) for row in self.content["rows"])

    @property
    def winner(self) -> str | None:
        """The label of the entry that beats every other one with certainty (paired differences); None without one."""
        winner: str | None = self.content["winner"]
        return winner

    @property
    def verdict(self) -> tuple[str, ...]:
        """The same in sentences, and what speaks against it."""
        return tuple(self.content["verdict"])

    @property
    def failed(self) -> tuple[str, ...]:
        """Labels of the entries of which a run failed."""
        return tuple(self.content["failed"])

    @property
    def files(self) -> dict[str, Path]:
        """Where ``json``, ``markdown``, ``figure`` and, if it was asked for, ``html`` were written."""
        names = ("json", "markdown", "figure", "html")
        return {name: Path(self.content[name]) for name in names if self.content[name] is not None}

    def to_frame(self) -> pd.DataFrame:
        """Return one row an entry, best first: label, rank, hypervolume with its interval, optimal share, cost."""
        import pandas as pd

        rows = []
        for entry in self.entries:
            low, high = entry.interval or (None, None)
            row: dict[str, Any] = {
                "label": entry.label,
                "method": entry.method,
                "status": entry.status,
                "rank": entry.rank,
            }
            row |= {"hypervolume": entry.hypervolume, "low": low, "high": high, "optimal_share": entry.optimal_share}
            rows.append({**row, **entry.cost})
        return pd.DataFrame(rows)


def _entry(row: Mapping[str, Any]) -> Entry:
    bounds, cost = row.get("ci"), row.get("cost") or {}
    return Entry(
        label=row["label"],
        method=row["method"],
        status=row["status"],
        rank=row["rank"],
        hypervolume=row["hypervolume"],
        interval=None if bounds is None else (bounds[0], bounds[1]),
        optimal_share=row.get("optimal_share"),
        cost={unit: number for unit, number in cost.items() if not isinstance(number, Mapping)},
        runs=tuple(run["run"] for run in row["runs"]),
    )

"""Metrics of one update, averaged over its parts and over all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from moalign.core import processes

if TYPE_CHECKING:
    from torch import Tensor


class Some(NamedTuple):
    """A metric that is a mean over some of a part's rows, none perhaps: their sum, and how many they are."""

    total: float
    rows: int


class Means:
    """Metrics of the parts that an update has had so far."""

    def __init__(self) -> None:
        """Begin without any."""
        self._sums: dict[str, float] = {}
        self._rows: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float | Some], share: float) -> None:
        """Add those of a part, which is that ``share`` of the update."""
        for name, value in metrics.items():
            if isinstance(value, Some):
                self._sums[name] = self._sums.get(name, 0.0) + value.total
                self._rows[name] = self._rows.get(name, 0.0) + value.rows
            else:
                self._sums[name] = self._sums.get(name, 0.0) + share * value

    def taken(self, parameters: Sequence[Tensor]) -> dict[str, float]:
        """Return the means over all parts, and begin anew; adds up the processes' gradients of the parameters."""
        means = processes.added(self._sums, parameters)
        for name, rows in processes.added(self._rows, ()).items():
            total = means.pop(name)
            if rows:
                means[name] = total / rows
        self.clear()
        return means

    def clear(self) -> None:
        """Begin anew."""
        self._sums, self._rows = {}, {}

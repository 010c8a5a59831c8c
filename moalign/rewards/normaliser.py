"""The frozen normaliser: the scale of raw scores on a task.

Fitted once on base-policy and data responses of the calibration split and saved with the task, so that every
method and every later run is judged on one scale. All numbers are of scores whose direction has been
applied (larger is better), as :meth:`moalign.rewards.panel.RewardPanel.score` gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ValidationError
from pydantic.dataclasses import dataclass

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.config.card import NormaliserSpec

UNIT_QUANTILES = (0.01, 0.99)
"""Scores that become 0 and 1 in normalised units."""
BOUND_QUANTILES = (0.005, 0.995)
"""Reward bounds of a data set, used to turn a preference into desired rewards (RiC)."""


@dataclass(frozen=True)
class Normaliser:
    """Mean, standard deviation and quantiles per objective; every field ``[objectives]`` but the last three."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]
    """Population standard deviation (divided by n)."""
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    bounds: tuple[tuple[float, float], ...]
    """0.5 % and 99.5 % quantiles of the data's raw scores, ``[objectives][2]``."""
    count: int = 0
    """Samples it was fitted on; 0: the numbers come from a task card."""
    data_hash: str = ""
    scorer_hash: str = ""

    def __post_init__(self) -> None:
        """Refuse numbers that cannot normalise; raises RequestError naming the objective."""
        for field in ("mean", "sd", "lo", "hi", "bounds"):
            if len(getattr(self, field)) != len(self.names):
                raise RequestError(f"normaliser: {field} needs one entry per objective ({len(self.names)})")
        columns = zip(self.names, self.mean, self.sd, self.lo, self.hi, self.bounds, strict=True)
        for name, mean, sd, lo, hi, bounds in columns:
            if not np.all(np.isfinite([mean, sd, lo, hi, *bounds])):
                raise RequestError(f"normaliser: objective {name!r} has a number that is not finite")
            if not sd > 0:
                raise RequestError(f"normaliser: the sd of objective {name!r} is {sd:g}; it must be positive")
            if not hi > lo:
                raise RequestError(f"normaliser: objective {name!r} has lo {lo:g} and hi {hi:g}; hi must be larger")

    @classmethod
    def fit(
        cls,
        raw: ArrayLike,
        names: Sequence[str],
        *,
        data: ArrayLike | None = None,
        data_hash: str = "",
        scorer_hash: str = "",
    ) -> Normaliser:
        """Fit on raw scores ``[samples, objectives]`` (direction applied) of the calibration split.

        ``data`` are the scores of data responses alone, for ``bounds``; None uses ``raw``. The hashes identify the
        texts and what scored them (:attr:`RewardPanel.scorer_hash`).

        Raises RequestError for fewer than 2 samples, a score that is not finite, and an objective that is constant (or
        has equal 1 % and 99 % quantiles): it cannot be traded off against anything.
        """
        values = _checked(raw, names)
        bounded = values if data is None else _checked(data, names)
        lo, hi = np.quantile(values, UNIT_QUANTILES, axis=0)
        for column, name in enumerate(names):
            _refuse_constant(values[:, column], float(lo[column]), float(hi[column]), name)
        return cls(
            names=tuple(names),
            mean=tuple(values.mean(axis=0).tolist()),
            sd=tuple(values.std(axis=0).tolist()),
            lo=tuple(lo.tolist()),
            hi=tuple(hi.tolist()),
            bounds=tuple((low, high) for low, high in np.quantile(bounded, BOUND_QUANTILES, axis=0).T.tolist()),
            count=len(values),
            data_hash=data_hash,
            scorer_hash=scorer_hash,
        )

    @classmethod
    def from_spec(cls, spec: Mapping[str, NormaliserSpec], names: Sequence[str]) -> Normaliser:
        """Take the frozen numbers of a task card; ``bounds`` are its lo and hi.

        The card's numbers are of scores with direction applied. Raises RequestError when an objective is missing.
        """
        missing = [name for name in names if name not in spec]
        if missing:
            raise RequestError(f"normaliser: the task card has no numbers for {', '.join(missing)}")
        ordered = [spec[name] for name in names]
        return cls(
            names=tuple(names),
            mean=tuple(numbers.mean for numbers in ordered),
            sd=tuple(numbers.sd for numbers in ordered),
            lo=tuple(numbers.lo for numbers in ordered),
            hi=tuple(numbers.hi for numbers in ordered),
            bounds=tuple((numbers.lo, numbers.hi) for numbers in ordered),
        )

    def replaced(self, other: Normaliser) -> Normaliser:
        """Return this scale with ``other``'s numbers for the objectives that it names."""
        theirs = {name: k for k, name in enumerate(other.names)}
        numbers: dict[str, Any] = {
            field: tuple(
                getattr(other, field)[theirs[name]] if name in theirs else getattr(self, field)[k]
                for k, name in enumerate(self.names)
            )
            for field in ("mean", "sd", "lo", "hi", "bounds")
        }
        return replace(self, **numbers)

    def z(self, raw: ArrayLike) -> Matrix:
        """Return (raw - mean) / sd; ``[..., objectives]``."""
        scores: Matrix = (self._array(raw) - np.array(self.mean)) / np.array(self.sd)
        return scores

    def unit(self, raw: ArrayLike) -> Matrix:
        """Return (raw - lo) / (hi - lo), not clipped; ``[..., objectives]``."""
        lo = np.array(self.lo)
        scores: Matrix = (self._array(raw) - lo) / (np.array(self.hi) - lo)
        return scores

    def z_bounds(self) -> Matrix:
        """Return ``bounds`` in standardised units, ``[objectives, 2]``: what RiC writes into prompts."""
        return self.z(np.array(self.bounds).T).T

    def to_json(self, path: Path) -> None:
        """Write the file atomically; numbers are read back exactly."""
        from moalign.runs.atomic import write_json

        write_json(path, asdict(self))

    @classmethod
    def from_json(cls, path: Path) -> Normaliser:
        """Read a file of :meth:`to_json`; raises RequestError naming the file and what is wrong with it."""
        from moalign.runs.atomic import parsed_json

        try:
            data = parsed_json(path.read_bytes())
            keys = [field.name for field in fields(cls)]
            if not isinstance(data, dict) or sorted(data) != sorted(keys):
                raise RequestError(f"the normaliser must have exactly the keys {', '.join(keys)}")
            return cls(**data)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"the normaliser holds a value of the wrong type: {first['loc'][0]}: {first['msg']}"
        except (OSError, ValueError) as error:
            problem = f"the normaliser cannot be read: {error}"
        except RequestError as error:
            problem = str(error)
        raise RequestError(f"{path}: {problem}; delete it to fit it again")

    def required_of(self, scorer_hash: str, path: Path) -> Normaliser:
        """Return this scale, read from ``path``, where the scorers that it was fitted for are those of
        ``scorer_hash``; RequestError where they are not: other scores on it would not be told apart.
        """
        if self.scorer_hash in ("", scorer_hash):
            return self
        raise RequestError(
            f"{path}: the task's scale was fitted for other scorers than there are now: did a model on the hub move "
            "(then give the card its revision), or a module that a function is in? bring the former ones back, or "
            "move this file away to begin anew"
        )

    def _array(self, raw: ArrayLike) -> Matrix:
        values = np.asarray(raw, dtype=np.float64)
        if values.ndim == 0 or values.shape[-1] != len(self.names):
            # numpy would silently broadcast one column over all objectives.
            raise ValueError(f"scores of shape {list(values.shape)} for {len(self.names)} objectives")
        return values


def _checked(raw: ArrayLike, names: Sequence[str]) -> Matrix:
    values = np.asarray(raw, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(names):
        raise ValueError(f"scores of shape {list(values.shape)} for {len(names)} objectives")
    if len(values) < 2:
        raise RequestError(
            f"a normaliser needs at least 2 scored samples on the calibration split; found {len(values)}"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0].tolist()
        raise RequestError(f"objective {names[column]!r}: the score of sample {row} is {values[row, column]}")
    return values


def _refuse_constant(values: Matrix, lo: float, hi: float, name: str) -> None:
    # A constant such as 0.1 can have an sd of 1e-17 by rounding, so the spread is what counts.
    if np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        raise RequestError(
            f"objective {name!r} is constant: all {len(values)} calibration samples score {values[0]:g}; it cannot be "
            "normalised, so remove it from the task or change its scorer"
        )
    if not hi > lo:
        raise RequestError(
            f"objective {name!r} is almost constant: its 1 % and 99 % quantiles over {len(values)} calibration samples "
            f"are both {lo:g}; it cannot be normalised, so change its scorer or the calibration prompts"
        )

"""The reward panel: named objectives in a fixed order; texts in, a matrix ``[samples, objectives]`` out.

The panel turns the sign where smaller is better, so that larger is better in every column. It never sums
objectives. Scores made before a failure stay in the store.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, WorkError
from moalign.rewards.scorer import Scorer, build_scorers

if TYPE_CHECKING:
    from moalign.config.objectives import ObjectiveSpec
    from moalign.rewards.normaliser import Normaliser
    from moalign.rewards.store import Store

Pair = tuple[str, str]


class RewardCounter(Protocol):
    """What the panel needs of a run's meter."""

    def add_reward_calls(self, count: int) -> None:
        """Count ``count`` requested scores."""
        ...


class _Fault(Exception):
    """A scorer's call that failed as a whole; the message says how."""


class RewardPanel:
    """Named, ordered objectives with their store, meter and normaliser."""

    def __init__(
        self,
        objectives: Sequence[Scorer],
        names: Sequence[str] | None = None,
        store: Store | None = None,
        meter: RewardCounter | None = None,
        normaliser: Normaliser | None = None,
        chunk: int = 512,
    ) -> None:
        """Put the panel together.

        Args:
            objectives: one scorer per objective, in the task's order.
            names: the objectives' names; None takes the scorers' own.
            store: where scores of scorers that are not cheap are kept; None keeps nothing.
            meter: counts the requested scores.
            normaliser: for :meth:`z` and :meth:`unit`; may be given later with :meth:`with_normaliser`.
            chunk: texts per call of a scorer; a finished chunk is stored at once.

        Raises:
            RequestError: names that repeat, or a normaliser of other objectives.
        """
        self.objectives = list(objectives)
        self.names = [scorer.name for scorer in objectives] if names is None else list(names)
        if len(self.names) != len(self.objectives) or not self.objectives:
            raise RequestError(
                f"a panel needs one name per objective; found {len(self.names)} and {len(self.objectives)}"
            )
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise RequestError(f"objective names must differ; found twice: {', '.join(twice)}")
        self.store = store
        self.meter = meter
        self.chunk = chunk
        self._set_normaliser(normaliser)

    @classmethod
    def from_specs(
        cls,
        specs: Sequence[ObjectiveSpec],
        base_dir: Path,
        store: Store | None = None,
        meter: RewardCounter | None = None,
        normaliser: Normaliser | None = None,
    ) -> RewardPanel:
        """Build the panel of a task card; the problems of all objectives come in one RequestError."""
        return cls(build_scorers(specs, base_dir), [spec.name for spec in specs], store, meter, normaliser)

    def with_normaliser(self, normaliser: Normaliser) -> RewardPanel:
        """Return the same panel (scorers, store and meter shared) with another normaliser."""
        panel = copy.copy(self)
        panel._set_normaliser(normaliser)
        return panel

    def with_meter(self, meter: RewardCounter) -> RewardPanel:
        """Return the same panel (scorers, store and normaliser shared) that counts on another meter."""
        panel = copy.copy(self)
        panel.meter = meter
        return panel

    @property
    def scorer_hash(self) -> str:
        """16 hex digits over the objectives' order, names, directions and revisions."""
        identity = [[name, s.maximise, s.revision] for name, s in zip(self.names, self.objectives, strict=True)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Matrix:
        """Score texts on every objective.

        Args:
            prompts: bare prompts, ``[samples]``.
            responses: their responses, ``[samples]``.
            progress: called with (done, total) scores over distinct texts as the work goes on.

        Returns:
            Raw scores ``[samples, objectives]``, turned so that larger is better in every column.

        Raises:
            WorkError: a scorer raised or gave NaN, an infinity or the wrong number of scores; the message
                names objective and sample, and every score made until then is in the store.
            ValueError: prompts and responses differ in number.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        order: dict[Pair, int] = {}
        first: list[int] = []
        slots = np.empty(len(prompts), dtype=np.intp)
        for sample, pair in enumerate(zip(prompts, responses, strict=True)):
            slots[sample] = order.setdefault(pair, len(order))
            if len(first) < len(order):
                first.append(sample)
        raw = np.empty((len(order), len(self.objectives)))
        for column, scorer in enumerate(self.objectives):
            work = _Column(self, column, list(order), first, progress)
            values = work.run()
            # 0 - x instead of -x: a score of 0 stays 0 and is not printed as -0.
            raw[:, column] = values if scorer.maximise else 0.0 - values
        if self.meter is not None:
            self.meter.add_reward_calls(len(prompts) * len(self.objectives))
        return raw[slots]

    def z(self, raw: Matrix) -> Matrix:
        """Return (raw - mean) / sd, shape as given ``[..., objectives]``; WorkError without a normaliser."""
        return self._needed_normaliser().z(raw)

    def unit(self, raw: Matrix) -> Matrix:
        """Return (raw - lo) / (hi - lo), not clipped, shape as given; WorkError without a normaliser."""
        return self._needed_normaliser().unit(raw)

    def _needed_normaliser(self) -> Normaliser:
        if self.normaliser is None:
            raise WorkError("the panel has no normaliser yet: fit one on the calibration split first")
        return self.normaliser

    def _set_normaliser(self, normaliser: Normaliser | None) -> None:
        if normaliser is not None and list(normaliser.names) != self.names:
            raise RequestError(
                f"the normaliser is for {', '.join(normaliser.names)}, but the task's objectives are "
                f"{', '.join(self.names)}; fit it again for this task"
            )
        self.normaliser = normaliser


class _Column:
    """One objective's scores of distinct texts: from the store, then from the scorer chunk by chunk."""

    def __init__(
        self,
        panel: RewardPanel,
        column: int,
        pairs: Sequence[Pair],
        first: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.scorer = panel.objectives[column]
        self.name = panel.names[column]
        self.store = None if self.scorer.cheap else panel.store
        self.pairs = pairs
        self.first = first
        """The number, in the caller's lists, of the first sample with each text."""
        self.chunk = panel.chunk
        self.progress = progress
        self.before = column * len(pairs)
        self.total = len(panel.objectives) * len(pairs)
        self.values: Matrix = np.full(len(pairs), np.nan)

    def run(self) -> Matrix:
        """Return the raw scores, ``[texts]``."""
        if self.store is not None:
            known = self.store.get_many(self.scorer.revision, self.pairs)
            self.values[:] = [math.nan if value is None else value for value in known]
        missing = np.flatnonzero(np.isnan(self.values)).tolist()
        self._report_progress()
        for start in range(0, len(missing), self.chunk):
            rows = missing[start : start + self.chunk]
            try:
                scores = self._call(rows)
            except _Fault as fault:
                self._locate(rows, fault)
            self._keep(rows, scores)
            self._report_progress()
        return self.values

    def _report_progress(self) -> None:
        if self.progress is not None:
            self.progress(self.before + int(np.count_nonzero(~np.isnan(self.values))), self.total)

    def _call(self, rows: Sequence[int]) -> Matrix:
        """Return the scorer's numbers for the texts of ``rows``; raises _Fault when the whole call failed."""
        prompts, responses = [self.pairs[row][0] for row in rows], [self.pairs[row][1] for row in rows]
        try:
            scores = np.asarray(self.scorer.score(prompts, responses))
        except RequestError:
            raise
        except Exception as error:
            raise _Fault(f"raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(rows),):
            raise _Fault(f"gave scores of shape {list(scores.shape)} for {len(rows)} texts; [{len(rows)}] is needed")
        if scores.dtype == object and all(value is None or isinstance(value, (int, float)) for value in scores):
            scores = scores.astype(np.float64)
        if scores.dtype.kind not in "fiub":
            raise _Fault(f"gave {type(scores[0]).__name__} instead of numbers")
        return scores.astype(np.float64)

    def _keep(self, rows: Sequence[int], scores: Matrix) -> None:
        """Keep the finite scores, here and in the store; then raise WorkError when there are others."""
        good = np.isfinite(scores)
        finite_rows = [row for row, finite in zip(rows, good, strict=True) if finite]
        self.values[finite_rows] = scores[good]
        if self.store is not None:
            self.store.put_many(self.scorer.revision, [self.pairs[row] for row in finite_rows], scores[good].tolist())
        for row, value in zip(rows, scores, strict=True):
            if not math.isfinite(value):
                raise self._error(f"gave {value}, which is not a finite number, for {self._shown(row)}")

    def _locate(self, rows: Sequence[int], fault: _Fault) -> NoReturn:
        """Find the text on which the scorer fails by bisection, keeping every score made on the way."""
        if len(rows) == 1:
            raise self._error(f"{fault} for {self._shown(rows[0])}") from fault
        for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            try:
                scores = self._call(half)
            except _Fault as inner:
                self._locate(half, inner)
            self._keep(half, scores)
        raise self._error(
            f"{fault} for {len(rows)} texts together (samples {self.first[rows[0]]} to {self.first[rows[-1]]}), but "
            "not for each half of them"
        ) from fault

    def _shown(self, row: int) -> str:
        prompt, response = (_short(text) for text in self.pairs[row])
        return f"sample {self.first[row]} (prompt {prompt}, response {response})"

    def _error(self, what: str) -> WorkError:
        done = int(np.count_nonzero(~np.isnan(self.values)))
        if self.store is None:
            saved = f"{done} of {len(self.pairs)} texts had a score"
        else:
            saved = f"the {done} of {len(self.pairs)} scores made so far are kept in {self.store.path}"
        return WorkError(f"objective {self.name!r}: the scorer {what}; {saved}")


def _short(text: str, most: int = 60) -> str:
    """Return a text as one quoted line of bounded length, for messages."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most // 2]}...{shown[-most // 4 :]}"

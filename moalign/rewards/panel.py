"""The reward panel: named objectives in a fixed order; texts in, a matrix ``[samples, objectives]`` out.

The panel turns the sign where smaller is better, so that larger is better in every column. It never sums
objectives. Scores made before a failure stay in the store.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, WorkError
from moalign.rewards.scorer import FunctionScorer, Scorer, ScorerFault, build_scorers, digest

if TYPE_CHECKING:
    from moalign.config.objectives import ObjectiveSpec
    from moalign.rewards.normaliser import Normaliser
    from moalign.rewards.store import Store
    from moalign.runs.meter import Meter

Pair = tuple[str, str]
Cap = Literal["none", "log", "clip"]


class RewardPanel:
    """Named, ordered objectives with their store, meter and normaliser."""

    def __init__(
        self,
        objectives: Sequence[Scorer],
        store: Store | None = None,
        meter: Meter | None = None,
        chunk: int = 512,
        offload: bool = False,
    ) -> None:
        """Put scorers together, in the task's order.

        Scores of scorers that are not cheap are kept in ``store``. ``meter`` counts requested scores. A scorer gets
        ``chunk`` texts in a call; a finished chunk is stored at once. With ``offload`` a scorer that has a model
        leaves the GPU (its ``rest``) once it has scored. Raises RequestError for names that repeat.
        """
        self.objectives = list(objectives)
        self.names = [scorer.name for scorer in objectives]
        if not self.names:
            raise RequestError("a panel needs at least one objective")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise RequestError(f"objective names must differ; found twice: {', '.join(twice)}")
        self.store = store
        self.meter = meter
        self.chunk = chunk
        self.offload = offload
        self.normaliser: Normaliser | None = None

    @classmethod
    def from_specs(
        cls, specs: Sequence[ObjectiveSpec], base_dir: Path, store: Store | None = None, offload: bool = False
    ) -> RewardPanel:
        """Build the panel of a task card; the problems of all objectives come in one RequestError."""
        return cls(build_scorers(specs, base_dir), store, offload=offload)

    def with_normaliser(self, normaliser: Normaliser) -> RewardPanel:
        """Return the same panel (scorers, store and meter shared) with another normaliser."""
        if list(normaliser.names) != self.names:
            raise RequestError(
                f"the normaliser is for {', '.join(normaliser.names)}, but the task's objectives are "
                f"{', '.join(self.names)}; fit it again for this task"
            )
        panel = copy.copy(self)
        panel.normaliser = normaliser
        return panel

    def with_meter(self, meter: Meter) -> RewardPanel:
        """Return the same panel (scorers, store and normaliser shared) that counts on another meter."""
        panel = copy.copy(self)
        panel.meter = meter
        return panel

    def replaced(self, other: RewardPanel) -> RewardPanel:
        """Return a panel in this one's order whose objectives are ``other``'s where that has one of the same name."""
        theirs = {scorer.name: scorer for scorer in other.objectives}
        return RewardPanel(
            [theirs.get(scorer.name, scorer) for scorer in self.objectives],
            self.store,
            chunk=self.chunk,
            offload=self.offload,
        )

    @property
    def scorer_hash(self) -> str:
        """16 hex digits over the objectives' order, names, directions and revisions."""
        return digest(*([scorer.name, scorer.maximise, scorer.revision] for scorer in self.objectives))

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        gaps: bool = False,
    ) -> Matrix:
        """Return raw scores ``[samples, objectives]``, turned so that larger is better in every column.

        ``progress`` is called with (done, total) scores over distinct texts as the work goes on. A score that a judge
        leaves out is NaN with ``gaps``; else the mean of its prompt's others, or of all where it has none.

        Raises WorkError when a scorer raises or gives NaN, an infinity or the wrong number of scores; the message names
        objective and sample, and every score made until then is in the store.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        raw = self._columns(self.objectives, prompts, responses, progress)
        for column, scorer in enumerate(self.objectives):
            if not scorer.maximise:  # 0 - x instead of -x: a score of 0 stays 0 and is not printed as -0
                raw[:, column] = 0.0 - raw[:, column]
        if self.meter is not None:
            self.meter.add_reward_calls(raw.size)
        return raw if gaps else self._without_gaps(raw, prompts)

    def take_usage(self) -> dict[str, dict[str, Any]]:
        """Return what the panel's judges were asked since the last call, by objective; empty without a judge."""
        taken = {scorer.name: getattr(scorer, "take_usage", None) for scorer in self.objectives}
        return {name: take() for name, take in taken.items() if take is not None}

    def _without_gaps(self, raw: Matrix, prompts: Sequence[str]) -> Matrix:
        """Return the scores with a mean in place of each one that was left out; WorkError where there is none."""
        known, filled = ~np.isnan(raw), raw.copy()
        of_prompt = np.array(prompts, dtype=object)
        for row, column in np.argwhere(~known).tolist():
            if not known[:, column].any():
                raise WorkError(
                    f"objective {self.names[column]!r}: none of the judge's {len(raw)} verdicts can be read; "
                    "moalign check shows what it answers to an example"
                )
            same = known[:, column] & (of_prompt == prompts[row])
            filled[row, column] = raw[same if same.any() else known[:, column], column].mean()
        return filled

    def spread(self, prompts: Sequence[str], responses: Sequence[str]) -> Matrix:
        """Return how far the members of each objective disagree, ``[samples, objectives]``.

        The sd over members of their standardised scores, 0 where an objective has none; kept in the store as scores
        are. Raises WorkError as :meth:`score` does.
        """
        spread = np.zeros((len(prompts), len(self.objectives)))
        found = {at: scorer for at, scorer in enumerate(self.objectives) if hasattr(scorer, "spread")}
        scorers = [
            FunctionScorer(scorer.name, scorer.spread, f"{scorer.revision}:spread", cheap=scorer.cheap)
            for scorer in found.values()
        ]
        spread[:, list(found)] = self._columns(scorers, prompts, responses)
        return spread

    def _columns(
        self,
        scorers: Sequence[Scorer],
        prompts: Sequence[str],
        responses: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> Matrix:
        """Return what every scorer gives, ``[samples, scorers]``; equal texts are scored once."""
        pairs = list(zip(prompts, responses, strict=True))
        first: dict[Pair, int] = {}
        for sample, pair in enumerate(pairs):
            first.setdefault(pair, sample)
        raw = np.empty((len(first), len(scorers)))
        for column, scorer in enumerate(scorers):

            def report(done: int, before: int = column * len(first)) -> None:
                if progress is not None:
                    progress(before + done, raw.size)

            store = None if scorer.cheap else self.store
            try:
                raw[:, column] = _Column(scorer, store, list(first), list(first.values()), report).run(self.chunk)
            finally:
                if self.offload and hasattr(scorer, "rest"):
                    scorer.rest()
        row = {pair: number for number, pair in enumerate(first)}
        return raw[[row[pair] for pair in pairs]]

    def z(self, raw: Matrix, cap: Cap = "none") -> Matrix:
        """Return (raw - mean) / sd, shape as given ``[..., objectives]``; WorkError without a normaliser.

        ``cap``: what a reward is worth beyond the upper bound b of the calibration data, where nothing was seen:
        all of it, its logarithm (``b + log(1 + z - b)``), or nothing (``b``).
        """
        z = self._needed_normaliser().z(raw)
        if cap == "none":
            return z
        bound = self.z_bounds()[:, 1]
        beyond = np.maximum(z - bound, 0.0)
        return np.asarray(np.minimum(z, bound) + (np.log1p(beyond) if cap == "log" else 0.0))

    def z_bounds(self) -> Matrix:
        """Return the calibration data's bounds, ``[objectives, 2]`` in units of z; WorkError without a normaliser."""
        return self._needed_normaliser().z_bounds()

    def unit(self, raw: Matrix) -> Matrix:
        """Return (raw - lo) / (hi - lo), not clipped, shape as given; WorkError without a normaliser."""
        return self._needed_normaliser().unit(raw)

    def _needed_normaliser(self) -> Normaliser:
        if self.normaliser is None:
            raise WorkError("the panel has no normaliser yet: fit one on the calibration split first")
        return self.normaliser


def usage_of(panel: RewardPanel, gold: RewardPanel | None = None) -> dict[str, dict[str, Any]]:
    """Return what the LLM judges of two panels were asked since the last call, by objective; gold ones as ``gold X``.

    Judges that a panel shares with the other one are counted once.
    """
    of_gold = {} if gold is None else gold.take_usage()
    return panel.take_usage() | {f"gold {name}": usage for name, usage in of_gold.items()}


@dataclass
class _Column:
    """One objective's scores of distinct texts: from the store, then from the scorer chunk by chunk."""

    scorer: Scorer
    store: Store | None
    pairs: list[Pair]
    first: list[int]
    """The number, in the caller's lists, of the first sample with each text."""
    report: Callable[[int], None]

    def __post_init__(self) -> None:
        self.values: Matrix = np.full(len(self.pairs), np.nan)

    @property
    def done(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.values)))

    def run(self, chunk: int) -> Matrix:
        """Return the raw scores, ``[texts]``."""
        if self.store is not None:
            known = self.store.get_many(self.scorer.revision, self.pairs)
            self.values[:] = [math.nan if value is None else value for value in known]
        missing = np.flatnonzero(np.isnan(self.values)).tolist()
        self.report(self.done)
        if missing and hasattr(self.scorer, "stream"):
            self._stream(missing)
            return self.values
        for start in range(0, len(missing), chunk):
            self._score(missing[start : start + chunk])
            self.report(self.done)
        return self.values

    def _stream(self, rows: Sequence[int]) -> None:
        """Score the texts of ``rows`` with a scorer that gives scores as they come, and keep each at once."""
        prompts, responses = zip(*(self.pairs[row] for row in rows), strict=True)
        try:
            with contextlib.closing(self.scorer.stream(prompts, responses)) as scores:  # type: ignore[attr-defined]
                for at, score in scores:
                    if isinstance(score, ScorerFault):
                        raise self._error(f"{score} for {self._shown(rows[at])}")
                    self._keep([(rows[at], score)] if math.isfinite(score) else [])
                    self.report(self.done)
        except RequestError as error:
            raise RequestError(f"{error}; {self._saved()}") from None

    def _keep(self, scores: Sequence[tuple[int, float]]) -> None:
        """Take finite scores by row, and put them into the store."""
        for row, value in scores:
            self.values[row] = value
        if self.store is not None and scores:
            pairs = [self.pairs[row] for row, _ in scores]
            self.store.put_many(self.scorer.revision, pairs, [value for _, value in scores])

    def _score(self, rows: Sequence[int]) -> None:
        """Score the texts of ``rows`` and keep their scores.

        Where a call fails as a whole, bisection finds the text on which it does; scores made on the way are kept.
        """
        try:
            scores = self._call(rows)
        except ScorerFault as fault:
            if len(rows) == 1:
                raise self._error(f"{fault} for {self._shown(rows[0])}") from fault
            self._score(rows[: len(rows) // 2])
            self._score(rows[len(rows) // 2 :])
            raise self._error(
                f"{fault} for {len(rows)} texts together (samples {self.first[rows[0]]} to {self.first[rows[-1]]}), "
                "but not for each half of them"
            ) from fault
        self._keep([row for row in zip(rows, scores.tolist(), strict=True) if math.isfinite(row[1])])
        for row, value in zip(rows, scores, strict=True):
            if not math.isfinite(value):
                raise self._error(f"gave {value}, which is not a finite number, for {self._shown(row)}")

    def _call(self, rows: Sequence[int]) -> Matrix:
        """Return the scorer's numbers for the texts of ``rows``; raises ScorerFault when the whole call failed."""
        prompts, responses = [self.pairs[row][0] for row in rows], [self.pairs[row][1] for row in rows]
        try:
            scores = np.asarray(self.scorer.score(prompts, responses))
        except (RequestError, ScorerFault):
            raise
        except Exception as error:
            raise ScorerFault(f"raised {type(error).__name__}: {error}") from error
        if scores.shape != (len(rows),):
            raise ScorerFault(
                f"gave scores of shape {list(scores.shape)} for {len(rows)} texts; [{len(rows)}] is needed"
            )
        if scores.dtype == object and all(value is None or isinstance(value, (int, float)) for value in scores):
            try:
                scores = scores.astype(np.float64)
            except OverflowError:
                raise ScorerFault("gave an integer beyond the largest floating-point number") from None
        if scores.dtype.kind not in "fiub":
            raise ScorerFault(f"gave {type(scores[0]).__name__} instead of numbers")
        return scores.astype(np.float64)

    def _shown(self, row: int) -> str:
        prompt, response = (_short(text) for text in self.pairs[row])
        return f"sample {self.first[row]} (prompt {prompt}, response {response})"

    def _error(self, what: str) -> WorkError:
        return WorkError(f"objective {self.scorer.name!r}: the scorer {what}; {self._saved()}")

    def _saved(self) -> str:
        if self.store is None:
            return f"{self.done} of {len(self.pairs)} texts had a score"
        return f"the {self.done} of {len(self.pairs)} scores made so far are kept in {self.store.path}"


def _short(text: str, most: int = 60) -> str:
    """Return a text as one quoted line of bounded length, for messages."""
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most // 2]}...{shown[-most // 4 :]}"

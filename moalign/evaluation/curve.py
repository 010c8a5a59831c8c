"""``moalign eval --snapshots``: how much of what a method gains along training is true.

Every snapshot of a run (:mod:`moalign.training.snapshots`) and at last the finished policy answer the evaluation
prompts as ``eval`` has them: the same preferences, random numbers, judge and KL to base. True rewards are the judge's,
believed ones those that training saw; where both are one there is only the truth. Against the square root of the KL
this is the curve of Gao, Schulman and Hilton 2022 (arXiv 2210.10760).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from pydantic import computed_field

from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, prefixed, silent
from moalign.evaluation import answers as waiting
from moalign.evaluation import evaluate
from moalign.evaluation.result import Content, EvaluatedRun
from moalign.lm import adapters
from moalign.methods.base import Method
from moalign.pareto import indicators
from moalign.pareto.hypervolume import hypervolume
from moalign.report.overoptimisation import draw_over_optimisation
from moalign.runs import atomic
from moalign.training import snapshots
from moalign.training.job import RunContext
from moalign.training.snapshots import Snapshot


class Reward(Content):
    """Mean rewards of one policy by one panel, in that panel's normalised units."""

    inner_product: float
    """Mean over the preferences of w.n, n the mean rewards of the answers for w."""
    hypervolume: float
    """From the task card's reference point."""
    means: tuple[tuple[float, ...], ...]
    """``[preferences][objectives]``."""

    @classmethod
    def of(cls, preferences: Sequence[Preference], means: Matrix, corner: Sequence[float]) -> Reward:
        """Return them for mean rewards ``[preferences, objectives]`` and a reference point ``[objectives]``."""
        return cls(
            inner_product=indicators.inner_product(np.array(preferences), means),
            hypervolume=hypervolume(means, corner),
            means=tuple(map(tuple, means.tolist())),
        )


class CurveRow(Content):
    """One policy on the way."""

    part: str
    """The stage of training."""
    step: int
    """Of the part's."""
    share: float
    """Of all the run's steps that were done, 0 to 1."""
    kl: float | None
    """Mean KL to base over the preferences, in nats per response; None where one is not known."""
    kl_by_preference: tuple[float | None, ...]
    """By preference."""
    true: Reward
    believed: Reward | None
    """By the rewards that training saw; None where they are the judge's."""
    collapse_rate: float
    spread: float | None
    """Mean over the answers of ``sum_k w_k sd_k``, sd the disagreement of the training panel's ensembles in normalised
    units; None where it has none."""


class Peak(Content):
    """Where the truth is best."""

    row: int
    part: str
    step: int
    kl: float | None
    value: float
    lost: float
    """What the finished policy has less."""


class Curve(EvaluatedRun):
    """A run along its training, as ``curve.json`` holds it."""

    KIND: ClassVar[str] = "a curve of snapshots"
    REMEDY: ClassVar[str] = "remove it and judge again: moalign eval {folder} --snapshots"

    prefs: tuple[Preference, ...]
    samples: int
    prompts: int
    rows: tuple[CurveRow, ...]
    """In the order of training; the last is the finished policy."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def best(self) -> dict[str, Peak]:
        """The row at which the truth is best, by ``inner_product`` and by ``hypervolume``; of equals the first."""
        return {name: self._peak(name) for name in ("inner_product", "hypervolume")}

    def _peak(self, name: str) -> Peak:
        values = [float(getattr(row.true, name)) for row in self.rows]
        index = values.index(max(values))
        row = self.rows[index]
        lost = values[index] - values[-1]
        return Peak(row=index, part=row.part, step=row.step, kl=row.kl, value=values[index], lost=lost)

    @classmethod
    def migrated(cls, content: dict[str, Any], folder: Path) -> dict[str, Any]:
        """See :meth:`StoredResult.migrated`; ``run`` becomes the folder that the file lies in now."""
        return {**content, "run": str(folder)}


def curve(
    method: Method,
    context: RunContext,
    requested: Sequence[Preference] | None = None,
    progress: Progress = silent,
    samples: int | None = None,
) -> Curve:
    """Judge the snapshots of a finished run and its finished policy; those judged before are read back.

    The curve goes to ``curve*.json``, its figure beside it, and the answers to ``curve*.parquet``: columns ``part`` and
    ``step`` beside those of an evaluation, so that a rule can be tried by scoring them again. Both are written after
    every snapshot. Arguments are those of :func:`moalign.evaluation.evaluate.evaluate`.

    Raises RequestError when the run has no snapshots, or cannot answer for the preferences.
    """
    preferences = evaluate.preferences_for(method, context, requested)
    samples = samples or context.task.card.evaluation.samples
    points = snapshots.kept(context.run)
    name = evaluate.names(context.task, preferences, samples)[0].replace("eval", "curve", 1)
    path = context.run.path / f"{name}.json"
    rows, answers = _judged_before(context, name)

    def result() -> Curve:
        return Curve(
            **evaluate.about(method, context),
            prefs=tuple(preferences),
            samples=samples,
            prompts=len(context.task.eval_prompts),
            rows=tuple(rows[_key(point)] for point in points if _key(point) in rows),
        )

    missing = [number for number, point in enumerate(points) if _key(point) not in rows]
    for number in missing:
        point, report = points[number], prefixed(progress, f"snapshot {number + 1} of {len(points)}")
        atomic.require_new(path)
        with _at(context, point) as there:
            rows[_key(point)], table = _judge(method, there, point, preferences, samples, report)
        answers.append(table.assign(part=point.part, step=point.step))
        context.run.write_table(name, pd.concat(answers, ignore_index=True))
        atomic.write_json(path, result().content)
        waiting.judged(context, _table_name(context, point, preferences, samples))
    made, figure = result(), path.with_suffix(".png")
    if missing or not figure.is_file():
        atomic.write_bytes(figure, draw_over_optimisation([made.content]))
    return made


def _table_name(context: RunContext, point: Snapshot, preferences: Sequence[Preference], samples: int) -> str:
    """Return the name of a snapshot's answers while they are judged."""
    return f"{evaluate.names(context.task, preferences, samples)[1]}-{point.part}-{point.step}"


def _key(point: Snapshot | CurveRow) -> tuple[str, int]:
    return point.part, point.step


def _judged_before(context: RunContext, name: str) -> tuple[dict[tuple[str, int], CurveRow], list[pd.DataFrame]]:
    """Return the rows that were judged on this task and whose answers are there, and these answers."""
    path = context.run.path / f"{name}.json"
    if not (path.is_file() and path.with_suffix(".parquet").is_file()):
        return {}, []
    stored = Curve.load(path)
    if stored.card_hash != context.task.hash:
        return {}, []
    table = context.run.read_table(name, Curve.REMEDY.format(folder=shlex.quote(str(context.run.path))))
    answers = {key: table for key, table in table.groupby(["part", "step"], sort=False)}
    rows = {_key(row): row for row in stored.rows if _key(row) in answers}
    return rows, [answers[key] for key in rows]


@contextmanager
def _at(context: RunContext, point: Snapshot) -> Iterator[RunContext]:
    """Give the context of a snapshot; what it puts on the model goes when it is left."""
    there = replace(context, snapshot=point.folder, cache={})
    lm = context.task.language_model
    before = set(getattr(lm.model, "peft_config", {}))
    try:
        yield there
    finally:
        for name in set(getattr(lm.model, "peft_config", {})) - before:
            adapters.drop(lm, name)


def _judge(
    method: Method,
    context: RunContext,
    point: Snapshot,
    preferences: Sequence[Preference],
    samples: int,
    progress: Progress,
) -> tuple[CurveRow, pd.DataFrame]:
    """Return the row of a snapshot and its answers, as an evaluation makes them."""
    name = _table_name(context, point, preferences, samples)
    answered = evaluate.respond(method, context, preferences, samples, name, progress)
    table, divergences = answered.table, answered.divergences
    corner = context.task.card.reference_point
    means = evaluate.scores_of(context, table, preferences, samples).mean(axis=0)
    proxy = evaluate.proxy_reward(context, table, preferences, samples)
    believed = None if proxy is None else np.array([reward.mean for reward in proxy.points])
    quality = evaluate.quality_of(context.task, table["response"].tolist(), divergences)
    row = CurveRow(
        part=point.part,
        step=point.step,
        share=point.share,
        kl=quality.kl,
        kl_by_preference=tuple(divergence.nats for divergence in divergences),
        true=Reward.of(preferences, means, corner),
        believed=None if believed is None else Reward.of(preferences, believed, corner),
        collapse_rate=quality.rate,
        spread=spread_of(context, table, preferences),
    )
    return row, table.drop(columns="ids", errors="ignore")


def spread_of(context: RunContext, table: pd.DataFrame, preferences: Sequence[Preference]) -> float | None:
    """Return the mean over answers of ``sum_k w_k sd_k`` in normalised units; None where no objective has members.

    ``table`` holds equally many answers to each of ``preferences``, in their order.
    """
    raw = context.task.panel.spread(table["prompt"].tolist(), table["response"].tolist())
    scale = np.array(context.task.normaliser.hi) - np.array(context.task.normaliser.lo)
    weights = np.repeat(np.array(preferences), len(table) // len(preferences), axis=0)
    return float((weights * raw / scale).sum(axis=1).mean()) if raw.any() else None

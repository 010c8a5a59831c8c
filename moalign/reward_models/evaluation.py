"""How good a reward model is on preference pairs: accuracy and calibration of each data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError
from moalign.reward_models import calibration
from moalign.reward_models.calibration import CalibrationReport, Vector
from moalign.reward_models.pairs import PairSet
from moalign.rewards.ensemble import EnsembleScorer, classifier
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.runs import atomic


class Agreement(TypedDict):
    """Accuracy, and ECE by the number of bins."""

    accuracy: float
    ece: dict[str, float]


class DataSetReport(CalibrationReport):
    """How a reward model does on one data set."""

    name: str
    rows_shortened: int
    temperature: float | None
    """Fitted on other pairs; None without such."""
    ece_scaled: dict[str, float] | None
    """ECE after division by the temperature."""
    truth: Agreement | None
    """The same against the true probabilities, where they are known."""


class Mean(Agreement):
    """Averages over data sets."""

    truth: NotRequired[Agreement]


class Evaluation(TypedDict):
    """How a reward model does on every data set, and on average, as the paper reports it."""

    datasets: list[DataSetReport]
    mean: Mean


class Judged(Evaluation):
    """The part of a stored evaluation that is shown."""

    figures: list[str]


def read(path: Path, remedy: str) -> dict[str, Any]:
    """Return a stored evaluation; RequestError, with what to do, for one that is damaged."""
    content = atomic.read_json(path, remedy)
    try:
        TypeAdapter(Judged).validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RequestError(f"{path}: {where}: not what moalign wrote ({first['msg']}); {remedy}") from error
    return dict(content)


def deltas(scorer: ClassifierScorer | EnsembleScorer, pairs: PairSet) -> Vector:
    """Return ``r(chosen) - r(rejected)`` of every pair in log odds, ``[pairs]``; turned where smaller is better."""
    scores = np.asarray(scorer.score(pairs.prompts * 2, pairs.chosen + pairs.rejected))
    if isinstance(scorer, EnsembleScorer):
        scores = scores * scorer.scale
    delta: Vector = scores[: len(pairs)] - scores[len(pairs) :]
    return delta if scorer.maximise else 0.0 - delta


def evaluate(
    spec: ClassifierObjective, sets: Sequence[PairSet], fitting: Sequence[PairSet] = (), draws: int = 1000
) -> Evaluation:
    """Judge a reward model on the pairs of every data set.

    The ``label`` of ``spec`` may be None for a model with a head per data set. Temperatures are fitted on the pairs of
    ``fitting`` (the calibration split), in the same order of data sets. ``draws`` is the bootstrap's.
    """
    reports: list[DataSetReport] = []
    labels = list(classifier(spec.model_copy(update={"label": 0}), Path()).labels.values())
    for number, pairs in enumerate(sets):
        head = spec
        if spec.label is None and len(labels) > 1 and pairs.name in labels:
            head = spec.model_copy(update={"label": pairs.name})
        scorer = classifier(head, Path())
        delta, shortened = deltas(scorer, pairs), scorer.rows_shortened
        temperature = None
        if fitting and len(fitting[number]):
            temperature = calibration.temperature(deltas(scorer, fitting[number]))
        truth: Agreement | None = None
        if pairs.chance:
            accuracy = calibration.accuracy(delta, pairs.chance)
            truth = Agreement(accuracy=accuracy, ece=calibration.eces(delta, pairs.chance))
        reports.append(
            DataSetReport(
                name=pairs.name,
                **calibration.report(delta, draws=draws),
                rows_shortened=shortened,
                temperature=temperature,
                ece_scaled=None if temperature is None else calibration.eces(delta / temperature),
                truth=truth,
            )
        )
    average = _average(reports)
    mean = Mean(accuracy=average["accuracy"], ece=average["ece"])
    known = [report["truth"] for report in reports if report["truth"] is not None]
    if len(known) == len(reports):
        mean["truth"] = _average(known)
    return Evaluation(datasets=reports, mean=mean)


def _average(rows: Sequence[Agreement | DataSetReport]) -> Agreement:
    return Agreement(
        accuracy=float(np.mean([row["accuracy"] for row in rows])),
        ece={bins: float(np.mean([row["ece"][bins] for row in rows])) for bins in map(str, calibration.BINS)},
    )

"""How good a reward model is on preference pairs: accuracy and calibration of each data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moalign.config.objectives import ClassifierObjective
from moalign.reward_models import calibration
from moalign.reward_models.pairs import PairSet
from moalign.rewards.hf_classifier import ClassifierScorer

Vector = NDArray[np.float64]


def head_of(scorer_labels: Sequence[str], label: str | int | None, data_set: str) -> str | int | None:
    """Return the output that judges a data set: the requested one, else the head of the data set's own name."""
    if label is not None or len(scorer_labels) == 1:
        return label
    return data_set if data_set in scorer_labels else None


def deltas(spec: ClassifierObjective, pairs: PairSet, base_dir: Path) -> tuple[Vector, ClassifierScorer]:
    """Return ``r(chosen) - r(rejected)`` of every pair, ``[pairs]``, and the scorer that gave them.

    The sign is turned where smaller scores are better.
    """
    scorer = ClassifierScorer(spec, base_dir)
    scores = np.asarray(scorer.score(pairs.prompts * 2, pairs.chosen + pairs.rejected))
    delta: Vector = scores[: len(pairs)] - scores[len(pairs) :]
    return (delta if spec.maximise else 0.0 - delta), scorer


def evaluate(
    spec: ClassifierObjective,
    sets: Sequence[PairSet],
    fitting: Sequence[PairSet] = (),
    *,
    base_dir: Path = Path("."),
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Judge a reward model on pairs.

    Args:
        spec: the model; its ``label`` may be None for a model with a head per data set.
        sets: the pairs to judge on, by data set.
        fitting: pairs on which temperatures are fitted (the calibration split), in the same order of data sets; may be
            empty.
        draws, seed: of the bootstrap.

    Returns:
        ``datasets``: per data set the numbers of :func:`moalign.reward_models.calibration.report`, ``temperature``
        and the ECE after it (None without ``fitting``), and, where the true probabilities are known, ``truth``:
        accuracy and ECE against them. ``mean``: accuracy and ECE averaged over data sets, as the paper reports them.
    """
    rows = []
    labels = list(ClassifierScorer(spec.model_copy(update={"label": 0}), base_dir).labels.values())
    for number, pairs in enumerate(sets):
        head = spec.model_copy(update={"label": head_of(labels, spec.label, pairs.name)})
        delta, scorer = deltas(head, pairs, base_dir)
        row: dict[str, Any] = {"name": pairs.name, **calibration.report(delta, 1.0, draws, seed)}
        row["rows_shortened"] = scorer.rows_shortened
        row |= _scaled(head, delta, fitting[number] if fitting else None, base_dir)
        row["truth"] = None
        if pairs.chance:
            chance = np.asarray(pairs.chance)
            row["truth"] = {"accuracy": calibration.accuracy(delta, chance), "ece": _every_ece(delta, chance)}
        rows.append(row)
    return {"datasets": rows, "mean": _means(rows)}


def _scaled(spec: ClassifierObjective, delta: Vector, fitting: PairSet | None, base_dir: Path) -> dict[str, Any]:
    """Return the temperature fitted on other pairs, and the ECE after dividing by it."""
    if fitting is None or not len(fitting):
        return {"temperature": None, "ece_scaled": None}
    temperature = calibration.temperature(deltas(spec, fitting, base_dir)[0])
    return {"temperature": temperature, "ece_scaled": _every_ece(delta / temperature)}


def _every_ece(delta: Vector, first: Vector | float = 1.0) -> dict[str, float]:
    return {str(bins): calibration.ece(delta, first, bins) for bins in calibration.BINS}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean: dict[str, Any] = {"accuracy": float(np.mean([row["accuracy"] for row in rows]))}
    mean["ece"] = {str(bins): float(np.mean([row["ece"][str(bins)] for row in rows])) for bins in calibration.BINS}
    known = [row["truth"] for row in rows if row["truth"] is not None]
    if len(known) == len(rows):
        mean["truth"] = {
            "accuracy": float(np.mean([truth["accuracy"] for truth in known])),
            "ece": {
                str(bins): float(np.mean([truth["ece"][str(bins)] for truth in known])) for bins in calibration.BINS
            },
        }
    return mean

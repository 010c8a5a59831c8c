"""Judging reward models: per data set, with the right head and sign, against numbers from the bare model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.reward_models import calibration, evaluation, runs
from moalign.reward_models.runs import RewardRequest
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.runs.run import Run

Trained = Callable[..., tuple[RewardRequest, Run]]


def test_each_data_set_is_judged_on_its_own(trained: Trained) -> None:
    request, run = trained(2)
    spec = runs.objective(run)
    result = evaluation.evaluate(spec, request.parts["eval"], draws=100)
    assert [row["name"] for row in result["datasets"]] == ["eager", "careful"]
    scorer = ClassifierScorer(spec, Path())
    for pair_set, row in zip(request.parts["eval"], result["datasets"], strict=True):
        delta = np.subtract(
            scorer.score(pair_set.prompts, pair_set.chosen), scorer.score(pair_set.prompts, pair_set.rejected)
        )
        assert row["accuracy"] == pytest.approx((delta > 0).mean())
        assert row["ece"]["10"] == pytest.approx(calibration.ece(delta), abs=1e-6)
        assert row["truth"]["ece"]["20"] == pytest.approx(calibration.ece(delta, pair_set.chance, 20), abs=1e-6)
        assert row["temperature"] is None
    mean = np.mean([row["ece"]["5"] for row in result["datasets"]])
    assert result["mean"]["ece"]["5"] == pytest.approx(mean)
    assert result["mean"]["truth"]["accuracy"] == pytest.approx(
        np.mean([row["truth"]["accuracy"] for row in result["datasets"]])
    )


def test_a_head_per_data_set_is_found_by_its_name(trained: Trained) -> None:
    request, run = trained(2, heads="each")
    result = evaluation.evaluate(runs.objective(run), request.parts["eval"], draws=100)
    for index, (pair_set, row) in enumerate(zip(request.parts["eval"], result["datasets"], strict=True)):
        scorer = ClassifierScorer(runs.objective(run, "x", pair_set.name), Path())
        assert scorer.index == index
        delta = np.subtract(
            scorer.score(pair_set.prompts, pair_set.chosen), scorer.score(pair_set.prompts, pair_set.rejected)
        )
        assert row["accuracy"] == pytest.approx((delta > 0).mean())


def test_a_model_with_several_heads_and_no_clue_asks(trained: Trained) -> None:
    request, run = trained(2, heads="each")
    pair_set = replace(request.parts["eval"][0], name="someone else")
    with pytest.raises(RequestError, match="has 2 labels .*eager.*label: INDEX"):
        evaluation.evaluate(runs.objective(run), [pair_set], draws=100)


def test_smaller_is_better_turns_the_difference(trained: Trained) -> None:
    request, run = trained(1)
    spec = runs.objective(run)
    sets = request.parts["eval"]
    plain = evaluation.evaluate(spec, sets, draws=100)["datasets"][0]["accuracy"]
    turned = evaluation.evaluate(spec.model_copy(update={"maximise": False}), sets, draws=100)["datasets"][0]
    assert turned["accuracy"] == pytest.approx(1 - plain)


def test_the_temperature_comes_from_other_pairs(trained: Trained) -> None:
    request, run = trained(1, count=80)
    spec = runs.objective(run)
    report = evaluation.evaluate(spec, request.parts["eval"], request.parts["calibration"], draws=100)["datasets"][0]
    fitted = calibration.temperature(evaluation.deltas(spec, request.parts["calibration"][0], Path())[0])
    delta = evaluation.deltas(spec, request.parts["eval"][0], Path())[0]
    assert report["temperature"] == pytest.approx(fitted)
    assert report["ece_scaled"]["10"] == pytest.approx(calibration.ece(delta / fitted))

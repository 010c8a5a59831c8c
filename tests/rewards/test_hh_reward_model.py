"""The whole path on real human preferences: HH harmless-base pairs, a pretrained backbone of 260,000 parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.config.card import SourceSpec, SplitSpec
from moalign.reward_models import evaluation, pairs, runs
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.settings import RewardSettings

SETTINGS = RewardSettings(
    steps=100,
    batch=16,
    lr=1e-3,
    warmup=10,
    weight_decay=0.01,
    max_tokens=512,
    splits=SplitSpec(train=0.7, calibration=0.1, eval=0.2),
)
"""About one pass over 1,613 pairs."""


@pytest.fixture(scope="module")
def hh(shared: Path) -> list[PairSet]:
    """All 2,312 real pairs as one data set."""
    path = shared / "data" / "hh-harmless-base-test.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"the HH pairs are not there: {path}")
    return pairs.read([("hh", SourceSpec(path=str(path)))])


def test_real_pairs_split_by_their_prompt(hh: list[PairSet]) -> None:
    (pair_set,) = hh
    assert len(pair_set) == 2312
    parts = pair_set.split(SETTINGS.splits)
    assert sum(map(len, parts.values())) == 2312
    assert 400 < len(parts["eval"]) < 530
    assert not set(parts["train"].prompts) & set(parts["eval"].prompts)


@pytest.mark.slow
def test_real_dialogues_train_and_resume(hh: list[PairSet], stories: Path, tmp_path: Path) -> None:
    """A few steps on the longest dialogues: cut on the left to what the model reads, answers whole."""
    (pair_set,) = hh
    longest = sorted(range(len(pair_set)), key=lambda row: -len(pair_set.prompts[row]))[:120]
    short = SETTINGS.model_copy(update={"steps": 2, "batch": 2, "max_tokens": 128})
    run, _ = runs.obtain(runs.make("hh", short, str(stories), [pair_set.pick(longest)], results=tmp_path))
    assert run.record.notes["rows_shortened"] > 100
    result = evaluation.evaluate(runs.objective(run), [pair_set.pick(longest[:8])], draws=100)
    assert result["datasets"][0]["rows_shortened"] == 16


@pytest.mark.slow
def test_held_out_accuracy_is_above_chance_by_more_than_the_interval(
    hh: list[PairSet], stories: Path, tmp_path: Path
) -> None:
    request = runs.make("hh", SETTINGS, str(stories), hh, results=tmp_path)
    run, _ = runs.obtain(request)
    result = evaluation.evaluate(runs.objective(run), request.parts["eval"], request.parts["calibration"])
    (row,) = result["datasets"]
    assert row["accuracy_ci"][0] > 0.5
    assert 0 < row["ece"]["10"] < 0.2
    assert 0.2 < row["temperature"] < 5

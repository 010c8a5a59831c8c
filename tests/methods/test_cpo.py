"""CPO: levels, conditions, the value of a response, and both stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.core.progress import silent
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.methods import cpo
from moalign.methods.cpo import (
    Config,
    conditioned_pairs,
    controlled,
    desired_levels,
    importances,
    levels_of,
    tags,
    value,
)
from moalign.runs.run import Run
from moalign.tasks.responses import Scored
from moalign.training import offline_dpo

NAMES = ["helpfulness", "honesty"]
BOTH = np.array([True, True])
ONES = np.ones(2)
STAGE = "{steps: 4, batch: 4, lr: 0.01, max_tokens: 64, log_every: 1, checkpoint_every: 2}"
QUICK = (f"cpsft={STAGE}", f"cdpo={STAGE}", "per_prompt=1", "policy.lora={r: 4, alpha: 8, dropout: 0.0}")


def test_levels_count_the_quintiles_that_a_score_passes() -> None:
    edges = np.array([[10.0, 0.1], [20.0, 0.2], [30.0, 0.3], [40.0, 0.4]])
    raw = np.array([[5.0, 0.1], [10.5, 0.45], [40.0, 0.25], [99.0, -1.0]])
    assert levels_of(raw, edges).tolist() == [[1, 1], [2, 5], [4, 3], [5, 1]]


def test_tags_are_written_as_the_paper_does() -> None:
    assert tags(np.array([5, 4]), NAMES) == "<helpfulness:5> <honesty:4>"
    assert tags(np.array([5, 4]), NAMES, np.array([False, True])) == "<honesty:4>"


@pytest.mark.parametrize(
    ("levels", "condition", "shown", "weights", "wanted"),
    [
        ((4, 2), (4, 2), (True, True), (1.0, 1.0), 0.0),  # an exact match
        ((5, 1), (4, 2), (True, True), (1.0, 1.0), -2.0),
        ((1, 5), (4, 2), (True, True), (1.0, 0.5), -4.5),  # -3 - .5 * 3
        ((3, 5), (4, 2), (True, False), (1.0, 1.0), 4.0),  # -1 + 5: what is not controlled is to be high
        ((4, 1), (4, 2), (True, False), (1.0, 2.0), 2.0),
    ],
)
def test_the_value_of_a_response_by_hand(
    levels: tuple[int, int],
    condition: tuple[int, int],
    shown: tuple[bool, bool],
    weights: tuple[float, float],
    wanted: float,
) -> None:
    assert value(np.array(levels), np.array(condition), np.array(shown), np.array(weights)) == wanted


@pytest.mark.parametrize(
    ("preference", "levels"),
    [
        ((1, 0), [5, 1]),
        ((0, 1), [1, 5]),
        ((0.5, 0.5), [4, 4]),
        ((0.8, 0.2), [5, 2]),
        ((1 / 3, 1 / 3, 1 / 3), [3, 3, 3]),
    ],
)
def test_a_preference_becomes_levels(preference: tuple[float, ...], levels: list[int]) -> None:
    # .5/.5: 1 + 4 * .7071 = 3.83; .8/.2: 1 + 4 * .970 = 4.88 and 1 + 4 * .243 = 1.97; thirds: 1 + 4 * .577 = 3.31.
    assert desired_levels(preference).tolist() == levels


def test_importances_name_objectives_and_are_positive() -> None:
    assert importances(Config(importance={"honesty": 2.0}), NAMES).tolist() == [1.0, 2.0]
    with pytest.raises(RequestError, match="importance: unknown objective 'honest'.*did you mean 'honesty'"):
        importances(Config(importance={"honest": 2.0}), NAMES)
    with pytest.raises(RequestError, match="importance.honesty: found -1; allowed: a number above 0"):
        importances(Config(importance={"honesty": -1.0}), NAMES)


def test_one_objective_is_always_controlled() -> None:
    drawn = controlled(np.random.default_rng(0), 4000, 3, 0.6)
    assert drawn.any(axis=1).all()
    # .4 each, and a third of the .216 of rows that had none.
    np.testing.assert_allclose(drawn.mean(axis=0), 0.4 + 0.216 / 3, atol=0.03)
    assert controlled(np.random.default_rng(0), 50, 2, 0.0).all()


def scored(rows: list[tuple[str, str]]) -> Scored:
    return Scored([row[0] for row in rows], [row[1] for row in rows], np.zeros((len(rows), 2)))


def test_pairs_follow_the_value_under_a_response_s_own_levels() -> None:
    told = scored([("p", text) for text in "abcd"])
    levels = np.array([[5, 1], [1, 5], [3, 3], [4, 2]])
    pairs, dropped = conditioned_pairs(told, levels, ONES, Config(per_prompt=6), seed=3)
    assert len(pairs) + dropped["ties"] == 6
    assert len(pairs) >= 3
    assert [(a, b) for a, b, *_ in pairs] == [(3, 0), (1, 2), (0, 2), (3, 1), (0, 1), (2, 3)]  # by the seed alone
    for a, b, c, shown, gap in pairs:
        assert c.tolist() in levels.tolist()
        assert value(levels[a], c, shown, ONES) - value(levels[b], c, shown, ONES) == gap > 0


@pytest.mark.parametrize(("labels", "expected"), [("order", None), ("bradley-terry", [0.731059, 0.982014])])
def test_labels_are_certain_or_as_likely_as_the_values_say(
    labels: str, expected: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    both = np.array([True, True])
    pairs = [(0, 1, np.array([5, 1]), both, 1.0), (1, 0, np.array([1, 5]), both, 4.0)]
    monkeypatch.setattr(cpo, "conditioned_pairs", lambda *_: (pairs, {}))
    monkeypatch.setattr(offline_dpo, "encode_pairs", lambda *_, **named: seen.update(named))
    renderer = SimpleNamespace(beside=lambda prompt, told: f"{told} {prompt}")
    task = SimpleNamespace(names=["one", "two"], renderer=renderer)
    job = SimpleNamespace(config=Config(labels=labels), task=task, seed=0, notes={})
    cpo.cdpo_rows(job, None, scored([("p", "a"), ("p", "b")]), np.ones((2, 2), dtype=int), ONES)
    assert seen["own_reference"]
    if expected is None:
        assert seen["chance"] is None
    else:
        np.testing.assert_allclose(seen["chance"], expected, atol=1e-6)


def test_ties_and_identical_texts_are_skipped_and_counted() -> None:
    told = scored([("p", "a"), ("p", "b"), ("q", "same"), ("q", "same")])
    levels = np.array([[2, 2], [2, 2], [1, 5], [5, 1]])
    pairs, dropped = conditioned_pairs(told, levels, ONES, Config(), seed=0)
    assert pairs == []
    assert dropped == {"ties": 1, "identical": 1}


def trained(
    task: tuple[str, ...], results: Path, progress: Callable[[str, int, int], None] = silent, *more: str
) -> Run:
    return train(plan(TrainRequest("cpo", overrides=(*task, *QUICK, *more), results=results)), progress)[0]


@pytest.mark.slow
def test_both_stages_resume_and_the_policy_asks_for_levels(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(small_task, tmp_path / "whole")

    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("cdpo", 3) and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    stopped: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        trained(small_task, tmp_path / "b", progress)
    run = trained(small_task, tmp_path / "b", progress)
    name = "adapter/adapter_model.safetensors"
    assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert run.record.notes == whole.record.notes
    assert run.record.cost.tokens_trained == whole.record.cost.tokens_trained
    assert run.record.cost.reward_calls == whole.record.cost.reward_calls
    first = next(line for line in run.metrics() if line["phase"] == "cdpo")
    assert first["preference"] < 1e-4  # the reference is the policy after CPSFT, not the base
    method, context = context_of(run, tmp_path / "b")
    assert method.policy(context, (0.8, 0.2)).render("hello") == "[<helpfulness:5> <harmlessness:2>] hello"


@pytest.mark.slow
def test_the_levels_are_the_calibration_split_s_quintiles(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run = trained(small_task, tmp_path, silent, "cdpo={steps: 0}")
    task = context_of(run, tmp_path)[1].task
    told = task.calibration()
    assert set(told.prompts) <= set(task.prompts["calibration"])
    wanted = np.quantile(told.raw, [0.2, 0.4, 0.6, 0.8], axis=0)
    np.testing.assert_allclose(run.record.notes["level_edges"], wanted)
    share = [(levels_of(told.raw, wanted) == level).mean(axis=0).tolist() for level in range(1, 6)]
    np.testing.assert_allclose(share, 0.2, atol=0.02)

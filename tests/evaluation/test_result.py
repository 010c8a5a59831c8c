"""The stored result: what older versions wrote is read, what is damaged is one message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.evaluation.result import VERSION, EvalResult
from moalign.pareto.indicators import spacing


def point(*prefs: float, mean: list[float]) -> dict[str, Any]:
    numbers = {"mean": mean, "ci": [[0.1, 0.3], [0.8, 1.0]], "raw": [2.0, 9.0], "raw_ci": [[1, 3], [8, 10]]}
    return {"prefs": list(prefs), "nondominated": True, **numbers}


OLDEST: dict[str, Any] = {
    "run": "elsewhere/runs/toy/sft/0123",
    "run_id": "0123",
    "method": "sft",
    "task": "toy",
    "card_hash": "abc",
    "seed": 0,
    "objectives": ["a", "b"],
    "points": [point(0.0, 1.0, mean=[0.1, 0.9]), point(0.5, 0.5, mean=[0.3, 0.5]), point(1.0, 0.0, mean=[0.8, 0.1])],
    "hypervolume": 0.18,
    "hypervolume_ci": [0.1, 0.2],
    "ref": [0.0, 0.0],
    "sensitivity": {"ref": [-0.1, -0.1], "hypervolume": 0.3},
    "front": 2,
    "prompts": 40,
    "optimal_share": None,
    "indicators": {"tau": 0.5, "tau_per_objective": [0.5, 0.5], "inner_product": 0.5, "expected_utility": 0.6},
    "quality": {"rate": 0.0, "causes": {"short": 0.0}, "mean_length": 20.5, "distinct_3": 0.9},
    "cost": {"tokens_generated": 900, "reward_calls": 0, "seconds": 1.5},
    "believed": {"points": [{"prefs": [0.0, 1.0], "mean": [0.3, 0.8]}], "hypervolume": 0.24},
    "gap": 0.06,
}
"""An evaluation before there was a version: no KL, no samples, no spacing, ``proxy_reward`` under another name."""


@pytest.fixture
def load(tmp_path: Path) -> Callable[[Any], EvalResult]:
    card = {"name": "toy", "evaluation": {"samples": 3}}
    record = {"run_id": "0123", "method": "sft", "task": "toy", "card_hash": "abc", "seed": 0, "status": "done"}
    record |= {"created": "2025-01-01T00:00:00Z", "recipe": {"card": card}}
    (tmp_path / "run.json").write_text(json.dumps(record))

    def read(content: Any) -> EvalResult:
        (tmp_path / "eval.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return EvalResult.load(tmp_path / "eval.json")

    return read


def test_what_the_oldest_version_wrote_is_read(load: Callable[[Any], EvalResult], tmp_path: Path) -> None:
    result = load(OLDEST)
    assert result.version == VERSION and result.run == str(tmp_path), "the folder may have been moved"
    assert result.samples == 3, "as many as the card of the run says"
    assert (
        result.indicators.spacing == spacing([point.mean for point in result.points]) > 0
        and result.indicators.regret is None
    )
    assert result.proxy_reward is not None and result.proxy_reward.hypervolume == 0.24
    assert result.proxy_reward.inner_product == 0.8, "0 x 0.3 + 1 x 0.8: it follows from the points"
    assert result.proxy_reward.hypervolume_interval is None
    assert [point.kl for point in result.points] == [None] * 3
    assert result.quality.kl is None and not result.quality.kl_bound
    assert load(result.content) == result


def test_a_result_is_a_table_too(load: Callable[[Any], EvalResult]) -> None:
    frame = load(OLDEST).to_frame()
    assert frame["preference"].tolist() == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert frame.loc[0, ["a", "a_low", "a_high", "a_raw"]].tolist() == [0.1, 0.1, 0.3, 2.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"hyper', r"eval.json:1: not JSON \("),
        ("[]", "eval.json: not an evaluation that moalign wrote; remove it"),
        ({}, "eval.json: not an evaluation that moalign wrote; remove it"),
        ({**OLDEST, "points": None}, "eval.json: not an evaluation that moalign wrote"),
        (
            {**OLDEST, "points": [point(0.0, 1.0, mean=[0.1, 0.9, 0.4]), *OLDEST["points"][1:]]},
            r"eval.json: not an evaluation that moalign wrote \(.*\); remove it and evaluate again: moalign eval ",
        ),
        (
            {**OLDEST, "points": [point(0.0, 1.0, mean=[0.1, None])]},  # type: ignore[list-item]
            r"eval.json: not an evaluation that moalign wrote \(points: .*\); remove it and evaluate again: moalign",
        ),
        (
            {**OLDEST, "hypervolume": "much"},
            r"moalign wrote \(hypervolume: Input should be a valid number.*; remove it",
        ),
        ({**OLDEST, "version": VERSION + 1}, r"a newer moalign wrote it \(version 2 of the file\); update moalign"),
    ],
)
def test_what_is_damaged_is_one_message(load: Callable[[Any], EvalResult], content: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load(content)

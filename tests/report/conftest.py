"""A comparison as ``compare`` tells it, made from score matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign import preferences
from moalign.config.card import EvaluationSpec
from moalign.report import verdict
from moalign.workflow.evaluate import Evaluation, judge
from moalign.workflow.standings import Contender, standings

NAMES = ["helpfulness", "harmlessness", "humor", "brevity"]


def _contender(label: str, gain: float, grid: Any, on: Any, seeds: int, rate: float) -> Contender:
    m = len(on.names)
    runs, evaluations, costs = [], [], []
    for seed in range(seeds):
        noise = np.random.default_rng([seed, m]).normal(0, 0.2, (50, len(grid), m))
        noise -= noise.mean(axis=0)
        table = np.sqrt(np.array(grid)) * (0.6 + gain) + 0.1 + 0.01 * seed + noise
        told = judge(on, grid, table)
        told["quality"] = {"rate": rate, "causes": {"short": rate}, "mean_length": 21.0, "distinct_3": 0.99}
        told["cost"] = {"tokens_generated": 32071, "reward_calls": 2816, "seconds": 1.3}
        evaluations.append(Evaluation(told, table))
        costs.append(
            {"tokens_generated": 45283, "tokens_trained": 1358367, "reward_calls": 4000, "seconds": 60.7,
             "peak_memory_bytes": 735465472}
        )
        command = f"moalign train {label} --task toy --seed {seed}"
        runs.append({"run": f"results/{label}", "seed": seed, "status": "done", "error": None, "command": command})
    return Contender(label, label, True, list(range(seeds)), evaluations, costs, runs)


@pytest.fixture(scope="session")
def compared() -> Callable[..., dict[str, Any]]:
    """``compared({"a": 0.1, "b": 0.0}, objectives=2, seeds=1, optimum=True, dead=["c"], rates={"a": 0.1})``."""
    kept: dict[str, dict[str, Any]] = {}

    def build(
        gains: dict[str, float],
        objectives: int = 2,
        seeds: int = 1,
        optimum: bool = True,
        dead: tuple[str, ...] = (),
        rates: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        key = repr((gains, objectives, seeds, optimum, dead, rates))
        if key not in kept:
            kept[key] = _told(gains, objectives, seeds, optimum, dead, rates or {})
        return copy.deepcopy(kept[key])

    return build


def _told(
    gains: dict[str, float], objectives: int, seeds: int, optimum: bool, dead: tuple[str, ...], rates: dict[str, float]
) -> dict[str, Any]:
    grid = preferences.grid(objectives, 10 if objectives == 2 else 4)
    names = NAMES[:objectives]
    best = np.sqrt(np.array(grid)) + 0.1 if optimum else None
    on: Any = SimpleNamespace(
        card=SimpleNamespace(
            evaluation=EvaluationSpec(bootstrap=100, seed=3),
            reference_point=[0.0] * objectives,
            sensitivity_point=[-0.1] * objectives,
        ),
        names=names,
        normaliser=SimpleNamespace(lo=[0.0] * objectives, hi=[1.0] * objectives, unit=np.asarray),
        eval_prompts=[],
        optimum=lambda asked, prompts: best,
    )
    rows = [_contender(label, gain, grid, on, seeds, rates.get(label, 0.0)) for label, gain in gains.items()]
    for label in dead:
        command = f"moalign train {label} --task toy --seed 0"
        run = {"run": label, "seed": 0, "status": "failed", "error": "WorkError: out of | memory", "command": command}
        rows.append(Contender(label, label, runs=[run]))
    told: dict[str, Any] = {
        "task": "toy",
        "description": "made up",
        "card_hash": "0123456789abcdef",
        "objectives": names,
        "ref": [0.0] * objectives,
        "grid": [list(w) for w in grid],
        "prompts": 50,
        "draws": 100,
        "level": 0.95,
        **standings(rows, grid, 100, 3),
        "failed": list(dead),
        "command": "moalign compare --task toy",
        "environment": {"python": "3.11.7", "packages": {"torch": "2.13"}, "commit": "abcdef0123456789", "dirty": True},
        "figure": "results/compare/toy-1/fronts.png",
        "markdown": "results/compare/toy-1/compare.md",
        "json": "results/compare/toy-1/compare.json",
    }
    told["verdict"] = verdict.sentences(told)
    return told

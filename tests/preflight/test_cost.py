"""``check`` says what a run costs at most; here every method is trained and its record compared with that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moalign.core import preferences
from moalign.experiment import train
from moalign.experiment.train import Plan, TrainRequest
from moalign.methods import registry
from moalign.preflight import cost
from moalign.preflight.cost import CostBounds
from moalign.runs.meter import Meter

LEFT_OUT = {"ric": 24, "paretohqd": 48 * 3}
"""Responses that a method may leave unscored: those that collapse, those that are equal."""

CHANGED = {
    "p-morl": ["warm_start=hindsight", "distil={steps: 2, batch: 4, n: 2, max_tokens: 128}"],
    "modpo": ["margin=implicit"],
    "moc": ["epochs=2", "samples=2"],
    "morlhf": ["conditioned=true", "groups=2"],
    "ric": ["online_rounds=2"],
    "sft": ["steps=2"],
    "paretohqd": ["second.steps=0"],
    "pcm": ["rl_experts={steps: 2, batch: 4}", "trainer=ppo"],
    "hindsight": ["steps=0"],
}
"""Settings by which a method goes other ways."""

ROUTES = [(name, []) for name in registry.names()] + sorted(CHANGED.items())


def planned(method: str, small_task: tuple[str, ...], results: Path, *more: str) -> Plan:
    quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
    return train.plan(TrainRequest(method, overrides=(*small_task, *quick, *more), results=results))


def bounds_of(plan: Plan) -> CostBounds:
    return cost.estimate(plan, plan.method.capabilities, None, plan.task, plan.given)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), ROUTES, ids=lambda value: value if isinstance(value, str) else "".join(value))
def test_a_run_costs_what_check_says_or_a_little_less(
    method: str, more: list[str], small_task: tuple[str, ...], tmp_path: Path
) -> None:
    plan = planned(method, small_task, tmp_path, *more)
    bounds = bounds_of(plan)
    assert bounds.unknown == []
    run, _ = train.train(plan)
    spent = run.record.cost
    assert spent.reward_calls <= bounds.reward_calls <= spent.reward_calls + 2 * LEFT_OUT.get(method, 0) * 2
    assert spent.tokens_generated <= bounds.tokens_generated == 12 * bounds.responses_sampled
    assert (spent.tokens_generated > 0) == (bounds.tokens_generated > 0)
    assert spent.tokens_trained <= bounds.tokens_trained
    assert (spent.tokens_trained > 0) == (bounds.tokens_trained > 0)
    told = run.record.notes.get("experts")
    trained = json.loads((next(tmp_path.glob(f"runs/*/*/{told['run_id']}")) / "run.json").read_text()) if told else {}
    assert bounds.experts == len(trained.get("preferences", []))
    adapters = {path.name for path in run.path.glob("adapter*") if not path.name.startswith("adapter-expert")}
    if method not in {"rewarded-soups", "dpo-soups", "mod", "pcm"} and adapters:
        assert bounds.policies == len(adapters)

"""``check`` says what a run costs at most; here every method is trained and its record compared with that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

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
    "bone-soups": ["extrapolate=[]"],
    "evo-soups": ['dpo_experts={"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}', "samples=2"],
}
"""Settings by which a method goes other ways."""

ROUTES = [(name, []) for name in registry.names()] + sorted(CHANGED.items())


def planned(method: str, small_task: tuple[str, ...], results: Path, *more: str) -> Plan:
    quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
    return train.plan(TrainRequest(method, overrides=(*small_task, *quick, *more), results=results))


def bounds_of(plan: Plan) -> CostBounds:
    return cost.estimate(plan, plan.method.capabilities, None, plan.task, plan.given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"), ROUTES, ids=lambda value: value if isinstance(value, str) else "".join(value)
)
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
    note, corners = run.record.notes.get("experts"), []
    if note:
        (folder,) = tmp_path.glob(f"runs/*/*/{note['run_id']}")
        corners = json.loads((folder / "run.json").read_text())["preferences"]
    assert bounds.experts == len(corners)
    adapters = {path.name for path in run.path.glob("adapter*") if not path.name.startswith("adapter-expert")}
    if method not in {"rewarded-soups", "dpo-soups", "mod", "pcm"} and adapters:
        assert bounds.policies == len(adapters)


TALES = """\
name: tales
kind: text
description: x
objectives:
  - {name: long, kind: rule, rule: length}
  - {name: late, kind: rule, rule: dialogue-share}
reference_point: [0, 0]
sensitivity_point: [0, 0]
grid: 3
generation: {max_new_tokens: 12, max_prompt_tokens: 64}
pool: {prompts: 10, per_prompt: 3, calibration_per_prompt: 4}
splits: {train: 0.5, calibration: 0.25, eval: 0.25}
normaliser: {long: {mean: 5, sd: 2, lo: 0, hi: 12}, late: {mean: 5, sd: 2, lo: 0, hi: 12}}
data:
  prompts: {path: prompts.jsonl}
"""


@pytest.fixture
def tales(tmp_path: Path, random_base: Path) -> Path:
    """A task whose responses the base must make."""
    rows = [json.dumps({"prompt": f"how do i {word} ?"}) for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    card = tmp_path / "task.yaml"
    card.write_text(TALES + f"model: {random_base}\n")
    return card


WORDS = [f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]


def plan_of(card: Path, method: str, *more: str) -> Plan:
    quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
    request = TrainRequest(method, task=str(card), overrides=(*quick, *more), results=card.parent / "results")
    return train.plan(request)


@pytest.mark.parametrize("method", ["cpo", "hindsight", "sft"])
def test_what_the_base_is_sampled_for_is_counted_where_the_record_counts_it(tales: Path, method: str) -> None:
    """Ten prompts of three responses to learn from; sft learns from their texts alone, and counts neither."""
    plan = plan_of(tales, method)
    bounds, amounts = bounds_of(plan), plan.task.amounts()
    assert amounts is not None
    calibration = 4 * min(10, len(plan.task.prompts["calibration"]))
    own = {"cpo": 30 + calibration, "hindsight": 10 * 2, "sft": 0}[method]
    online = 2 * 4 * 2 if method == "hindsight" else 0
    assert bounds.responses_sampled == own + online
    assert bounds.reward_calls == 2 * (own + online)
    assert bounds.first_use.responses_sampled == calibration + (30 if method == "sft" else 0)
    run, _ = train.train(plan)
    assert run.record.cost.reward_calls == bounds.reward_calls
    assert 0 <= run.record.cost.tokens_generated <= bounds.tokens_generated
    assert (run.record.cost.tokens_generated > 0) == (own > 0)


def test_what_is_made_once_for_all_runs_is_named_apart(small_task: tuple[str, ...], tmp_path: Path) -> None:
    plan = planned("sft", small_task, tmp_path)
    first, meter = bounds_of(plan).first_use, Meter()
    vars(plan.task)["panel"] = plan.task.panel.with_meter(meter)
    _ = plan.task.normaliser
    assert meter.reward_calls == first.reward_calls - 2 * 16 * len(plan.task.prompts["train"])  # sft's own reading
    assert 0 < first.responses_sampled == 2 * min(24, len(plan.task.prompts["calibration"]))
    assert first.tokens_generated == 12 * first.responses_sampled


def test_pairs_that_the_data_labels_are_counted_when_they_are_scored(tales: Path) -> None:
    """modpo's margin needs the scores of both responses of every pair; dpo-lw reads the labels alone."""
    rows = [{"prompt": f"how do i {word} ?", "chosen": "a b c", "rejected": "d e"} for word in WORDS]
    (tales.parent / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tales.parent / "pairs.jsonl")}
    pairs_of = "task.data.pairs=" + json.dumps({"long": source, "late": source})
    plan = plan_of(tales, "modpo", pairs_of)
    pairs = len(plan.task.data_pairs(0)) + len(plan.task.data_pairs(1))
    assert bounds_of(plan).reward_calls == 2 * 2 * pairs > 0
    run, _ = train.train(plan)
    assert run.record.cost.reward_calls == 2 * 2 * pairs
    assert bounds_of(plan_of(tales, "dpo-lw", pairs_of)).reward_calls == 0


def test_the_preferences_of_the_request_count_not_the_grid(small_task: tuple[str, ...], tmp_path: Path) -> None:
    request = TrainRequest("morlhf", prefs=("0.5,0.5",), overrides=small_task, results=tmp_path)
    assert bounds_of(train.plan(request)).policies == 1
    assert len(preferences.grid_of(2, 21)) == bounds_of(train.plan(replace(request, prefs=(), grid=21))).policies


@pytest.mark.usefixtures("picky")
def test_a_method_that_says_nothing_of_its_cost_is_named(small_task: tuple[str, ...], tmp_path: Path) -> None:
    (problem,) = bounds_of(train.plan(TrainRequest("picky", overrides=small_task, results=tmp_path))).unknown
    assert problem.startswith("what picky samples and scores beside its stages")

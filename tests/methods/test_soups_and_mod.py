"""rewarded-soups, dpo-soups and mod: what they ask of their experts, share and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moalign.config import find, load
from moalign.config.load import ResolvedRequest
from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.experiment.train import Plan, TrainRequest, context_of, plan, train
from moalign.methods import registry
from moalign.policies.policy import respond_all

EXPERTS = {"rewarded-soups": "morlhf", "dpo-soups": "modpo", "mod": "modpo"}
TASKS = ("sandbox", "sandbox-3", "stories")


def resolved(task: str, method: str) -> ResolvedRequest:
    path = find.find_recipe_file(task, method)
    assert path is not None, f"{task} has no recipe of {method}"
    return load.load_recipe(path, method, task, (), registry.get(method).Config)


@pytest.fixture
def ask(small_task: tuple[str, ...], tmp_path: Path) -> Any:
    """``ask(method, *overrides, task=...)``: a plan of seconds on the small task, without the task's recipe."""

    def planned(method: str, *overrides: str, task: str = "sandbox", **request: Any) -> Plan:
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(f"method: {method}\ntask: {task}\npolicy:\n  lora: {{r: 4, alpha: 8, dropout: 0.0}}\n")
        quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
        asked = TrainRequest(
            method, recipe=recipe, overrides=(*small_task, *quick, *overrides), results=tmp_path / "results", **request
        )
        return plan(asked)

    return planned


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", EXPERTS)
def test_recipes_ask_for_experts_as_the_method_that_trains_them_is_set(task: str, method: str) -> None:
    """Two settings of one thing drift apart; these share their experts only while they agree."""
    soup, expert = resolved(task, method), resolved(task, EXPERTS[method])
    asked = soup.config.model_dump()["experts"]
    assert asked == {key: value for key, value in expert.config.model_dump().items() if key in asked}
    assert soup.recipe.policy == expert.recipe.policy


@pytest.mark.slow
def test_dpo_soups_and_mod_share_their_experts(ask: Any) -> None:
    soup, _ = train(ask("dpo-soups"))
    mixed, _ = train(ask("mod"))
    (expert,) = ask("mod").store.runs(method="modpo")
    assert expert.record.preferences == [(1.0, 0.0), (0.0, 1.0)]
    assert soup.record.notes["experts"] == mixed.record.notes["experts"] == {"method": "modpo", "run_id": expert.run_id}
    assert soup.record.cost.tokens_trained == mixed.record.cost.tokens_trained == expert.record.cost.tokens_trained > 0


@pytest.mark.slow
def test_experts_of_rewarded_soups_are_the_corners_of_morlhf(ask: Any) -> None:
    soup, _ = train(ask("rewarded-soups", "experts.batch=8"))
    (expert,) = ask("rewarded-soups").store.runs(method="morlhf")
    assert expert.record.preferences == [(1.0, 0.0), (0.0, 1.0)]
    asked = ask("morlhf", "batch=8", "groups=8", prefs=("1,0", "0,1"))
    same = {**registry.get("rewarded-soups").quick["experts"], "batch": 8}
    assert {key: asked.config.model_dump()[key] for key in same} == same
    assert asked.folder == expert.path
    assert soup.record.cost.reward_calls == expert.record.cost.reward_calls > 0


@pytest.mark.parametrize("method", EXPERTS)
def test_other_settings_are_other_experts(ask: Any, method: str) -> None:
    assert ask(method).folder != ask(method, "experts.lr=0.5").folder
    with pytest.raises(RequestError, match=r"experts\.betta|experts\.btach"):
        ask(method, "experts.betta=3" if "dpo" in EXPERTS[method] else "experts.btach=3")


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "learn"),
    [("rewarded-soups", "experts.lr=0.05"), ("dpo-soups", "experts.lr=0.02"), ("mod", "experts.lr=0.02")],
)
def test_a_corner_is_the_expert_and_any_other_vector_is_served(
    ask: Any, tmp_path: Path, method: str, learn: str
) -> None:
    run, _ = train(ask(method, learn, "experts.steps=6"))
    (expert,) = ask(method).store.runs(method=EXPERTS[method])
    grid = [(1.0, 0.0), (0.0, 1.0), (0.37, 0.63)]

    def answers(of: Any, wanted: list[tuple[float, ...]]) -> list[list[str]]:
        found, context = context_of(of, tmp_path / "results")
        policies = [found.policy(context, preference) for preference in wanted]
        return respond_all(policies, context.task.eval_prompts, context.task.sampling(1)).responses

    first, second, between = answers(run, grid)
    assert [first, second] == answers(expert, grid[:2])
    assert len({tuple(first), tuple(second), tuple(between)}) == 3


@pytest.mark.parametrize("method", ["dpo-soups", pytest.param("mod", marks=pytest.mark.slow)])
def test_three_objectives_have_three_experts(ask: Any, tmp_path: Path, method: str) -> None:
    made = ask(method, task="sandbox-3")
    run, _ = train(made)
    assert {path.name for path in run.path.glob("adapter-*")} == {f"adapter-expert-{index}" for index in range(3)}
    found, context = context_of(run, tmp_path / "results")
    result = evaluate.evaluate(found, context, [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0)])
    assert result.scores.shape == (8, 2, 3)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_eval_generate_and_export_as_typed(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moalign.cli import main as cli

    def typed(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main((*arguments, "--results", str(tmp_path / "results")))
        return code, *capsys.readouterr()

    sets = [part for text in (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}") for part in ("--set", text)]
    sets += ["--set", "experts={steps: 2, batch: 4, max_tokens: 128, per_prompt: 1}"]
    code, out, _ = typed("train", "mod", *sets, "--json")
    told = json.loads(out)
    assert (code, told["status"], told["found"]) == (0, "done", False)
    assert told["cost"]["tokens_trained"] > 0
    assert len(told["evaluation"]["points"]) == 3

    code, out, _ = typed("train", "mod", *sets)
    assert code == 0 and "found finished" in out
    code, out, _ = typed("generate", told["run"], "how do i make soup ?", "--prefs", "0.25,0.75")
    assert code == 0 and len(out.splitlines()) == 1
    code, out, _ = typed("export", told["run"], "--prefs", "0.25,0.75", "--out", str(tmp_path / "mixture"))
    assert code == 0 and "mod at 0.25,0.75: experts and a script, answer.py, in" in out
    code, out, err = typed("export", told["run"], "--prefs", "0.25,0.75", "--out", str(tmp_path / "out"), "--merged")
    assert (code, out) == (2, "")
    assert "--merged: mod at 0.25,0.75 mixes 2 experts at every token" in err
    code, out, _ = typed("train", "dpo-soups", *sets, "--no-eval", "--json")
    soup = json.loads(out)
    assert soup["notes"]["experts"] == told["notes"]["experts"]
    code, out, _ = typed("export", soup["run"], "--prefs", "0.25,0.75", "--out", str(tmp_path / "out"))
    assert code == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8  # two experts of rank 4

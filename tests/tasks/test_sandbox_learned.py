"""``task.rewards=learned``: methods see reward models, the judge sees the truth, and the table shows the gap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moalign.config import validate
from moalign.config.card import TaskCard
from moalign.config.load import load_card
from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.experiment import train
from moalign.experiment.train import TrainRequest
from moalign.reward_models.settings import RewardSettings
from moalign.tasks.load import make_task
from moalign.tasks.responses import shown
from moalign.tasks.sandbox import learned, world
from moalign.tasks.sandbox.task import SandboxTask

FEW = "task.sandbox.annotators.pairs=80"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model of seconds: too little training to be right, enough to go through everything."""
    short = RewardSettings.model_validate({**learned.SETTINGS.model_dump(), "steps": 4, "batch": 8})
    monkeypatch.setattr(learned, "SETTINGS", short)


def task(overrides: tuple[str, ...], results: Path) -> SandboxTask:
    made = make_task(load_card("sandbox", overrides), results)
    assert isinstance(made, SandboxTask)
    return made


def test_exact_is_the_default_and_changes_no_hash(small_task: tuple[str, ...], tmp_path: Path) -> None:
    plain = task(small_task, tmp_path)
    assert task((*small_task, "task.rewards=exact"), tmp_path).hash == plain.hash
    assert plain.judge_panel is plain.panel
    other = task((*small_task, "task.rewards=learned"), tmp_path)
    more = task((*small_task, "task.rewards=learned", FEW), tmp_path)
    assert len({plain.hash, other.hash, more.hash}) == 3


@pytest.mark.slow
def test_methods_see_the_reward_models_and_the_judge_the_truth(
    quick: None, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    made = task((*small_task, "task.rewards=learned", FEW), tmp_path)
    exact = task(small_task, tmp_path)
    prompts = made.prompts["eval"][:20]
    responses = world.draw_responses(prompts, np.random.default_rng(0))
    truth = exact.panel.score(prompts, responses)
    assert np.array_equal(made.judge_panel.score(prompts, responses), truth)
    seen = made.panel.score(prompts, responses)
    assert seen.shape == truth.shape
    assert not np.allclose(seen, truth)
    assert made.panel.names == made.judge_panel.names
    # Both scales are fitted on the same texts; the judge's is that of the exact task.
    assert made.judge_normaliser.mean == exact.normaliser.mean
    assert made.normaliser.mean != exact.normaliser.mean
    grid = [(0.5, 0.5)]
    assert np.array_equal(made.optimum(grid, prompts), exact.optimum(grid, prompts))
    np.testing.assert_array_equal(
        made.scored().raw[:5], made.panel.score(made.scored().prompts[:5], shown(made.scored().responses[:5]))
    )


def test_the_reward_model_is_trained_once_and_is_an_ordinary_run(
    quick: None, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    from moalign.reward_models.runs import RewardStore

    overrides = (*small_task, "task.rewards=learned", FEW)
    first, second = task(overrides, tmp_path), task(overrides, tmp_path)
    assert first.panel.scorer_hash == second.panel.scorer_hash
    (run,) = RewardStore(tmp_path).runs()
    assert run.record.status == "done"
    assert run.record.notes["heads"] == ["helpfulness", "harmlessness"]
    assert set(run.record.notes["pairs"]["train"]) == {"helpfulness", "harmlessness"}


def test_the_reward_model_and_other_ones(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """As many passes however many pairs; what is named at its default is hashed as if it were not named."""
    learnt = (*small_task, "task.rewards=learned")

    def made(*more: str) -> SandboxTask:
        return task((*learnt, *more), tmp_path)

    plain = made()
    splits = plain.card.splits
    assert learned.settings_of(plain) == learned.SETTINGS.model_copy(update={"splits": splits})
    assert plain.identity["rewards"] == learned.VERSION
    assert learned.settings_of(plain).reproducible, "every machine trains the same"
    assert made("task.sandbox.reward_model={members: 1, pessimism: 0}").hash == plain.hash
    steps = {2000: 200, 8000: 800, 32000: 3200}
    for pairs, expected in steps.items():
        other = made(f"task.sandbox.annotators.pairs={pairs}")
        assert learned.settings_of(other).steps == expected and other.hash != plain.hash
    chosen = made("task.sandbox.reward_model={members: 4, steps: 7, seed: 3, pessimism: 1}")
    assert (learned.settings_of(chosen).steps, learned.settings_of(chosen).members) == (7, 4)
    others = [
        chosen.hash,
        *(made(f"task.sandbox.{one}").hash for one in ("reward_model.seed=1", "annotators.flipped=.1")),
    ]
    assert len({plain.hash, *others}) == 4


def test_an_ensemble_scores_with_its_doubt_taken_off(quick: None, small_task: tuple[str, ...], tmp_path: Path) -> None:
    few = (*small_task, "task.rewards=learned", FEW, "task.sandbox.reward_model.members=2")
    plain, careful = task(few, tmp_path), task((*few, "task.sandbox.reward_model.pessimism=2"), tmp_path)
    prompts = plain.prompts["eval"][:20]
    texts = prompts, world.draw_responses(prompts, np.random.default_rng(0))
    spread = plain.panel.spread(*texts)
    assert spread.shape == (20, 2) and (spread > 0).any(axis=0).all()
    np.testing.assert_allclose(careful.panel.score(*texts), plain.panel.score(*texts) - 2 * spread, atol=1e-6)
    assert np.array_equal(careful.panel.spread(*texts), spread)
    assert not plain.judge_panel.spread(*texts).any()
    assert plain.hash != careful.hash


def test_the_card_of_learned_rewards_is_the_sandbox_with_them() -> None:
    card = load_card("sandbox-learned")
    named = {"name", "description", "suite", "recipes_from", "rewards"}
    assert card.model_dump(exclude=named) == load_card("sandbox").model_dump(exclude=named)
    assert (card.rewards, card.recipes_from) == ("learned", "sandbox")


@pytest.mark.slow
def test_a_run_on_learned_rewards_is_judged_on_the_truth_and_tells_the_gap(
    quick: None, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    request = TrainRequest(
        "mo-odpo",
        overrides=(*small_task, "task.rewards=learned", FEW, "steps=2", "batch=4", "warmup=0"),
        results=tmp_path,
    )
    made = train.plan(request)
    run, _ = train.train(made)
    context = made.context(run)
    told = evaluate.evaluate(made.method, context).result.content
    table = run.read_table("responses")
    texts = table["prompt"].tolist(), table["response"].tolist()
    np.testing.assert_allclose(table[["helpfulness", "harmlessness"]], context.task.judge_panel.score(*texts))
    proxy = told["proxy_reward"]
    assert len(proxy["points"]) == len(told["points"])
    own = (
        context.task.normaliser.unit(context.task.panel.score(*texts)).reshape(len(told["points"]), -1, 2).mean(axis=1)
    )
    np.testing.assert_allclose([point["mean"] for point in proxy["points"]], own)
    assert told["gap"] == pytest.approx(proxy["hypervolume"] - told["hypervolume"])
    assert told["optimal_share"] is not None
    assert json.loads((run.path / "eval.json").read_text())["gap"] == told["gap"]


def test_exact_runs_tell_no_gap(small_task: tuple[str, ...], tmp_path: Path) -> None:
    made = train.plan(TrainRequest("prompting", overrides=small_task, results=tmp_path))
    run, _ = train.train(made)
    assert evaluate.evaluate(made.method, made.context(run)).result.gap is None


@pytest.mark.slow
def test_best_of_n_chooses_by_what_it_sees(quick: None, small_task: tuple[str, ...], tmp_path: Path) -> None:
    overrides = (*small_task, "task.rewards=learned", FEW, "n=4")
    made = train.plan(TrainRequest("best-of-n", overrides=overrides, results=tmp_path))
    run, _ = train.train(made)
    context = made.context(run)
    assert context.panel.scorer_hash == context.task.panel.scorer_hash != context.task.judge_panel.scorer_hash
    told = evaluate.evaluate(made.method, context).result.content
    base = train.plan(TrainRequest("prompting", overrides=overrides[:-1], results=tmp_path))
    start, _ = train.train(base)
    before = evaluate.evaluate(base.method, base.context(start)).result.content
    assert told["proxy_reward"]["hypervolume"] > before["proxy_reward"]["hypervolume"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task.rewards=lerned",), "did you mean 'learned'?"),
        (("task.rewards=learned", "task.sandbox.annotators.groups=diverse"), "needs annotators of each objective"),
        (
            ("task.rewards=learned", "task.gold_objectives=[{name: helpfulness, kind: sandbox}]"),
            "gold_objectives: rewards: learned is judged by the sandbox's own truth",
        ),
        (("task.sandbox.annotators.pairs=2",), "allowed: a whole number >= 10"),
        (("task.sandbox.annotators.flipped=.6",), "allowed: a number >= 0 and <= 0.5"),
        (
            ("task.sandbox.reward_model.members=4",),
            "sandbox.reward_model is for rewards: learned; found rewards: exact",
        ),
        (("task.rewards=learned", "task.sandbox.reward_model.members=0"), "allowed: a whole number >= 1"),
        (("task.rewards=learned", "task.sandbox.reward_model.pessimism=1"), "pessimism is for a model with members"),
    ],
)
def test_wrong_cards(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_card("sandbox", overrides)
    assert message in str(caught.value)


def test_only_the_sandbox_has_a_truth_to_judge_by() -> None:
    objectives = [{"name": name, "kind": "rule", "rule": "length"} for name in ("a", "b")]
    card = {"name": "x", "kind": "text", "description": "x", "objectives": objectives, "rewards": "learned"}
    points = {"reference_point": [0, 0], "sensitivity_point": [0, 0], "data": {"prompts": ["hi"]}}
    (told,) = validate.check(TaskCard, {**card, **points})[1]
    assert "rewards: learned is for the sandbox" in told


def test_another_judge_than_the_sandboxs_own_has_no_optimum(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """The best answers and those at a KL are enumerated by exact rewards: by other ones they would be untrue."""
    rule = "task.gold_objectives=[{name: helpfulness, kind: rule, rule: brevity, options: {unit: tokens}}]"
    task = make_task(load_card("sandbox", [*small_task, rule]), tmp_path)
    assert task.optimum([(0.5, 0.5)], task.eval_prompts) is None
    built_in = make_task(load_card("sandbox", [rule]), tmp_path)
    assert built_in.frontier([(0.5, 0.5)]) is None

"""Bone soups: the inverse of the rewards' mixture by hand, what its experts are, how far it extrapolates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.cli.main import main
from moalign.core.errors import RequestError
from moalign.experiment.train import Plan, TrainRequest, context_of, expert_plan, plan, train
from moalign.methods import registry
from moalign.methods.bone_soups import Config, backbone, coefficients
from moalign.policies import measured
from moalign.policies.policy import respond_all

# -- the mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "beta", "by_hand"),
    [
        ((1, 0), 0.7, (1.75, -0.75)),
        ((0.7, 0.3), 0.7, (1, 0)),
        ((0.5, 0.5), 0.7, (0.5, 0.5)),
        ((0.6, 0.4), 0.7, (0.75, 0.25)),
        ((1, 0), 0.6, (3, -2)),
        ((0, 1), 0.8, (-1 / 3, 4 / 3)),
        ((0.3, 0.7), 1.0, (0.3, 0.7)),
        ((1, 0, 0), 0.7, (17 / 11, -3 / 11, -3 / 11)),
        ((0.15, 0.7, 0.15), 0.7, (0, 1, 0)),
        ((1,), 0.7, (1,)),
    ],
)
def test_the_weights_of_experts_by_hand(preference: tuple[float, ...], beta: float, by_hand: tuple[float, ...]) -> None:
    assert coefficients(preference, beta) == pytest.approx(by_hand, abs=1e-9)


@pytest.mark.parametrize("objectives", [2, 3, 5])
def test_the_mixture_of_mixed_rewards_is_the_preference(objectives: int) -> None:
    """The closed form of the docstring beside the solver, and ``sum_i l_i h_i = w . r`` for any rewards."""
    rng = np.random.default_rng(objectives)
    for beta in (0.51, 0.6, 0.8, 1.0):
        w, rewards = rng.dirichlet(np.ones(objectives)), rng.normal(size=objectives)
        weights, matrix = np.array(coefficients(w.tolist(), beta)), backbone(objectives, beta)
        assert np.array_equal(matrix, matrix.T) and matrix.sum(axis=1) == pytest.approx(1)
        assert weights @ (matrix @ rewards) == pytest.approx(w @ rewards)
        assert weights.sum() == pytest.approx(1)
        a = (1 - beta) / (objectives - 1)
        assert weights == pytest.approx((w - a) / (beta - a))


def test_a_row_of_the_mixture_is_its_expert_and_no_other() -> None:
    for beta in (0.55, 0.6, 0.7, 0.8, 0.9):
        assert coefficients(backbone(2, beta)[0].tolist(), beta) == [1.0, 0.0]
        assert coefficients(backbone(3, beta)[1].tolist(), beta) == [0.0, 1.0, 0.0]
    assert backbone(2, 0.7).tolist() == [[0.7, 0.3], [0.3, 0.7]]
    assert backbone(3, 0.7)[0].tolist() == [0.7, 0.15, 0.15]


def test_extrapolation_as_the_public_code_combines_three_models() -> None:
    """Written from its description: both experts and the base, with weights that sum to 1; the base changes nothing."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        beta, (first, second), share = rng.uniform(0.6, 0.8), 1 / (1 - rng.uniform(0.1, 0.5, size=2)), rng.uniform()
        rows = np.array([[beta, 1 - beta], [1 - beta, beta]])  # of two models' rewards
        of_one, of_other = np.linalg.solve(rows.T, [1, 0]), np.linalg.solve(rows.T, [0, 1])
        wanted = [share * of_one[i] * first + (1 - share) * of_other[i] * second for i in (0, 1)]
        of_base = (1 - first) * share + (1 - second) * (1 - share)
        found = coefficients((share, 1 - share), beta, np.array([first, second]))
        assert found == pytest.approx(wanted) and sum(found) + of_base == pytest.approx(1)
    assert coefficients((0.5, 0.5), 0.7, np.array([2.0, 1.0])) == pytest.approx((1.375, 0.125))


# -- what is trained -------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(small_task: tuple[str, ...], tmp_path: Path) -> Any:
    """``ask(method, *overrides)``: a plan of seconds on the small task."""

    def planned(method: str, *overrides: str, task: str | None = None, quick: Any = None) -> Plan:
        settings = registry.get(method).quick if quick is None else quick
        given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        sets = (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}", *given, *overrides)
        return plan(TrainRequest(method, task=task, overrides=sets, results=tmp_path))

    return planned


def answers(run: Any, results: Path, *wanted: tuple[float, ...]) -> list[list[str]]:
    method, context = context_of(run, results)
    policies = [method.policy(context, preference) for preference in wanted]
    return respond_all(policies, context.task.eval_prompts, context.task.sampling(1)).responses


def test_its_experts_are_morlhf_at_the_rows_and_answer_there(ask: Any, tmp_path: Path) -> None:
    run, _ = train(ask("bone-soups", "extrapolate=[]", "experts.lr=0.05", "beta=0.8"))
    (experts,) = ask("bone-soups").store.runs(method="morlhf")
    assert experts.record.preferences == [(0.8, 0.2), (0.2, 0.8)]
    assert run.record.notes["experts"]["run_id"] == experts.run_id
    assert run.record.cost.reward_calls == experts.record.cost.reward_calls > 0
    first, second, corner, even = answers(run, tmp_path, (0.8, 0.2), (0.2, 0.8), (1.0, 0.0), (0.5, 0.5))
    assert [first, second] == answers(experts, tmp_path, (0.8, 0.2), (0.2, 0.8))
    assert len(set(map(tuple, (first, second, corner, even)))) == 4


def test_experts_are_no_others_for_a_holdout_and_none_is_trained_at_it(ask: Any) -> None:
    vectors = [(0.8, 0.2), (0.2, 0.8)]
    plain, held = ask("bone-soups", "beta=0.8"), ask("bone-soups", "beta=0.8", "holdout=[[0.5, 0.5]]")
    method, settings = plain.config.expert_runs()
    assert expert_plan(held, method, settings, vectors).folder == expert_plan(plain, method, settings, vectors).folder
    with pytest.raises(RequestError, match=r"holdout: an expert of bone-soups is trained at 0.2,0.8; hold out other"):
        ask("bone-soups", "beta=0.8", "holdout=[[0.2, 0.8]]")
    with pytest.raises(RequestError, match="holdout: an expert of rewarded-soups is trained at 1,0"):
        ask("rewarded-soups", "holdout=[[1, 0]]")


@pytest.mark.slow
def test_at_beta_1_it_is_rewarded_soups_with_the_same_experts(ask: Any, tmp_path: Path) -> None:
    settings = ("experts.steps=2", "experts.batch=4", "experts.warmup=0", "experts.lr=0.05")  # others: the recipe's
    bone, _ = train(ask("bone-soups", *settings, "beta=1", quick={}))
    soup, _ = train(ask("rewarded-soups", *settings, quick={}))
    assert bone.record.notes["experts"] == soup.record.notes["experts"]
    wanted = [(1.0, 0.0), (0.37, 0.63)]
    assert answers(bone, tmp_path, *wanted) == answers(soup, tmp_path, *wanted)


@pytest.mark.slow
def test_experts_may_come_from_dpo(ask: Any) -> None:
    stage = '{"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}'
    run, _ = train(ask("bone-soups", f"dpo_experts={stage}"))
    (experts,) = ask("bone-soups").store.runs(method="modpo")
    assert run.record.notes["experts"] == {"method": "modpo", "run_id": experts.run_id}
    assert experts.record.preferences == [(0.7, 0.3), (0.3, 0.7)]


@pytest.mark.slow
def test_three_objectives_have_three_experts(ask: Any, tmp_path: Path) -> None:
    run, _ = train(ask("bone-soups", task="sandbox-3"))
    (experts,) = ask("bone-soups").store.runs(method="morlhf")
    assert experts.record.preferences == [(0.7, 0.15, 0.15), (0.15, 0.7, 0.15), (0.15, 0.15, 0.7)]
    assert len(answers(run, tmp_path, (0.2, 0.3, 0.5))[0]) == 8


def test_each_objective_goes_as_far_as_serves_it_best(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alphas 0, .2 and .5 are k = 1, 1.25 and 2; the first objective is best at 1.25, the second at 2."""
    asked: list[list[list[float]]] = []
    rewards = iter([(0.1, 9), (0.3, 9), (0.2, 9), (9, 0.1), (9, 0.2), (9, 0.3)])
    monkeypatch.setattr("moalign.policies.mixed.interpolated", lambda job, *weights: asked.append(list(weights)))
    monkeypatch.setattr(measured, "mean_rewards", lambda job, policy, prompts, seed: np.array(next(rewards)))
    run, _ = train(ask("bone-soups", "extrapolate=[0, 0.2, 0.5]"))
    first, second = np.array((1.75, -0.75)), np.array((-0.75, 1.75))
    wanted = [k * corner for corner in (first, second) for k in (1, 1.25, 2)]
    assert np.array(asked)[:, 0] == pytest.approx(np.array(wanted))
    assert run.record.notes["extrapolation"] == {"helpfulness": 1.25, "harmlessness": 2.0}
    method, context = context_of(run, tmp_path)
    method.policy(context, (0.4, 0.6))
    assert asked[-1] == [pytest.approx(0.4 * 1.25 * first + 0.6 * 2 * second)]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("beta=0.5", "config.beta: found 0.5; allowed: above 0.5, up to 1: at one over"),
        ("beta=0.3", "B has no inverse"),
        ("beta=1.2", "<= 1"),
        ("extrapolate=[0.1, 1]", "found 1; allowed: 0 up to, but not including, 1"),
        ("extrapolate=[-0.1]", "found -0.1; allowed: 0 up to, but not including, 1"),
        ("betta=0.7", "beta"),
    ],
)
def test_settings_that_lead_nowhere_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert main(["train", "bone-soups", "--results", str(tmp_path), "--set", setting]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --set {setting.partition('=')[0]}") and message in line
    assert not list(tmp_path.iterdir())


def test_the_papers_settings() -> None:
    assert (Config().beta, Config().extrapolate) == (0.7, ())

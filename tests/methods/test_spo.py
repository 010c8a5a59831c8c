"""SPO: rounds that are worked out by hand, the optimum they reach on a table, DPO where one objective counts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.losses.dpo import modpo_losses
from moalign.methods.spo import Config, gaps, implicit, rounds_of, steps_of
from moalign.runs.run import Run
from moalign.training import offline_dpo

QUICK = ("steps=5", "batch=4", "lr=0.01", "max_tokens=64", "per_prompt=1", "beta=0.1", "log_every=1")
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"


def trained(method: str, task: tuple[str, ...], results: Path, *more: str, prefs: tuple[str, ...]) -> Run:
    return train(plan(TrainRequest(method, prefs=prefs, overrides=(*task, *QUICK, LORA, *more), results=results)))[0]


# -- the rounds of a preference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "alpha", "wanted"),
    [
        ((1.0, 0.0), 0.5, [(0, 1.0)]),
        ((0.3, 0.7), 0.0, [(1, 0.7), (0, 0.3)]),
        ((0.3, 0.7), 0.5, [(1, 0.55), (0, 0.3)]),  # .7 - .5 * .3
        ((0.5, 0.5), 0.5, [(0, 0.25), (1, 0.5)]),
        # .2; .3 - .5 * .2 = .2; .5 - .5 * (.2 + .2) = .3
        ((0.2, 0.5, 0.3), 0.5, [(1, 0.3), (2, 0.2), (0, 0.2)]),
    ],
)
def test_rounds_by_hand(w: tuple[float, ...], alpha: float, wanted: list[tuple[int, float]]) -> None:
    found = rounds_of(w, Config(alpha=alpha))
    assert [k for k, _ in found] == [k for k, _ in wanted]
    assert [c for _, c in found] == pytest.approx([c for _, c in wanted])


def test_each_objective_ends_with_its_weight_whatever_alpha() -> None:
    rng = np.random.default_rng(0)
    for alpha in (0.0, 0.3, 0.6):
        for w in rng.dirichlet([4.0, 4.0, 4.0], size=20):
            if w.min() < 0.2:
                continue
            found = rounds_of(tuple(w), Config(alpha=alpha))
            for n, (k, c) in enumerate(found):
                assert c + alpha * sum(later for _, later in found[n + 1 :]) == pytest.approx(w[k])


def test_a_round_that_would_not_move_is_refused() -> None:
    assert rounds_of((0.3, 0.7), Config(alpha=0.2, order="task")) == [(0, pytest.approx(0.16)), (1, 0.7)]
    message = r"preference 0.3,0.7: the round of objective 1 would move by c = -0.05 \(alpha = 0.5, order: task\)"
    with pytest.raises(RequestError, match=message):
        rounds_of((0.3, 0.7), Config(order="task"))
    with pytest.raises(RequestError, match="c = 0.02 .*allowed: at least 0.05"):
        rounds_of((0.98, 0.02), Config())


def test_steps_are_shared() -> None:
    assert [steps_of(110, 2), steps_of(5, 3), steps_of(1, 2), steps_of(7, 1)] == [[55, 55], [2, 2, 1], [1, 0], [7]]


# -- the losses, and their optimum on a policy over 8 responses that is a table of logits ----------------------------


def test_a_later_loss_by_hand() -> None:
    # b = .1 / .5 = .2, D 2 and -1 to the round's beginning: .6; R_1 .9 and .5, alpha .5: z = .6 - .5 * .4 = .4.
    one = torch.ones(1, dtype=torch.float64)
    reward = np.array([[0.9, 0.5]])
    loss, _ = modpo_losses(
        torch.tensor([[-3.0], [-6.0]], dtype=torch.float64),
        torch.tensor([[-5.0, -5.0]], dtype=torch.float64),
        torch.ones(2, 1),
        torch.tensor(gaps([reward], 1)),
        one,
        one,
        margin_weights=torch.tensor([0.5], dtype=torch.float64),
        share=1.0,
        beta=0.2,
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.4)))
    # R_2 of the chosen one: .2 * 2 - .5 * .9 = -.05; of the other .2 * -1 - .5 * .5 = -.45.
    r2 = implicit(np.array([[-3.0, -6.0]]), np.array([[-5.0, -5.0]]), [reward], 0.2, 0.5)
    assert r2[0] == pytest.approx([-0.05, -0.45])
    assert gaps([], 3).shape == (3, 0)


BETA = 0.1
PAIRS = np.array(list(itertools.combinations(range(8), 2)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits - np.logaddexp.reduce(logits))


def minimised(chance: np.ndarray, old: np.ndarray, before: list[np.ndarray], c: float, alpha: float) -> np.ndarray:
    """Return log pi ``[8]`` at the minimum of a round's expected loss over all pairs."""
    table = torch.tensor(old, requires_grad=True)
    pairs = torch.tensor(PAIRS.T.reshape(-1))
    ones = torch.ones(len(PAIRS), dtype=torch.float64)
    margins = torch.tensor(gaps([reward[PAIRS] for reward in before], len(PAIRS)))
    optimizer = torch.optim.LBFGS([table], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logps = torch.log_softmax(table, 0)[pairs].unsqueeze(-1)
        loss = modpo_losses(
            logps, torch.tensor(old[PAIRS]), torch.ones_like(logps), margins, torch.tensor(chance), ones,
            margin_weights=torch.full((len(before),), alpha, dtype=torch.float64), share=1.0, beta=BETA / c,
        )[0].mean()  # fmt: skip
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_softmax(table.detach().numpy())


def after_rounds(log_ref: np.ndarray, rewards: np.ndarray, plan: list[tuple[int, float]], alpha: float) -> list[Any]:
    """Return log pi after each round; labels are Bradley-Terry in the round's objective."""
    now, before, policies = log_ref, list[np.ndarray](), []
    for k, c in plan:
        chance = 1 / (1 + np.exp(rewards[PAIRS[:, 1], k] - rewards[PAIRS[:, 0], k]))
        new = minimised(chance, now, before, c, alpha)
        before.append(implicit(new, now, before, BETA / c, alpha))
        now = new
        policies.append(now)
    return policies


@pytest.fixture
def world() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return log_softmax(rng.normal(size=8)), BETA * 1.2 * rng.normal(size=(8, 3))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_rounds_end_at_the_optimum_of_w_r(world: tuple[np.ndarray, np.ndarray], alpha: float) -> None:
    """``pi_ref exp(w . r / beta) / Z``, and after the first round that of one objective alone, at its c."""
    log_ref, rewards = world
    w = (0.2, 0.5, 0.3)
    plan = rounds_of(w, Config(alpha=alpha))
    found = after_rounds(log_ref, rewards, plan, alpha)
    optimum = log_softmax(log_ref + rewards @ np.array(w) / BETA)
    assert np.abs(np.exp(optimum) - np.exp(log_ref)).sum() / 2 > 0.1
    assert np.abs(np.exp(found[-1]) - np.exp(optimum)).sum() / 2 < 1e-4
    k, c = plan[0]
    first = log_softmax(log_ref + c * rewards[:, k] / BETA)
    assert np.abs(np.exp(found[0]) - np.exp(first)).sum() / 2 < 1e-4


def test_a_larger_alpha_holds_more_of_the_first_objective(world: tuple[np.ndarray, np.ndarray]) -> None:
    """The same two rounds: what the second objective costs the first is more without the condition than with it."""
    log_ref, rewards = world
    rewards = np.stack([rewards[:, 0], -0.7 * rewards[:, 0] + 0.3 * rewards[:, 1]], axis=1)  # in conflict
    plan = [(0, 0.5), (1, 0.5)]
    kept = []
    for alpha in (0.0, 0.35, 0.7):
        first, second = (
            float(np.exp(policy) @ rewards[:, 0]) for policy in after_rounds(log_ref, rewards, plan, alpha)
        )
        kept.append(second - first)
    assert kept[0] < kept[1] < kept[2] < 0 and kept[2] > 0.6 * kept[0]


def test_its_gradient_is_that_of_the_loss_written_in_probabilities() -> None:
    rng = np.random.default_rng(4)
    policy = torch.tensor(-rng.gamma(2.0, 1.0, size=(10, 1)), requires_grad=True)
    old, reward = -rng.gamma(2.0, 1.0, size=(5, 2)), rng.normal(size=(5, 2))
    ones, alpha, b = torch.ones(5, dtype=torch.float64), 0.5, 0.2
    loss, _ = modpo_losses(
        policy, torch.tensor(old), torch.ones(10, 1), torch.tensor(gaps([reward], 5)), ones, ones,
        margin_weights=torch.tensor([alpha], dtype=torch.float64), share=1.0, beta=b,
    )  # fmt: skip
    (found,) = torch.autograd.grad(loss.sum(), policy)
    # d/dD(y_w) = -b sigma(-z), d/dD(y_l) = +b sigma(-z)
    chosen, rejected = policy.detach().numpy().reshape(2, 5)
    odds = np.exp(chosen - old[:, 0] - rejected + old[:, 1]) ** b * np.exp(-alpha * (reward[:, 0] - reward[:, 1]))
    slope = b / (1 + odds)
    np.testing.assert_allclose(found.numpy().reshape(2, 5), [-slope, slope], rtol=1e-9)


# -- runs -----------------------------------------------------------------------------------------------------------


def test_one_objective_is_dpo_bit_for_bit(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """As dpo-lw's corner; the weights alone: their records differ in the settings."""
    runs = [trained(name, small_task, tmp_path, prefs=("1,0",)).path for name in ("dpo-lw", "spo")]
    one, two = (run.joinpath("adapter-pref-0/adapter_model.safetensors").read_bytes() for run in runs)
    assert one == two


def test_rounds_follow_each_other(small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's reference is the base; the second's is what the first became, its margin the first's reward."""
    from moalign.training import reference

    seen: list[dict[str, Any]] = []
    plain = offline_dpo.train_dpo

    def spy(job: Any, lm: Any, pairs: Any, config: Any, phase: str, margin: Any = None, **more: Any) -> Any:
        rows = [*pairs.chosen, *pairs.rejected]
        own = reference.log_probs(lm, rows, own=True).numpy().reshape(2, -1).T
        base = reference.log_probs(lm, rows).numpy().reshape(2, -1).T
        seen.append(
            {"own": own, "base": base, "config": config, "phase": phase, "margin": margin, "ref": pairs.reference}
        )
        return plain(job, lm, pairs, config, phase, margin, **more)

    monkeypatch.setattr(offline_dpo, "train_dpo", spy)
    run = trained("spo", small_task, tmp_path, prefs=("0.4,0.6",))
    first, second = seen
    assert [step["phase"] for step in seen] == ["pref-0-1", "pref-0-2"]
    assert [step["config"].steps for step in seen] == [3, 2]
    # alpha .5: c = .6 - .2 = .4 for harmlessness, then .4 for helpfulness.
    assert run.record.notes["rounds"] == {"0.4,0.6": {"harmlessness": 0.4, "helpfulness": 0.4}}
    assert [step["config"].beta for step in seen] == pytest.approx([0.25, 0.25])
    assert first["margin"] is None
    np.testing.assert_allclose(first["ref"], first["base"], atol=1e-4)
    np.testing.assert_allclose(second["ref"], second["own"], atol=1e-4)
    assert np.abs(second["own"] - second["base"]).max() > 1e-3
    reward = 0.25 * (second["own"] - second["base"])
    np.testing.assert_allclose(second["margin"].values[:, 0], reward[:, 0] - reward[:, 1], atol=1e-4)
    assert (list(second["margin"].weights), second["margin"].share) == ([0.5], 1.0)


def test_fewer_steps_than_rounds_leave_rounds_out(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run = trained("spo", small_task, tmp_path, "steps=1", prefs=("0.4,0.6",))
    assert {line["phase"] for line in run.metrics()} == {"pref-0"}
    assert trained("spo", small_task, tmp_path, "steps=0", prefs=("0.4,0.6",)).metrics() == []

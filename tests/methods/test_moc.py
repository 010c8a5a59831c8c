"""MOC: the control step by hand, and what it does to a softmax policy over responses that can be enumerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moalign.core import preferences
from moalign.core.errors import RequestError, WorkError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.losses.min_norm import min_norm
from moalign.losses.ppo import Experience, clipped, whitened
from moalign.losses.ppo import experience as experience_of
from moalign.methods import moc
from moalign.methods.moc import Config, combined, control_error, policy_grams, ramp, weights
from moalign.pareto import indicators
from moalign.pareto.hypervolume import hypervolume
from moalign.training.online import PpoTrainer
from moalign.training.rollout import Rollout

Matrix = NDArray[np.float64]

# -- a softmax policy over enumerated responses ----------------------------------------------------------------------

GRID = np.array(preferences.grid(2, 10))
SAMPLES = 48


def front() -> Matrix:
    """Rewards of 60 responses ``[60, 2]``: a concave front (a quarter of a circle) and worse ones below it."""
    angle = np.linspace(0, np.pi / 2, 31)
    best = np.stack([np.sin(angle), np.cos(angle)], axis=1)
    rng = np.random.default_rng(3)
    return np.concatenate([best, best[rng.integers(31, size=29)] * rng.uniform(0.2, 0.8, size=(29, 1))])


class Table:
    """One softmax over the responses for each preference: the simplest policy that is conditioned on it."""

    def __init__(self, rewards: Matrix) -> None:
        self.rewards = rewards
        self.logits = torch.zeros(len(GRID), len(rewards), dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=0.1)
        self.rng = np.random.default_rng(0)

    def probabilities(self) -> Matrix:
        found: Matrix = torch.softmax(self.logits.detach(), dim=-1).numpy()
        return found

    def points(self) -> Matrix:
        """Mean rewards for each preference ``[preferences, objectives]``, exact."""
        return self.probabilities() @ self.rewards

    def rollout(self, step: int) -> tuple[Rollout, Experience, torch.Tensor]:
        """Sample responses of one token; the critic is exact."""
        chances = self.probabilities()
        drawn = np.stack([self.rng.choice(len(self.rewards), size=SAMPLES, p=row) for row in chances])
        z = (self.rewards - self.rewards.mean(axis=0)) / self.rewards.std(axis=0)
        advantages = torch.as_tensor(z[drawn] - (chances @ z)[:, None]).reshape(-1, 1, 2)
        mask = torch.ones(len(advantages), 1, dtype=torch.bool)
        nothing: Any = None
        of_rows = z[drawn].reshape(-1, 2)
        rollout = Rollout([], GRID, SAMPLES, nothing, [], of_rows, of_rows, nothing, step=step)
        actions = torch.as_tensor(drawn).reshape(-1, 1)
        old = self.log_probabilities(actions).detach()
        return rollout, Experience(mask, old, whitened(advantages, mask, "scale"), advantages), actions

    def log_probabilities(self, actions: torch.Tensor) -> torch.Tensor:
        rows = torch.log_softmax(self.logits, dim=-1).repeat_interleave(SAMPLES, dim=0)
        return rows.gather(-1, actions)

    def train(self, config: Config) -> Matrix:
        for step in range(config.steps):
            rollout, experience, actions = self.rollout(step)
            ones = torch.ones_like(experience.old_logps)
            advantages, _ = combined(rollout, experience, ones, config, ["one", "two"])
            ratios = (self.log_probabilities(actions) - experience.old_logps).exp()
            self.optimizer.zero_grad()
            clipped(ratios, advantages, config.clip_range).mean().backward()
            self.optimizer.step()
        return self.points()


def linear(rewards: Matrix) -> Matrix:
    """What linear scalarisation reaches at best for each preference."""
    return rewards[np.argmax(GRID @ rewards.T, axis=1)]


def steered(points: Matrix) -> float:
    return float(indicators.controllability(GRID, points)["tau"])


@pytest.fixture(scope="module")
def best() -> float:
    return hypervolume(linear(front()), (0, 0))


SHORT: dict[str, Any] = {"steps": 150}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["soft", "switch"])
def test_it_steers_along_a_concave_front(best: float, mode: Any) -> None:
    points = Table(front()).train(Config(mode=mode, **SHORT))
    assert steered(points) >= 0.95
    assert hypervolume(points, (0, 0)) >= 0.98 * best


@pytest.mark.slow
def test_without_control_the_min_norm_step_answers_every_preference_alike(best: float) -> None:
    """``phi: 1`` is never exceeded, so the constraint is never active."""
    points = Table(front()).train(Config(phi=1.0, **SHORT))
    assert abs(steered(points)) < 0.5
    assert np.ptp(points, axis=0).max() < 0.15  # one point, for all eleven
    assert hypervolume(points, (0, 0)) < 0.8 * best


@pytest.mark.slow
def test_comparing_preferences_with_rewards_themselves_pins_the_rewards(best: float) -> None:
    """Why ``control: simplex`` is the default."""
    raw, own = (Table(front()).train(Config(control=how, **SHORT)) for how in ("raw_mse", "simplex"))
    assert hypervolume(raw, (0, 0)) < 0.93 * best < hypervolume(own, (0, 0))
    assert np.ptp(raw, axis=0).max() < 0.6 < np.ptp(own, axis=0).max()


# -- the parts, by hand ------------------------------------------------------------------------------------------------


def test_the_control_error_by_hand() -> None:
    """sigmoid(0) = 1/2, sigmoid(log 3) = 3/4: s = (2/5, 3/5)."""
    e = control_error(np.array([0.5, 0.5]), np.array([0.0, np.log(3)]), "simplex")
    assert e.tolist() == pytest.approx([0.1, -0.1])
    e = control_error(np.array([0.5, 0.5]), np.array([0.0, 2.0]), "raw_mse")
    assert e.tolist() == [0.5, -1.5]
    assert control_error(np.array([1.0, 0.0]), np.array([1e9, -1e9]), "simplex").tolist() == pytest.approx([0, 0])


def test_lam_rises_on_a_line_and_stays() -> None:
    config = Config(steps=300)
    assert [ramp(config, step) for step in (0, 50, 100, 299)] == pytest.approx([2.0, 3.5, 5.0, 5.0])
    assert ramp(Config(steps=300, lam_ramp=0), 0) == 5.0


def test_the_weights_of_each_mode_by_hand() -> None:
    """v = (1, 0), (0, 1); e = (1/2, -1/2), so v_c = (1/2, -1/2); lam = 1.

    soft: q = (3/4, -1/4), (1/4, 1/4); <q2, q2 - q1> = (1/4)(-1/2) + (1/4)(1/2) = 0: c = (0, 1), omega = (1/4, 1/4).
    stacked: v_c itself reaches least far against v_2: of (1, 0), (0, 1), (1/2, -1/2) the last two give the point
    (3/10, 1/10) with weights 2/5 and 3/5, which v_1 does not beat: omega = 3/5 e + (0, 2/5).
    """
    gram, e = np.eye(2), np.array([0.5, -0.5])
    omega, c = weights(gram, e, 1.0, "soft")
    assert (omega.tolist(), c.tolist()) == (pytest.approx([0.25, 0.25]), pytest.approx([0.0, 1.0]))
    omega, c = weights(gram, e, 1.0, "switch")
    assert (omega.tolist(), c.tolist()) == ([0.5, -0.5], [0.0, 0.0])
    omega, c = weights(gram, e, 1.0, "stacked")
    assert (omega.tolist(), c.tolist()) == (pytest.approx([0.3, 0.1]), pytest.approx([0.0, 0.4]))


@pytest.mark.parametrize("mode", ["soft", "switch", "stacked"])
def test_while_the_constraint_holds_it_is_the_plain_min_norm_step(mode: Any) -> None:
    omega, c = weights(np.diag([1.0, 4.0]), None, 5.0, mode)
    assert omega.tolist() == c.tolist() == pytest.approx([0.8, 0.2])


@pytest.mark.parametrize("mode", ["soft", "switch", "stacked"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_omega_is_what_the_vectors_say(mode: Any, size: int) -> None:
    """sum_i omega_i v_i is the min-norm point of the q_i (soft), computed here from the vectors themselves."""
    rng = np.random.default_rng(size)
    for _ in range(20):
        v = rng.normal(size=(size, 30)) + rng.normal(size=30)
        e = control_error(rng.dirichlet(np.ones(size)), rng.normal(size=size), "simplex")
        omega, _ = weights(v @ v.T, e, 3.0, mode)
        v_c = e @ v
        q = {"soft": (v + 3.0 * v_c) / 4, "switch": v_c[None], "stacked": np.vstack([v, v_c])}[mode]
        assert omega @ v == pytest.approx(min_norm(q @ q.T) @ q, abs=1e-7)


def test_a_constant_objective_gets_no_weight() -> None:
    """Min-norm alone would give it all: a zero vector is the nearest point."""
    gram, e = np.diag([1.0, 0.0, 4.0]), np.array([0.3, -0.2, -0.1])
    assert weights(gram, None, 5.0, "soft")[1].tolist() == pytest.approx([0, 1, 0])
    speaks = np.array([True, False, True])
    omega, c = weights(gram, None, 5.0, "soft", speaks)
    assert omega.tolist() == c.tolist() == pytest.approx([0.8, 0.0, 0.2])
    for mode in ("soft", "switch", "stacked"):
        omega, _ = weights(gram, e, 5.0, mode, speaks)
        assert omega[1] == 0
        assert np.abs(omega[[0, 2]]).min() > 0
    none = weights(np.zeros((3, 3)), None, 5.0, "soft", np.array([False] * 3))[0]
    assert none.tolist() == pytest.approx([1 / 3] * 3)


def experience(advantages: Any, mask: Any = None) -> Experience:
    found = torch.as_tensor(advantages, dtype=torch.float32)
    inside = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    return Experience(inside, torch.zeros(found.shape[:2]), found, found)


def test_gram_matrices_by_hand() -> None:
    """Three rows, the first two a group. The clipped token of the third row (u = 2, A_1 > 0) is left out of v_1."""
    made = experience([[[1, 2], [3, 0]], [[0, 1], [0, 0]], [[1, -1], [2, 2]]], [[1, 1], [1, 0], [1, 1]])
    ratios = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    grams = policy_grams(made, ratios, np.array([0, 0, 1]), 0.2)
    assert grams[0] * 3 == pytest.approx(np.array([[10, 2], [2, 5]]))  # 3 tokens
    assert grams[1] * 2 == pytest.approx(np.array([[4, 4], [4, 8]]))  # v_1 = (0, 2), v_2 = (-2, 2)


def one_advantage(
    config: Config, z: Any, wanted: Any, advantages: Any, step: int = 0
) -> tuple[torch.Tensor, dict[str, float]]:
    nothing: Any = None
    rewards = np.asarray(z, dtype=np.float64)
    rollout = Rollout(
        [], np.asarray(wanted), len(rewards) // len(wanted), nothing, [], rewards, rewards, nothing, step=step
    )
    made = experience(advantages)
    return combined(rollout, made, torch.ones_like(made.old_logps), config, ["one", "two"])


def test_every_group_has_weights_of_its_own() -> None:
    """Rewards are balanced (s = (1/2, 1/2)): e is (1/2, -1/2) for the first preference and 0 for the second."""
    z = [[1, -1], [-1, 1], [1, -1], [-1, 1]]
    advantages = [[[1.0, -1.0]], [[-1.0, 1.0]], [[1.0, 3.0]], [[3.0, 1.0]]]
    wanted = [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]
    found, told = one_advantage(Config(mode="switch"), z, wanted, advantages)
    assert found[:, 0].tolist() == pytest.approx([1.0, -1.0, 2.0, 2.0])
    assert told["active"] == 0.5
    assert told["e/one"] == pytest.approx(0.25)
    assert told["psi"] == pytest.approx(0.125)
    assert told["lam"] == 2.0
    assert told["omega/one"] == pytest.approx(0.5)
    assert told["c/one"] == pytest.approx(0.25)


def test_several_responses_to_a_prompt_share_its_preference() -> None:
    z, advantages = [[1, -1], [-1, 1], [2, -2], [-2, 2]], np.ones((4, 1, 2))
    whole, _ = one_advantage(Config(mode="switch"), z, [[1.0, 0.0], [0.0, 1.0]], advantages)
    assert whole.abs().max().item() == 0.0  # e sums to 0 and both advantages are the same
    _, told = one_advantage(Config(), z, [[1.0, 0.0], [0.0, 1.0]], advantages)
    assert told["active"] == 1.0


def test_constant_rewards_and_corners_do_no_harm() -> None:
    for p in ([1.0, 0.0], [0.0, 1.0]):
        found, told = one_advantage(Config(), np.ones((4, 2)), [p] * 4, np.zeros((4, 3, 2)))
        assert torch.isfinite(found).all()
        assert all(np.isfinite(value) for value in told.values())


def test_a_reward_that_is_not_finite_stops_the_run_with_a_message() -> None:
    advantages = np.ones((2, 1, 2))
    advantages[0, 0, 1] = np.nan
    with pytest.raises(WorkError, match="min-norm: vector 2 of 2"):
        one_advantage(Config(phi=1.0), [[1, 2], [2, 1]], [[0.5, 0.5]] * 2, advantages)


@pytest.mark.parametrize(
    "wrong", [{"phi": -1e-3}, {"phi": 1.5}, {"lam": -1}, {"lam_start": -0.1}, {"lam_ramp": 2}, {"mode": "hard"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Config.model_validate(wrong)


# -- what a nat costs --------------------------------------------------------------------------------------------------


def cost_of_a_nat(config: Config) -> float:
    """The weight of the KL cost in the advantage of the update, as a share of ``kl_coef``.

    Two responses of two tokens at preference (1, 0), one nat from the reference at each first token; lambda 0 and
    critics that say 0 leave the first token nothing but that cost. Rewards are balanced: e = (1/2, -1/2).
    """
    mask = torch.ones(2, 2, dtype=torch.bool)
    logps = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    reference = torch.tensor([[-2.0, -1.0], [-2.0, -1.0]])
    z = np.array([[1.0, -1.0], [-1.0, 1.0]])
    apart = config.kl == "outside"
    values = torch.zeros(2, 2, 3 if apart else 2)
    rewards = torch.as_tensor(z, dtype=torch.float32)
    gae = {"gamma": config.gamma, "gae_lambda": config.gae_lambda, "whiten": config.whiten}
    made = experience_of(rewards, values, logps, reference, mask, config.kl_coef, kl_apart=apart, **gae)
    nothing: Any = None
    rollout = Rollout(["p"], np.array([[1.0, 0.0]]), 2, nothing, ["a", "b"], z, z, nothing)
    advantages, told = combined(rollout, made, torch.ones_like(logps), config, ["one", "two"])
    assert told["active"] == 1.0
    first = made.tensors(advantages)["advantages"][:, 0]
    assert first[0] == first[1]
    return float(first[0]) / -config.kl_coef


PLAIN: dict[str, Any] = {"gae_lambda": 0.0, "whiten": "none", "kl_coef": 0.2, "lam_start": 4.0, "lam": 4.0}


@pytest.mark.parametrize("mode", ["soft", "switch", "stacked"])
def test_outside_a_nat_costs_what_kl_coef_says(mode: Any) -> None:
    assert cost_of_a_nat(Config(mode=mode, kl="outside", **PLAIN)) == pytest.approx(1.0)


def test_outside_it_costs_that_of_the_rewards_as_they_are_scaled() -> None:
    """Both advantages have values 0, 0, 1, -1: deviation 1 / sqrt(2), so that rewards count sqrt(2) fold."""
    config = Config(kl="outside", **{**PLAIN, "whiten": "scale"})
    assert cost_of_a_nat(config) == pytest.approx(np.sqrt(2))


@pytest.mark.parametrize(("mode", "wanted"), [("soft", 1 / 5), ("switch", 0.0)])
def test_inside_it_costs_the_sum_of_weights_that_need_not_be_one(mode: Any, wanted: float) -> None:
    """The fault that ``outside`` is for: 1 / (1 + lam) and nothing at all."""
    assert cost_of_a_nat(Config(mode=mode, **PLAIN)) == pytest.approx(wanted, abs=1e-6)


def test_with_the_cost_outside_it_trains_and_keeps_a_head_for_it(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run, _ = train(plan(TrainRequest("moc", overrides=(*small_task, *FEW, "kl=outside"), results=tmp_path)))
    assert run.load_tensors("value_heads-online")["linear.weight"].shape == (3, 16)
    assert all("value_loss/kl" in line for line in run.metrics())
    assert "value_loss/kl" in run.record.notes["diagnostics"]


# -- on the trainer ----------------------------------------------------------------------------------------------------

NAMES = ["helpfulness", "harmlessness", "humor"]
THREE = ", ".join(f"{{name: {name}, kind: sandbox}}" for name in NAMES)
MORE = (f"task.objectives=[{THREE}]", "task.reference_point=[0, 0, 0]", "task.sensitivity_point=[0, 0, 0]")
FEW = ("steps=3", "batch=6", "groups=3", "log_every=1", "lr=0.01")


@pytest.mark.parametrize("more", [(), MORE], ids=["two objectives", "three objectives"])
def test_one_backward_pass_per_update_whatever_the_number_of_objectives(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    calls: list[int] = []
    backward = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: (calls.append(1), backward(self, *a, **k))[1])
    run, _ = train(plan(TrainRequest("moc", overrides=(*small_task, *more, *FEW), results=tmp_path)))
    assert len(calls) == 3
    lines = run.metrics()
    names = NAMES[: 3 if more else 2]
    wanted = {"psi", "active", "lam", "kl", "entropy", "clip_fraction"}
    wanted |= {f"{key}/{name}" for key in ("c", "omega", "e", "value_loss", "reward") for name in names}
    assert all(wanted <= set(line) for line in lines)
    assert all(sum(line[f"c/{name}"] for name in names) == pytest.approx(1) for line in lines)
    assert wanted - {"lam", *(f"reward/{name}" for name in names)} <= set(run.record.notes["diagnostics"])
    assert run.load_tensors("value_heads-online")["linear.weight"].shape == (len(names), 16)


@pytest.mark.slow
def test_training_draws_from_the_grid_and_from_what_is_given(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    plain = moc.combined

    def look(rollout: Rollout, *rest: Any) -> Any:
        seen.append(rollout.preferences)
        return plain(rollout, *rest)

    monkeypatch.setattr(moc, "combined", look)
    train(plan(TrainRequest("moc", overrides=(*small_task, *FEW), results=tmp_path)))
    assert {tuple(row) for row in np.concatenate(seen).tolist()} == {(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)}
    seen.clear()
    train(plan(TrainRequest("moc", overrides=(*small_task, *FEW), prefs=("0.3,0.7", "1,0"), results=tmp_path)))
    assert {tuple(row) for row in np.concatenate(seen).tolist()} == {(0.3, 0.7), (1.0, 0.0)}
    seen.clear()
    held = "holdout=[[0.5, 0.5]]"
    train(plan(TrainRequest("moc", overrides=(*small_task, *FEW, held), results=tmp_path)))
    assert {tuple(row) for row in np.concatenate(seen).tolist()} == {(0.0, 1.0), (1.0, 0.0)}


def test_a_second_update_on_a_rollout_sees_how_far_the_policy_has_come(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was trained before the first: ratios are 1. Then every token is twice as likely, say."""
    seen: list[tuple[Experience, torch.Tensor]] = []
    plain = moc.combined

    def look(rollout: Rollout, made: Experience, ratios: torch.Tensor, *rest: Any) -> Any:
        seen.append((made, ratios))
        return plain(rollout, made, ratios, *rest)

    monkeypatch.setattr(moc, "combined", look)
    twice = np.log(2.0)
    monkeypatch.setattr(PpoTrainer, "policy_logps", lambda self: seen[-1][0].old_logps + twice * seen[-1][0].mask)
    train(plan(TrainRequest("moc", overrides=(*small_task, *FEW, "epochs=2"), results=tmp_path)))
    assert len(seen) == 2 * 3
    for (made, first), (again, second) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, torch.ones_like(first))
        torch.testing.assert_close(second, torch.where(made.mask, 2.0, 1.0))
        assert again is made


def test_more_objectives_than_the_task_has_are_refused(small_task: tuple[str, ...], tmp_path: Path) -> None:
    for key in ("prefs", "holdout"):
        with pytest.raises(RequestError, match=rf"{key}.*3 weights, but the task has 2 objectives"):
            plan(TrainRequest("moc", overrides=(*small_task, f"{key}=[[0.2, 0.3, 0.5]]"), results=tmp_path))

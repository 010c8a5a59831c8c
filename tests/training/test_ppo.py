"""PPO with value heads: the whole loss, by hand and on the engine; its parts are tested in tests/losses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moalign.lm import adapters
from moalign.lm.language_model import TokenOutputs, token_outputs
from moalign.losses.ppo import beside
from moalign.training.job import Job
from moalign.training.online import OnlineEngine, Part, Rollout
from moalign.training.ppo import PpoLoss, ValueHeads, grouped, only, train_ppo
from moalign.training.settings import ConditionedPpoConfig, PpoConfig

MakeJob = Callable[..., Job]
Same = Callable[..., None]
MASK = torch.tensor([[True, True, True], [True, False, False]])


# -- preferences -----------------------------------------------------------------------------------------------------


def test_a_rollout_has_as_many_different_preferences_as_asked_for() -> None:
    vectors = [(k / 10, 1 - k / 10) for k in range(11)]
    rng = np.random.default_rng(0)
    seen: dict[tuple[float, ...], int] = {}
    for _ in range(200):
        drawn = grouped(vectors, 4)(rng, 10)
        assert drawn.shape == (10, 2)
        rows, counts = np.unique(drawn, axis=0, return_counts=True)
        assert sorted(counts.tolist()) == [2, 2, 3, 3]
        for row in rows.tolist():
            seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    assert set(seen) == set(vectors)  # the corners as often as the others
    assert min(seen.values()) > 40


def test_fewer_vectors_or_rows_than_groups() -> None:
    rng = np.random.default_rng(0)
    assert len(np.unique(grouped([(0.5, 0.5)], 8)(rng, 6), axis=0)) == 1
    assert len(np.unique(grouped([(0, 1), (1, 0)], 8)(rng, 6), axis=0)) == 2
    assert len(grouped([(k / 10, 1 - k / 10) for k in range(11)], 8)(rng, 3)) == 3


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"clip_range": 1.0}, {"kl_coef": -0.1}, {"gae_lambda": 1.5}, {"gamma": 0}, {"vf_coef": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PpoConfig.model_validate(wrong)
    with pytest.raises(ValueError, match="groups must be at most batch; found 8 and 4"):
        ConditionedPpoConfig(batch=4)


# -- the loss on hand-made numbers -------------------------------------------------------------------------------------


def config(**changes: Any) -> PpoConfig:
    return PpoConfig.model_validate({"kl_coef": 0.0, "gae_lambda": 1.0, "whiten": "none", **changes})


def loss_of(heads: int = 2, **changes: Any) -> PpoLoss:
    combine: Any = lambda rollout, experience, ratios: (experience.advantages.sum(-1), {})  # noqa: E731
    return PpoLoss(config(**changes), [f"r{k}" for k in range(heads)], grouped([(1.0,)], 1), lambda r: r.z, combine)


def small_rollout(z: np.ndarray, values: torch.Tensor | None = None, gap: float = 0.0) -> Rollout:
    logps = torch.where(MASK, torch.tensor(-1.0), torch.tensor(0.0))
    drawn: Any = SimpleNamespace(logps=logps, response_mask=MASK)
    ref = torch.where(MASK, logps - gap, logps)
    made = Rollout(["p", "q"], np.ones((2, 1)), 1, drawn, ["a", "b"], z, z, lambda rows: ref[rows])
    made.values = torch.zeros(2, 3, z.shape[1]) if values is None else values
    return made


def test_selected_rows_carry_their_advantages() -> None:
    chosen = loss_of().select(small_rollout(np.array([[2.0, 1.0], [-1.0, 0.5]])))
    assert chosen.rows.tolist() == [0, 1]
    assert chosen.extras["advantages"].tolist() == [[3.0, 3.0, 3.0], [-0.5, 0.0, 0.0]]
    assert chosen.extras["returns"][0].tolist() == [[2.0, 1.0]] * 3
    assert chosen.extras["per_token"].tolist() == [0.5, 0.5]  # 2 rows, 4 tokens


def test_a_cost_of_distance_apart_is_added_to_whatever_the_others_make() -> None:
    """Costs to go -.3, -.2, -.1 and -.1, which no reward sees. Combine here forgets all others."""
    loss = loss_of(kl_coef=0.1)
    apart = PpoLoss(loss.config, ["r0", "r1"], loss.preferences, loss.rewards, loss.combine, kl_apart=True)
    assert apart.heads == ["r0", "r1", "kl"]
    seen: list[Any] = []

    def nothing(rollout: Rollout, made: Any, ratios: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(made)
        return made.advantages[..., 0] * 0.0, {}

    apart.combine = nothing
    rollout = small_rollout(np.array([[2.0, 1.0], [-1.0, 0.5]]), torch.zeros(2, 3, 3), gap=1.0)
    chosen = apart.select(rollout)
    wanted = torch.tensor([[-0.3, -0.2, -0.1], [-0.1, 0.0, 0.0]])
    torch.testing.assert_close(chosen.extras["advantages"], wanted)
    torch.testing.assert_close(chosen.extras["returns"][..., 2], wanted)
    assert seen[0].advantages.tolist() == [[[2, 1]] * 3, [[-1, 0.5], [0, 0], [0, 0]]]
    rollout.score_policy = lambda: rollout.samples.logps
    again = apart.select(rollout)  # the second update on a rollout pays, too
    torch.testing.assert_close(again.extras["advantages"], wanted)


def test_its_head_foresees_it() -> None:
    """A head that knows the cost to come leaves no advantage."""
    loss = loss_of(kl_coef=0.1)
    apart = PpoLoss(loss.config, ["r0"], loss.preferences, loss.rewards, only, kl_apart=True)
    values = torch.tensor([[[0.0, -0.3], [0.0, -0.2], [0.0, -0.1]], [[0.0, -0.1], [0.0, 9.0], [0.0, 9.0]]])
    chosen = apart.select(small_rollout(np.zeros((2, 1)), values, gap=1.0))
    torch.testing.assert_close(chosen.extras["advantages"], torch.zeros(2, 3), atol=1e-6, rtol=0)


def test_it_is_on_the_scale_of_the_others() -> None:
    """Deviations sqrt(5) and 2 sqrt(5), and a constant: times the mean of 1 / sd of those two, 3 / (4 sqrt(5))."""
    advantages = torch.tensor([[[1.0, 2, 5, -4], [3, 6, 5, -2], [5, 10, 5, -1]], [[7, 14, 5, 3], [9] * 4, [9] * 4]])
    cost = torch.tensor([-4.0, -2.0, -1.0, 3.0])
    assert torch.equal(beside(advantages, MASK, "none")[MASK], cost)
    torch.testing.assert_close(beside(advantages, MASK, "scale")[MASK], cost * 0.75 / np.sqrt(5.0))
    torch.testing.assert_close(beside(advantages, MASK, "full")[MASK], (cost + 1) * 0.75 / np.sqrt(5.0))
    constant = advantages[..., [2, 3]]
    assert torch.equal(beside(constant, MASK, "scale")[MASK], cost)


def part_of(chosen: Any, rows: slice, logps: torch.Tensor, values: torch.Tensor) -> tuple[TokenOutputs, Part]:
    extras = {name: value[rows] for name, value in chosen.extras.items()}
    old = torch.where(MASK, torch.tensor(-1.0), torch.tensor(0.0))
    entropy = torch.where(MASK, torch.tensor(2.0), torch.tensor(0.0))
    part = Part(MASK[rows], old[rows], old[rows], extras, values[rows])
    return TokenOutputs(logps[rows], entropy[rows]), part


def test_the_loss_of_a_part_by_hand() -> None:
    """4 tokens. u = 1 but for the second token of the first row, u = 1.5: advantages 3, clipped to 1.2 * 3.

    Policy: -(3 + 3.6 + 3 - .5) / 4 = -2.275. Value heads say 0: errors (3 * 4 + 1) / 4 and (3 * 1 + .25) / 4.
    """
    loss = loss_of(vf_coef=0.1)
    chosen = loss.select(small_rollout(np.array([[2.0, 1.0], [-1.0, 0.5]])))
    logps = torch.tensor([[-1.0, -1.0 + np.log(1.5), -1.0], [-1.0, 0.0, 0.0]])
    found, told = loss.loss(*part_of(chosen, slice(0, 2), logps, torch.zeros(2, 3, 2)))
    assert told["policy_loss"] == pytest.approx(-2.275)
    assert told["value_loss/r0"] == pytest.approx(3.25)
    assert told["value_loss/r1"] == pytest.approx(0.8125)
    assert found.item() == pytest.approx(-2.275 + 0.1 * (3.25 + 0.8125))
    assert told["clip_fraction"] == pytest.approx(0.25)
    assert told["entropy"] == pytest.approx(2.0)


def test_parts_add_up_whatever_their_lengths() -> None:
    loss = loss_of()
    chosen = loss.select(small_rollout(np.array([[2.0, 1.0], [-1.0, 0.5]])))
    logps, values = torch.where(MASK, -0.9, 0.0), torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    whole, _ = loss.loss(*part_of(chosen, slice(0, 2), logps, values))
    first, _ = loss.loss(*part_of(chosen, slice(0, 1), logps, values))
    second, _ = loss.loss(*part_of(chosen, slice(1, 2), logps, values))
    assert whole.item() == pytest.approx((first.item() + second.item()) / 2)


def test_distance_from_the_reference_costs_every_objective() -> None:
    chosen = loss_of(kl_coef=0.1).select(small_rollout(np.zeros((2, 2)), gap=1.0))
    torch.testing.assert_close(chosen.extras["returns"][0, :, 0], torch.tensor([-0.3, -0.2, -0.1]))
    assert torch.equal(chosen.extras["returns"][..., 0], chosen.extras["returns"][..., 1])


def test_a_second_update_on_a_rollout_sees_how_far_the_policy_has_come() -> None:
    seen: list[torch.Tensor] = []
    loss = loss_of()

    def combine(rollout: Rollout, experience: Any, ratios: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(ratios)
        return experience.advantages.sum(-1), {}

    loss.combine = combine
    rollout = small_rollout(np.array([[2.0, 1.0], [-1.0, 0.5]]))
    rollout.score_policy = lambda: torch.where(MASK, torch.tensor(-1.0 + np.log(2.0)), torch.tensor(0.0)).float()
    first = loss.select(rollout)
    second = loss.select(rollout)
    assert torch.equal(seen[0], torch.ones(2, 3))
    torch.testing.assert_close(seen[1], torch.where(MASK, 2.0, 1.0))
    assert torch.equal(first.extras["returns"], second.extras["returns"])


def test_the_adaptive_coefficient_is_state() -> None:
    loss = loss_of(kl_coef=0.1, kl_target=1.0, kl_horizon=10)
    told = loss.select(small_rollout(np.zeros((2, 2)), gap=1.0)).metrics
    assert told["kl_coef"] == pytest.approx(0.1 * 1.04)  # KL (3 + 1) / 2 = 2: a fifth too far, 2 responses in 10
    other = loss_of(kl_coef=0.1, kl_target=1.0)
    other.load_state(loss.state())
    assert other.kl_coef == loss.kl_coef


# -- on the engine -----------------------------------------------------------------------------------------------------

FEW = ("batch=6", "steps=4", "lr=0.01", "log_every=1", "checkpoint_every=2", "groups=3")


def scalar(job: Job) -> PpoLoss:
    return PpoLoss(
        job.config, ["utility"], grouped(job.preferences, 3), lambda r: r.z.mean(axis=1, keepdims=True), only
    )


def run(job: Job, phase: str = "online") -> dict[str, torch.Tensor]:
    lm = job.task.language_model
    train_ppo(job, lm, scalar(job), phase, "percent", ("kl", "value_loss/"))
    return {**adapters.tensors(lm), **job.run.load_tensors(f"value_heads-{phase}")}


def test_values_are_those_of_the_states_that_the_tokens_were_drawn_from(make_job: MakeJob) -> None:
    """What the sampler saw is what one pass over the whole sequence sees."""
    job = make_job("moc", *FEW)
    lm = job.task.language_model
    heads = ValueHeads(lm.model.config.hidden_size, 2)
    torch.nn.init.normal_(heads.linear.weight)
    rollout = OnlineEngine(job, lm, job.config, value_heads=heads).rollout(0, scalar(job))
    drawn = rollout.samples
    with torch.no_grad():
        outputs = token_outputs(
            lm.model, drawn.input_ids, drawn.attention_mask, drawn.response_mask, job.config.temperature, hidden=True
        )
        wanted = heads(outputs.hidden)
    assert rollout.values is not None
    inside = drawn.response_mask
    torch.testing.assert_close(rollout.values[inside], wanted[inside], rtol=1e-3, atol=1e-3)
    assert rollout.score_policy is not None
    torch.testing.assert_close(rollout.score_policy(), drawn.logps, rtol=0, atol=1e-4)


def test_the_first_ratios_are_one_whatever_the_dropout(make_job: MakeJob) -> None:
    """With dropout in the pass that is trained on they scattered: what PPO clipped before any update was noise."""
    job = make_job("moc", *FEW, "steps=1", lora="policy.lora={r: 4, alpha: 8, dropout: 0.3}")
    lm = job.task.language_model
    generator = torch.Generator().manual_seed(1)
    moved = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in adapters.tensors(lm).items()}
    adapters.set_tensors(lm, moved)
    seen: list[torch.Tensor] = []

    class Look(PpoLoss):
        def loss(self, outputs: TokenOutputs, part: Part) -> tuple[torch.Tensor, dict[str, float]]:
            seen.append((outputs.logps.detach() - part.old_logps).exp())
            return super().loss(outputs, part)

    plain = scalar(job)
    train_ppo(job, lm, Look(plain.config, plain.heads, plain.preferences, plain.rewards, only), "online", "percent", ())
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]), rtol=0, atol=1e-4)
    assert job.run.metrics()[0]["clip_fraction"] == 0


def test_the_gradient_does_not_depend_on_the_micro_batch(make_job: MakeJob, assert_same: Same) -> None:
    gradients = []
    for where, size in (("a", 4), ("b", 64)):
        job = make_job("moc", *FEW, "batch=9", f"micro_batch={size}", where=where)
        lm = job.task.language_model
        torch.manual_seed(0)
        heads = ValueHeads(lm.model.config.hidden_size, 1)
        torch.nn.init.normal_(heads.linear.weight)
        engine = OnlineEngine(job, lm, job.config, value_heads=heads)
        loss = scalar(job)
        rollout = engine.rollout(0, loss)
        engine._accumulate(rollout, loss.select(rollout), loss)
        named = [*lm.model.named_parameters(), *heads.named_parameters()]
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    assert "linear.weight" in gradients[0]
    assert max(float(g.abs().max()) for name, g in gradients[0].items() if "lora" in name) > 1e-4
    assert_same(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_the_critics_do_not_train_the_policy(make_job: MakeJob) -> None:
    """Their gradient stays in the heads: with a policy loss of zero the adapter does not move."""
    job = make_job("moc", *FEW)
    lm = job.task.language_model
    start = {name: value.clone() for name, value in adapters.tensors(lm).items()}
    none: Any = lambda rollout, experience, ratios: (torch.zeros_like(ratios), {})  # noqa: E731
    loss = PpoLoss(job.config, ["one", "two"], grouped(job.preferences, 3), lambda r: r.z, none)
    train_ppo(job, lm, loss, "online", "percent", ())
    after = adapters.tensors(lm)
    assert all(torch.equal(start[name], after[name]) for name in start)
    assert float(job.run.load_tensors("value_heads-online")["linear.weight"].abs().max()) > 1e-3


def test_heads_learn_at_their_own_rate(make_job: MakeJob) -> None:
    job = make_job("moc", *FEW, "value_lr=0.5", "schedule=linear")
    lm = job.task.language_model
    engine = OnlineEngine(job, lm, job.config, value_heads=ValueHeads(16, 1), value_lr=0.5)
    engine.run(scalar(job))
    assert [group["lr"] for group in engine.optimizer.param_groups] == pytest.approx([0.01 / 4, 0.5 / 4])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="plain"),
        pytest.param(("kl_target=0.01", "kl_horizon=20", "epochs=2", "schedule=linear"), id="adaptive, two epochs"),
    ],
)
def test_a_resume_goes_on_bit_for_bit(
    make_job: MakeJob,
    assert_same: Same,
    stop: Callable[..., Any],
    interrupted: type[Exception],
    changes: tuple[str, ...],
) -> None:
    whole = make_job("moc", *FEW, *changes, where="whole")
    wanted = run(whole)
    say = stop("online", 3)
    with pytest.raises(interrupted):
        run(make_job("moc", *FEW, *changes, say=say))
    job = make_job("moc", *FEW, *changes, say=say)
    assert_same(run(job), wanted)
    assert [done for _, done in say.seen] == [1, 2, 3, 3, 4]
    assert job.notes == whole.notes
    keys = ("kl", "kl_coef", "policy_loss", "value_loss/utility", "clip_fraction", "entropy")
    for found, line in zip(job.run.metrics(), whole.run.metrics(), strict=True):
        assert {key: found[key] for key in keys} == {key: line[key] for key in keys}
    assert (len({line["kl_coef"] for line in job.run.metrics()}) > 1) == bool(changes)


def test_diagnostics_are_noted(make_job: MakeJob) -> None:
    job = make_job("moc", *FEW)
    run(job)
    last = job.run.metrics()[-1]
    assert job.notes["diagnostics"] == {"kl": last["kl"], "value_loss/utility": last["value_loss/utility"]}


def test_a_bare_prompt_carries_no_preference(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("moc", *FEW)
    read: list[str] = []
    encode = job.task.language_model.encode
    monkeypatch.setattr(
        type(job.task.language_model),
        "encode",
        lambda self, texts, *rest: (read.extend(texts), encode(texts, *rest))[1],
    )
    engine = OnlineEngine(job, job.task.language_model, job.config, style="plain", value_heads=ValueHeads(16, 1))
    rollout = engine.rollout(0, scalar(job))
    assert read == rollout.prompts

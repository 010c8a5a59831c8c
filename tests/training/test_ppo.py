"""PPO on the trainer: value heads, ratios, the KL coefficient, resume; on a base of random weights."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moalign.lm import adapters
from moalign.lm.log_probs import token_outputs
from moalign.losses import ppo
from moalign.methods import morlhf
from moalign.training.job import Job
from moalign.training.online import OnlineTrainer, PpoTrainer
from moalign.training.preference_draws import grouped
from moalign.training.rollout import Rollout
from moalign.training.settings import ConditionedPpoConfig, PpoConfig

MakeJob = Callable[..., Job]
Same = Callable[..., None]
FEW = ("batch=6", "steps=4", "lr=0.01", "log_every=1", "checkpoint_every=2", "groups=3")


def ppo_trainer(job: Job, *heads: str, **given: Any) -> PpoTrainer:
    draw = grouped(job.preferences, 3)
    return PpoTrainer(job, job.task.language_model, job.config, draw, heads or ("utility",), **given)


def run(job: Job) -> dict[str, torch.Tensor]:
    """Train on w . r; returns adapter and value head."""
    lm = job.task.language_model
    morlhf.learn(job, lm, job.preferences, "online", "percent")
    return {**adapters.tensors(lm), **job.run.load_tensors("value_heads-online")}


def warm_up(job: Job) -> None:
    """Move the adapter away from zero, so that policy and base differ."""
    lm, generator = job.task.language_model, torch.Generator().manual_seed(1)
    moved = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in adapters.tensors(lm).items()}
    adapters.set_tensors(lm, moved)


Tokens = tuple[torch.Tensor, ...]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tokens, dict[str, torch.Tensor]]]:
    """What every later part is trained on: logps, entropy, values, old logps and mask; and the part's tensors."""
    seen: list[tuple[Tokens, dict[str, torch.Tensor]]] = []
    plain = ppo.loss

    def look(*given: Any, **named: Any) -> Any:
        seen.append((tuple(tokens.detach() for tokens in given[:5]), given[5]))
        return plain(*given, **named)

    monkeypatch.setattr(ppo, "loss", look)
    return seen


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"clip_range": 1.0}, {"kl_coef": -0.1}, {"gae_lambda": 1.5}, {"gamma": 0}, {"vf_coef": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PpoConfig.model_validate(wrong)
    with pytest.raises(ValueError, match="groups must be at most batch; found 8 and 4"):
        ConditionedPpoConfig(batch=4)


# -- values, ratios, gradients -----------------------------------------------------------------------------------------


def test_values_are_those_of_the_states_that_the_tokens_were_drawn_from(make_job: MakeJob) -> None:
    """What the sampler saw is what one pass over the whole sequence sees."""
    job = make_job("moc", *FEW)
    lm = job.task.language_model
    trainer = ppo_trainer(job, "one", "two")
    assert trainer.value_heads is not None
    torch.nn.init.normal_(trainer.value_heads.linear.weight)
    rollout = next(trainer.rollouts())
    drawn = rollout.samples
    with torch.no_grad():
        outputs = token_outputs(
            lm.model, drawn.input_ids, drawn.attention_mask, drawn.response_mask, job.config.temperature, hidden=True
        )
        wanted = trainer.value_heads(outputs.hidden)
    assert rollout.values is not None
    inside = drawn.response_mask
    assert float(wanted[inside].abs().max()) > 0.1
    torch.testing.assert_close(rollout.values[inside], wanted[inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trainer.policy_logps(), drawn.logps, rtol=0, atol=1e-4)


def test_the_first_ratios_are_one_whatever_the_dropout(make_job: MakeJob, losses: list[Any]) -> None:
    """With dropout in the pass that is trained on they scattered: what PPO clipped before any update was noise."""
    job = make_job("moc", *FEW, "steps=1", lora="policy.lora={r: 4, alpha: 8, dropout: 0.3}")
    warm_up(job)
    run(job)
    (logps, _, _, old_logps, _), _ = losses[0]
    torch.testing.assert_close((logps - old_logps).exp(), torch.ones_like(logps), rtol=0, atol=1e-4)
    assert float(logps.abs().max()) > 0.1
    assert job.run.metrics()[0]["clip_fraction"] == 0


def test_the_policy_as_it_is_now_is_the_one_that_the_next_update_starts_from(
    make_job: MakeJob, losses: list[Any]
) -> None:
    job = make_job("moc", *FEW, "steps=1")
    trainer = ppo_trainer(job)
    for rollout in trainer.rollouts():
        experience = trainer.experience(rollout.utility[:, None])
        trainer.update(experience, experience.advantages[..., 0])
        now = trainer.policy_logps()
        assert not now.requires_grad
        trainer.update(experience, experience.advantages[..., 0])
    (first, *_), _ = losses[0]
    (second, _, _, old_logps, _), _ = losses[1]
    torch.testing.assert_close(now, second, rtol=0, atol=1e-4)
    assert float((now - first).abs().max()) > 1e-2  # it has moved
    torch.testing.assert_close(old_logps, first, rtol=0, atol=1e-4)  # and ratios are still to the one that sampled


def test_every_row_is_trained_on_and_every_update_pays_for_the_distance(make_job: MakeJob, losses: list[Any]) -> None:
    """The cost is apart, and the method forgets all others: what is left is the cost, in both updates."""
    job = make_job("moc", *FEW, "steps=1", "batch=7", "micro_batch=3")
    warm_up(job)
    trainer = ppo_trainer(job, "one", "two", ppo.KL_HEAD)
    for rollout in trainer.rollouts():
        experience = trainer.experience(rollout.z, kl_apart=True)
        assert experience.kl is not None
        assert float(experience.kl.abs().max()) > 1e-3
        for _ in range(2):
            trainer.update(experience, torch.zeros_like(experience.old_logps))
    assert [len(tensors["advantages"]) for _, tensors in losses] == [3, 3, 1] * 2
    for update in (losses[:3], losses[3:]):
        assert torch.equal(torch.cat([tensors["advantages"] for _, tensors in update]), experience.kl)
        assert torch.equal(torch.cat([tensors["returns"] for _, tensors in update]), experience.returns)
        assert torch.equal(torch.cat([tokens[3] for tokens, _ in update]), experience.old_logps)
    assert {"value_loss/one", "value_loss/two", "value_loss/kl"} <= set(job.run.metrics()[0])


@pytest.mark.slow
def test_the_gradient_does_not_depend_on_the_micro_batch(
    make_job: MakeJob, assert_same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for where, size in (("a", 4), ("b", 64)):
        job = make_job("moc", *FEW, "batch=9", f"micro_batch={size}", where=where)
        trainer = ppo_trainer(job)
        assert trainer.value_heads is not None
        torch.manual_seed(0)
        torch.nn.init.normal_(trainer.value_heads.linear.weight)
        monkeypatch.setattr(trainer, "step", lambda metrics: None)  # which clips
        experience = trainer.experience(next(trainer.rollouts()).utility[:, None])
        trainer.update(experience, experience.advantages[..., 0])
        named = [*job.task.language_model.model.named_parameters(), *trainer.value_heads.named_parameters()]
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    assert "linear.weight" in gradients[0]
    assert max(float(g.abs().max()) for name, g in gradients[0].items() if "lora" in name) > 1e-4
    assert_same(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_the_critics_do_not_train_the_policy(make_job: MakeJob) -> None:
    """Their gradient stays in the heads: with a policy loss of zero the adapter does not move."""
    job = make_job("moc", *FEW)
    lm = job.task.language_model
    start = {name: value.clone() for name, value in adapters.tensors(lm).items()}
    trainer = ppo_trainer(job, "one", "two")
    for rollout in trainer.rollouts():
        experience = trainer.experience(rollout.z)
        trainer.update(experience, torch.zeros_like(experience.old_logps))
    after = adapters.tensors(lm)
    assert all(torch.equal(start[name], after[name]) for name in start)
    assert float(job.run.load_tensors("value_heads-online")["linear.weight"].abs().max()) > 1e-3


def test_heads_learn_at_their_own_rate(make_job: MakeJob) -> None:
    job = make_job("moc", *FEW, "value_lr=0.5", "schedule=linear")
    trainer = ppo_trainer(job)
    for rollout in trainer.rollouts():
        experience = trainer.experience(rollout.utility[:, None])
        trainer.update(experience, experience.advantages[..., 0])
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.01 / 4, 0.5 / 4])


# -- the KL coefficient ------------------------------------------------------------------------------------------------


def test_the_adaptive_coefficient_is_state_and_holds_from_the_next_rollout_on(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two responses of three tokens and one, a nat from the reference each: KL (3 + 1) / 2 = 2, a fifth too far."""
    adaptive = ("kl_coef=0.1", "kl_budget=1.0", "kl_horizon=10", "gae_lambda=1.0", "whiten=none")
    trainer = ppo_trainer(make_job("moc", *FEW, *adaptive), "one", "two")
    assert trainer.state == {"kl_coef": 0.1}
    mask = torch.tensor([[True, True, True], [True, False, False]])
    logps = torch.where(mask, torch.tensor(-1.0), torch.tensor(0.0))
    drawn: Any = SimpleNamespace(logps=logps, response_mask=mask)
    z, reference = np.zeros((2, 2)), torch.where(mask, logps - 1, logps)
    rollout = Rollout(["p", "q"], np.ones((2, 1)), 1, drawn, ["a", "b"], z, z, lambda rows: reference[rows])
    rollout.values = torch.zeros(2, 3, 2)
    monkeypatch.setattr(trainer, "sample", lambda step: rollout)
    assert next(trainer.rollouts()) is rollout
    returns = trainer.experience(z).returns
    torch.testing.assert_close(returns[0, :, 0], torch.tensor([-0.3, -0.2, -0.1]))  # at the coefficient before
    assert trainer.state["kl_coef"] == pytest.approx(0.1 * 1.04)  # 2 responses in 10
    returns = trainer.experience(z).returns
    torch.testing.assert_close(returns[0, :, 0], 1.04 * torch.tensor([-0.3, -0.2, -0.1]))


def test_the_coefficient_that_is_logged_is_the_adapted_one(make_job: MakeJob) -> None:
    job = make_job("moc", *FEW, "kl_coef=0.1", "kl_budget=1.0", "kl_horizon=10", "steps=1")
    run(job)  # the policy is the base yet: KL 0, at most a fifth too near, 6 responses in 10
    assert job.run.metrics()[0]["kl_coef"] == pytest.approx(0.1 * (1 - 0.2 * 6 / 10))


# -- resume and record -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param((), id="plain"),
        pytest.param(("kl_budget=0.01", "kl_horizon=20", "epochs=2", "schedule=linear"), id="adaptive, two epochs"),
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
    progress = stop("online", 3)
    with pytest.raises(interrupted):
        run(make_job("moc", *FEW, *changes, progress=progress))
    job = make_job("moc", *FEW, *changes, progress=progress)
    assert_same(run(job), wanted)
    assert [done for _, done in progress.seen] == [1, 2, 3, 3, 4]
    assert job.notes == whole.notes
    keys = ("kl", "kl_coef", "policy_loss", "value_loss/utility", "clip_fraction", "entropy")
    for found, line in zip(job.run.metrics(), whole.run.metrics(), strict=True):
        assert {key: found[key] for key in keys} == {key: line[key] for key in keys}
    assert (len({line["kl_coef"] for line in job.run.metrics()}) > 1) == bool(changes)


def test_diagnostics_are_noted(make_job: MakeJob) -> None:
    job = make_job("moc", *FEW)
    run(job)
    last = job.run.metrics()[-1]
    names = ("kl", "kl_coef", "entropy", "clip_fraction", "value_loss/utility")
    assert job.notes["diagnostics"] == {name: last[name] for name in names}


def test_a_bare_prompt_carries_no_preference(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job("moc", *FEW)
    lm = job.task.language_model
    read: list[str] = []
    encode = lm.encode
    monkeypatch.setattr(type(lm), "encode", lambda self, texts, *rest: (read.extend(texts), encode(texts, *rest))[1])
    trainer = OnlineTrainer(job, lm, job.config, grouped(job.preferences, 3), style="plain", value_heads=1)
    rollout = trainer.sample(0)
    assert read == rollout.prompts

"""Remedies against wrong rewards that every online method can switch on: support, a KL budget, a cap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moalign.lm import adapters
from moalign.lm.log_probs import token_outputs
from moalign.methods import grpo, mo_odpo, moc, pcm
from moalign.training import support
from moalign.training.job import Job
from moalign.training.kl_budget import adapted
from moalign.training.online import OnlineTrainer
from moalign.training.preference_draws import independent

MakeJob = Callable[..., Job]


def trainer_of(job: Job) -> OnlineTrainer:
    return OnlineTrainer(job, job.task.language_model, job.config, independent(None, 2, job.config.alpha))


def train(job: Job) -> None:
    mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)


def move(job: Job) -> None:
    """Move the adapter away from zero, so that policy and base differ."""
    lm, generator = job.task.language_model, torch.Generator().manual_seed(1)
    values = adapters.tensors(lm).items()
    adapters.set_tensors(lm, {name: v + 0.2 * torch.randn(v.shape, generator=generator) for name, v in values})


# -- support -------------------------------------------------------------------------------------------------------


def test_one_token_below_the_end_is_outside_and_padding_is_not() -> None:
    logps = torch.tensor([[-1.0, -3.0, -9.0], [-1.0, -3.1, -1.0], [-2.0, -2.0, -2.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    assert support.outside(logps, mask, -3.0).tolist() == [False, True, False]


def test_what_is_outside_is_worth_the_datas_lower_bound_at_most() -> None:
    z = np.array([[5.0, -4.0], [5.0, 1.0]])
    bounds = np.array([[-2.0, 2.0], [-3.0, 3.0]])
    assert support.believed(z, np.array([True, False]), bounds).tolist() == [[-2.0, -4.0], [5.0, 1.0]]


def test_the_end_of_the_support_is_the_least_likely_token_of_the_calibration_responses(make_job: MakeJob) -> None:
    """Against one forward pass for each response alone."""
    job = make_job("mo-odpo")
    lm, scored = job.task.language_model, job.task.calibration()
    least = []
    for prompt, response in zip(scored.prompts, scored.responses, strict=True):
        head = lm.encode([job.task.renderer.plain(prompt)])[0]
        tail = [*lm.tokenizer(response.text, add_special_tokens=False)["input_ids"], lm.eos]
        ids = torch.tensor([[*head, *tail]])
        with torch.no_grad():
            out = token_outputs(lm.model, ids, torch.ones_like(ids), torch.ones(1, len(tail), dtype=torch.bool), 0.7)
        least.append(float(out.logps.min()))
    assert support.end_of(job, lm, 0.7) == pytest.approx(min(least), abs=1e-4)


def test_the_end_of_the_support_is_found_once_for_a_grid(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method with a policy for each preference has a trainer for each; the calibration responses are read once."""
    job, asked = make_job("mo-odpo", "support=2"), []
    monkeypatch.setattr(support, "end_of", lambda *given: asked.append(given) or -3.0)
    for _ in range(3):
        trainer = trainer_of(job)
        trainer.sample(0)
        assert trainer.support.end == -5.0
    assert len(asked) == 1


def test_a_rollout_believes_no_reward_outside_and_logs_how_many_were(make_job: MakeJob) -> None:
    """With the end put at 0 every response is outside; with an end below all of them none is."""
    found = {}
    for end in (0.0, -1e9):
        job = make_job("mo-odpo", "batch=8", "steps=1", "support=0", "log_every=1", where=str(end))
        trainer = trainer_of(job)
        trainer.support.end = end
        rollout = next(trainer.rollouts())
        found[end] = rollout
        lower = job.panel.z_bounds()[:, 0]
        plain = job.panel.z(rollout.raw)
        expected = np.minimum(plain, lower) if end == 0 else plain
        assert rollout.z.tolist() == expected.tolist()
    assert (found[0.0].outside, found[-1e9].outside) == (1.0, 0.0)


def test_the_base_is_asked_also_where_the_reference_is_another_policy(make_job: MakeJob) -> None:
    """The start that is the reference has learned tokens that the base finds unlikely: they are outside."""
    job = make_job("mo-odpo", "batch=8", "steps=1", "support=0", "reference=start", "log_every=1")
    move(job)
    trainer = trainer_of(job)
    trainer.support.end = -1e9
    rollouts = trainer.rollouts()  # kept: its end drops the reference
    rollout = next(rollouts)
    least, own = trainer.support._least_likely(rollout), rollout.ref_logps().amin(-1)
    trainer.support.end = float(least.median())
    trainer.support.apply(rollout)
    rollouts.close()
    plain = make_job("mo-odpo", "batch=8", "steps=1", "support=0", "log_every=1", where="plain")
    move(plain)
    other = next(trainer_of(plain).rollouts())
    assert other.responses == rollout.responses
    inside = other.samples.response_mask
    base = torch.where(inside, other.ref_logps(), torch.zeros(())).amin(-1)
    torch.testing.assert_close(least, base, atol=1e-4, rtol=1e-4)
    assert (own - base).abs().max() > 0.1, "or there is nothing to tell apart"
    assert rollout.outside == pytest.approx(float((base < base.median()).float().mean()))


def test_the_share_outside_is_in_the_log(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=4", "steps=1", "support=0", "log_every=1")
    train(job)
    assert 0 <= job.run.metrics()[0]["outside"] <= 1


# -- a KL budget, and rewards beyond the data ----------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "way"), [(1e-3, "up"), (1e3, "down")])
def test_beta_is_steered_to_the_kl_budget(make_job: MakeJob, budget: float, way: str) -> None:
    """A policy that has moved is too far for .001 nats and too near for 1,000: a fifth a step, at this horizon."""
    job = make_job("mo-odpo", "batch=8", "steps=2", "lr=0.01", f"kl_budget={budget}", "kl_horizon=16", "log_every=1")
    move(job)
    train(job)
    factor = 1.2 if way == "up" else 0.8
    assert [line["beta"] for line in job.run.metrics()] == pytest.approx([0.1, 0.1 * factor])
    assert job.notes["kl_budget"] == {"nats": budget, "beta_at_the_end": pytest.approx(0.1 * factor**2)}


def test_the_strength_never_turns_negative_and_starts_above_0() -> None:
    """Worked by hand: an error of -.2 over 128 responses at a horizon of 20 would be a factor of -.28."""
    assert adapted(0.1, 5.5, 5, 100, 10_000) == pytest.approx(0.1 * 1.001)
    assert adapted(0.1, 0, 5, 128, 20) == pytest.approx(0.05)
    assert adapted(0.1, 50, 5, 128, 20) == pytest.approx(0.2)
    with pytest.raises(ValidationError, match="kl_budget steers beta .* must start above 0; found beta: 0 and"):
        grpo.Config(beta=0, kl_budget=5)
    with pytest.raises(ValidationError, match="kl_budget steers kl_coef by factors"):
        moc.Config(kl_coef=0, kl_budget=5)


def test_without_a_budget_beta_stays_and_nothing_is_noted(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=4", "steps=1")
    train(job)
    assert "kl_budget" not in job.notes
    assert "beta" not in job.run.metrics()[0]


def test_training_ends_at_the_first_rollout_beyond_kl_stop_with_the_policy_as_it_was(
    make_job: MakeJob, assert_same: Callable[..., None]
) -> None:
    """The same as training with as many steps, where the learning rate does not depend on how many there are."""
    settings = ("batch=8", "lr=0.02", "log_every=1", "schedule=constant", "snapshots=2")
    whole = make_job("mo-odpo", "steps=8", *settings, where="whole")
    train(whole)
    kls = [line["kl"] for line in whole.run.metrics()]
    limit = kls[4]
    steps = next(done for done, kl in enumerate(kls) if kl > limit)
    assert 4 < steps < 8, "the policy moves away, or there is nothing to see"
    stopped = make_job("mo-odpo", "steps=8", f"kl_stop={limit}", *settings, where="stopped")
    train(stopped)
    found = {name: value.clone() for name, value in adapters.tensors(stopped.task.language_model).items()}
    assert stopped.notes["kl_stop"] == {"online": {"steps": steps, "of": 8, "kl": kls[steps]}}
    assert [line["kl"] for line in stopped.run.metrics()] == kls[: steps + 1]
    assert (stopped.run.path / "snapshots/online-8/adapter").is_dir(), "curves go on with the policy as it stays"
    short = make_job("mo-odpo", f"steps={steps}", *settings, where="short")
    train(short)
    assert_same(found, adapters.tensors(short.task.language_model))


def test_a_policy_beyond_kl_stop_from_the_start_is_not_trained_and_says_so(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=8", "steps=2", "kl_stop=0.001")
    move(job)
    before = {name: value.clone() for name, value in adapters.tensors(job.task.language_model).items()}
    train(job)
    (warning,) = job.notes["warnings"]
    assert warning.startswith("online: nothing was trained: ") and warning.endswith("at the start (kl_stop: 0.001)")
    assert all(value.equal(before[name]) for name, value in adapters.tensors(job.task.language_model).items())


def test_a_capped_reward_is_what_methods_see(make_job: MakeJob) -> None:
    """With bounds four deviations below the means, no reward is worth more than that; without a cap some are."""
    most = {}
    for cap in ("none", "clip"):
        job = make_job("mo-odpo", "batch=8", f"reward_cap={cap}", where=cap)
        scale = job.task.normaliser
        low = replace(scale, bounds=tuple((m - 9 * sd, m - 4 * sd) for m, sd in zip(scale.mean, scale.sd, strict=True)))
        job.panel = job.panel.with_normaliser(low)
        most[cap] = next(trainer_of(job).rollouts()).z.max()
    assert most["none"] > -3.9
    assert most["clip"] == pytest.approx(-4)


def test_a_method_without_a_kl_term_refuses_a_budget() -> None:
    with pytest.raises(ValueError, match="kl_budget steers a KL term, and trainer: rebel has none; found 5"):
        pcm.Config(trainer="rebel", kl_budget=5)
    assert pcm.Config(trainer="ppo", kl_budget=5).kl_budget == 5


# -- all together ----------------------------------------------------------------------------------------------------


def test_a_resume_with_every_remedy_goes_on_bit_for_bit(
    make_job: MakeJob, assert_same: Callable[..., None], stop: Callable[..., Any], interrupted: type[Exception]
) -> None:
    """The end of the support is found again by a new process, and the strength of the KL term is kept."""
    settings = ("batch=4", "samples=3", "steps=4", "lr=0.01", "log_every=1", "checkpoint_every=2")
    remedies = (
        "kl_budget=0.01",
        "kl_horizon=20",
        "kl_stop=1000",
        "reward_cap=log",
        "support=0",
        "scalarisation=exponential",
    )
    every = (*settings, *remedies, "labels=bradley-terry", "extremes=advantage")

    def run(where: str, **more: Any) -> tuple[Job, dict[str, torch.Tensor]]:
        job = make_job("mo-odpo", *every, where=where, **more)
        train(job)
        return job, {name: value.clone() for name, value in adapters.tensors(job.task.language_model).items()}

    whole, wanted = run("whole")
    progress = stop("online", 3)
    with pytest.raises(interrupted):
        run("a", progress=progress)
    again, found = run("a", progress=progress)
    assert_same(found, wanted)
    assert again.notes == whole.notes
    keys = ("beta", "kl", "outside", "loss")
    lines = zip(again.run.metrics(), whole.run.metrics(), strict=True)
    assert all(one[key] == other[key] for one, other in lines for key in keys)
    assert len({line["beta"] for line in again.run.metrics()}) > 1

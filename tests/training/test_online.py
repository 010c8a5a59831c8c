"""The online trainer: gradients, references, value heads, log, resume; on a base of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moalign.lm import adapters
from moalign.methods import mo_odpo
from moalign.training import actor
from moalign.training.actor import REFERENCE
from moalign.training.job import Job
from moalign.training.online import OnlineTrainer, Part
from moalign.training.preference_draws import independent
from moalign.training.rollout import Rollout

MakeJob = Callable[..., Job]
Same = Callable[..., None]
FEW = ("batch=4", "steps=3", "lr=0.01", "log_every=1")


def weights(job: Job, name: str = adapters.ADAPTER) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in adapters.tensors(job.task.language_model, name).items()}


def farthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def trainer_of(job: Job, **given: Any) -> OnlineTrainer:
    draw = independent(None, len(job.task.names), 1.0)
    return OnlineTrainer(job, job.task.language_model, job.config, draw, **given)


def train(job: Job) -> None:
    """Train by MO-ODPO: a loop that pairs, skips and steps."""
    mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """The parts that MO-ODPO's loss is given from here on; their log-probabilities are detached copies."""
    seen: list[Part] = []
    plain = mo_odpo.loss

    def look(part: Part, *rest: Any) -> Any:
        seen.append(replace(part, logps=part.logps.detach().clone()))
        return plain(part, *rest)

    monkeypatch.setattr(mo_odpo, "loss", look)
    return seen


def warm_up(job: Job) -> None:
    """Move the adapter away from zero, so that policy and base differ."""
    generator = torch.Generator().manual_seed(1)
    moved = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in adapters.tensors(job.task.language_model).items()
    }
    adapters.set_tensors(job.task.language_model, moved)


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["weighted", pytest.param("per_objective", marks=pytest.mark.slow)])
def test_the_gradient_does_not_depend_on_the_micro_batch(make_job: MakeJob, assert_same: Same, pairing: str) -> None:
    """8 prompts, 16 rows, in parts of 4, of 6 (which does not divide 16), and in one."""
    gradients = []
    for where, size in (("a", 4), ("b", 6), ("c", 64)):
        job = make_job("mo-odpo", "batch=8", f"micro_batch={size}", f"pairing={pairing}", where=where)
        warm_up(job)
        trainer = trainer_of(job)
        pairs = mo_odpo.paired(next(trainer.rollouts()), job.config, job.config.beta)
        for part in trainer.parts(pairs.rows, group=2, tensors=pairs.tensors):
            trainer.backward(*mo_odpo.loss(part, job.config, job.task.names, job.config.beta))
        named = job.task.language_model.model.named_parameters()
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
    assert gradients[0]
    assert max(float(g.abs().max()) for g in gradients[0].values()) > 1e-3
    assert_same(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert_same(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)


def test_a_step_does_not_depend_on_the_micro_batch(make_job: MakeJob, assert_same: Same) -> None:
    found = []
    for where, size in (("a", 4), ("b", 64)):
        job = make_job("mo-odpo", "batch=8", "steps=1", "lr=0.01", f"micro_batch={size}", where=where)
        warm_up(job)
        before = weights(job)
        train(job)
        assert farthest(weights(job), before) > 1e-3
        found.append(weights(job))
    assert_same(found[0], found[1], rtol=0.0, atol=1e-4)  # Adam's first step is lr * sign: tiny gradients may differ


def test_the_log_probabilities_trained_on_are_those_sampled_from(make_job: MakeJob, parts: list[Part]) -> None:
    job = make_job("mo-odpo", *FEW, "temperature=0.7")
    warm_up(job)
    train(job)
    assert float((parts[0].logps - parts[0].old_logps).abs().max()) < 1e-4
    assert float((parts[0].ref_logps - parts[0].old_logps).abs().max()) > 1e-2  # the base is another policy by now


LORA_DROPOUT = "policy.lora={r: 4, alpha: 8, dropout: 0.3}"


@pytest.mark.parametrize("reference", ["start", "base"])
def test_dropout_is_off_in_both_sides_of_a_log_ratio(make_job: MakeJob, parts: list[Part], reference: str) -> None:
    job = make_job("mo-odpo", *FEW, "steps=1", f"reference={reference}", lora=LORA_DROPOUT)
    if reference == "start":
        warm_up(job)  # at the base B is zero, and the adapter's dropout has nothing to drop
    start = weights(job)
    train(job)
    part = parts[0]
    assert float(part.logps.abs().max()) > 0.1
    assert torch.equal(part.logps, part.ref_logps)
    assert float((part.logps - part.old_logps).abs().max()) < 1e-4
    assert farthest(weights(job), start) > 1e-3  # and gradients flow
    assert not job.task.language_model.model.training


def test_half_precision_is_scored_again_as_it_is_trained_on(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sampler says of its own tokens rounds otherwise; in float32 it is kept (to 1e-4, above)."""
    monkeypatch.setattr(adapters, "MERGE_BELOW", 0)
    drawn: list[torch.Tensor] = []
    plain = actor.sample
    monkeypatch.setattr(actor, "sample", lambda *a, **k: [made := plain(*a, **k), drawn.append(made.logps.clone())][0])
    job = make_job("mo-odpo", *FEW, "steps=1", "micro_batch=8", "task.dtype=bfloat16")
    warm_up(job)
    trainer = trainer_of(job)
    for rollout in trainer.rollouts():
        assert torch.equal(rollout.samples.logps, trainer.policy_logps())
        for part in trainer.parts(np.arange(8), tensors={}):
            assert torch.equal(rollout.samples.logps, part.logps)
            trainer.backward(-part.logps.mean())
        trainer.step()
    again = make_job("mo-odpo", *FEW, "task.dtype=bfloat16", where="b")
    warm_up(again)
    rollout = trainer_of(again).sample(0)
    assert float((rollout.samples.logps - drawn[-1]).abs().max()) > 1e-3


# -- batches that teach nothing --------------------------------------------------------------------------------------


def test_a_batch_of_ties_is_counted_and_skipped_and_training_goes_on(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("mo-odpo", *FEW)
    score, calls = job.panel.score, []

    def constant_at_first(*given: Any, **named: Any) -> NDArray[np.float64]:
        raw = score(*given, **named)
        calls.append(len(raw))
        return np.ones_like(raw) if len(calls) <= 2 else raw

    monkeypatch.setattr(job.panel, "score", constant_at_first)
    moments = []
    job.progress = lambda *what: moments.append(weights(job))
    start = weights(job)
    train(job)
    assert farthest(moments[1], start) == 0.0
    assert farthest(moments[2], start) > 0.0
    lines = job.run.metrics()
    assert [line.get("skipped") for line in lines] == [1.0, 1.0, None]
    assert [line["dropped"] for line in lines[:2]] == [4.0, 4.0]
    assert [line["dropped_share"] for line in lines[:2]] == [1.0, 1.0]
    assert job.notes["updates_skipped"] == 2
    assert job.notes["pairs_dropped"] == 8 + lines[2]["dropped"]


def test_identical_responses_are_counted_and_skipped(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the scorer tells two identical responses apart (a noisy one)."""
    job = make_job("mo-odpo", *FEW)
    noise = np.random.default_rng(0)
    monkeypatch.setattr(job.panel, "score", lambda prompts, texts: noise.normal(size=(len(texts), 2)))
    monkeypatch.setattr("moalign.training.rollout.responses", lambda lm, drawn, stop: ["same"] * len(drawn.logps))
    start = weights(job)
    train(job)
    assert farthest(weights(job), start) == 0.0
    assert job.notes == {"pairs_dropped": 12, "updates_skipped": 3}


def test_a_rollout_of_ties_is_skipped_once_and_counted_once_whatever_the_epochs(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("mo-odpo", *FEW, "epochs=2")
    score, calls = job.panel.score, []

    def constant_at_first(*given: Any, **named: Any) -> NDArray[np.float64]:
        raw = score(*given, **named)
        calls.append(len(raw))
        return np.ones_like(raw) if len(calls) == 1 else raw

    monkeypatch.setattr(job.panel, "score", constant_at_first)
    train(job)
    lines = job.run.metrics()
    assert [line.get("skipped") for line in lines] == [1.0, None, None]
    assert lines[0]["dropped"] == 4.0
    assert "loss" not in lines[0] and "grad_norm" not in lines[0]
    assert job.notes["updates_skipped"] == 1
    assert job.notes["pairs_dropped"] == sum(line["dropped"] for line in lines)


def test_pairs_that_a_rollout_drops_are_counted_once_whatever_the_epochs(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the four pairs of each rollout the first is a tie."""
    job = make_job("mo-odpo", *FEW, "epochs=3")
    monkeypatch.setattr(job.panel, "score", lambda prompts, texts: np.stack([np.maximum(range(8), 1.0)] * 2, axis=1))
    monkeypatch.setattr("moalign.training.rollout.responses", lambda lm, drawn, stop: [str(i) for i in range(8)])
    train(job)
    assert [line["dropped"] for line in job.run.metrics()] == [1.0] * 3
    assert job.notes["pairs_dropped"] == 3


def test_a_loop_that_neither_steps_nor_skips_is_refused(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", *FEW)
    trainer = trainer_of(job, phase="forgetful")
    with pytest.raises(RuntimeError, match=r"forgetful: step 2 ended without trainer.step\(\) or trainer.skip\(\)"):
        for rollout in trainer.rollouts():
            if rollout.step == 0:
                trainer.skip()
            else:
                for part in trainer.parts(np.arange(8), tensors={}):
                    trainer.backward(part.logps.mean())
    assert [line["step"] for line in job.run.metrics()] == [1]


def test_a_step_without_a_gradient_is_refused(make_job: MakeJob) -> None:
    """Adam would move the weights by what it remembers, and the log would repeat the metrics of the step before."""
    job = make_job("mo-odpo", *FEW)
    trainer = trainer_of(job, phase="hasty")
    refused = pytest.raises(RuntimeError, match=r"hasty: trainer.step\(\) without trainer.parts\(\)")
    for rollout in trainer.rollouts():
        if rollout.step:
            with refused:
                trainer.step()
            break
        for part in trainer.parts(np.arange(8), tensors={}):
            trainer.backward(part.logps.mean())
        trainer.step()
        moved = weights(job)
        with refused:
            trainer.step()
        assert farthest(weights(job), moved) == 0.0


# -- references ----------------------------------------------------------------------------------------------------


def test_the_untrained_policy_is_at_no_distance_from_the_base(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=8", "steps=1", "log_every=1")
    train(job)
    (line,) = job.run.metrics()
    assert line["kl"] == pytest.approx(0.0, abs=1e-3)
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-3)  # every pair at margin 0


def test_distance_from_the_base_is_seen_when_there_is_one(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=32", "steps=1", "log_every=1")
    warm_up(job)
    train(job)
    assert job.run.metrics()[0]["kl"] > 0.05


def test_the_reference_may_be_the_policy_at_the_start(make_job: MakeJob, assert_same: Same) -> None:
    job = make_job("mo-odpo", *FEW, "reference=start")
    warm_up(job)
    start, kept = weights(job), []
    job.progress = lambda *what: kept.append(weights(job, REFERENCE))
    train(job)
    lines = job.run.metrics()
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert abs(lines[2]["kl"]) > 1e-3
    assert_same(kept[-1], start)
    assert farthest(weights(job), start) > 1e-3
    assert REFERENCE not in job.task.language_model.model.peft_config


def test_the_reference_goes_however_the_loop_ends(make_job: MakeJob, assert_same: Same) -> None:
    job = make_job("mo-odpo", *FEW, "reference=start")
    warm_up(job)
    start = weights(job)
    model = job.task.language_model.model

    def leave(how: str) -> None:
        for _ in trainer_of(job, value_heads=1).rollouts():
            assert REFERENCE in model.peft_config
            if how == "break":
                break
            raise ZeroDivisionError

    leave("break")
    assert REFERENCE not in model.peft_config
    with pytest.raises(ZeroDivisionError):
        leave("an exception")
    assert REFERENCE not in model.peft_config
    assert "updates_skipped" not in job.notes  # nor is anything saved as if training had ended
    assert not list(job.run.path.glob("value_heads*"))
    assert_same(weights(job), start)


def test_the_reference_follows_the_policy_every_so_many_steps(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=4", "steps=4", "lr=0.01", "log_every=1", "ref_sync_steps=2")
    gaps = []
    job.progress = lambda *what: gaps.append(farthest(weights(job, REFERENCE), weights(job)))
    train(job)
    assert [gap == 0.0 for gap in gaps] == [False, True, False, True]


def test_the_reference_is_never_trained(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", *FEW, "reference=start")
    trainer = trainer_of(job)
    trained = {id(p) for p in trainer.parameters}
    named = dict(job.task.language_model.model.named_parameters())
    assert trained == {id(p) for name, p in named.items() if f".{adapters.ADAPTER}." in name}
    assert trained


# -- value heads -----------------------------------------------------------------------------------------------------


def learn_with_critics(trainer: OnlineTrainer) -> None:
    """A toy loop with one value head per objective, as a method with critics would write it: advantages from the
    heads for the policy, squared error to the reward for the heads."""
    for rollout in trainer.rollouts():
        z = torch.as_tensor(rollout.z, dtype=torch.float32)
        for part in trainer.parts(np.arange(len(rollout.responses)), tensors={"z": z}):
            assert part.values is not None
            assert part.values.shape == (*part.response_mask.shape, 2)
            mask, wanted = part.response_mask, part.tensors["z"][:, None, :]
            error = (part.values - wanted)[mask].square().mean()
            advantage = (wanted - part.values.detach()).sum(-1)
            policy = -((part.logps - part.old_logps).exp() * advantage)[mask].mean()
            trainer.backward(policy + error, {"value_error": float(error.detach())})
        trainer.step()


CRITIC = ("batch=4", "samples=2", "steps=6", "lr=0.01", "log_every=1", "checkpoint_every=2", "micro_batch=6")


def with_critics(job: Job) -> dict[str, torch.Tensor]:
    """Train; returns the value heads as the run keeps them."""
    learn_with_critics(trainer_of(job, phase="critic", style="fraction", value_heads=2))
    return job.run.load_tensors("value_heads-critic")


@pytest.mark.slow
def test_value_heads_are_trained_along(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", *CRITIC)
    start = weights(job)
    heads = with_critics(job)
    assert heads["linear.weight"].shape == (2, job.task.language_model.model.config.hidden_size)
    assert float(heads["linear.weight"].abs().max()) > 0.01  # they start at 0
    assert farthest(weights(job), start) > 0.01
    assert [line["phase"] for line in job.run.metrics()] == ["critic"] * 6
    assert all("value_error" in line for line in job.run.metrics())


@pytest.mark.slow
def test_value_heads_are_kept_in_checkpoints_and_restored(
    make_job: MakeJob, assert_same: Same, stop: Callable[..., Any], interrupted: type[Exception]
) -> None:
    whole = make_job("mo-odpo", *CRITIC, where="whole")
    wanted = with_critics(whole)
    progress = stop("critic", 5)
    with pytest.raises(interrupted):
        with_critics(make_job("mo-odpo", *CRITIC, progress=progress))
    job = make_job("mo-odpo", *CRITIC, progress=progress)
    found = with_critics(job)
    assert progress.seen[5:] == [("critic", 5), ("critic", 6)]  # it went on from the checkpoint of step 4
    assert_same(found, wanted)
    assert_same(weights(job), weights(whole))


# -- resume and log -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(("policy.lora.dropout=0.2",), id="dropout"),
        pytest.param(("ref_sync_steps=2",), id="moving reference", marks=pytest.mark.slow),
        pytest.param(("epochs=2", "schedule=cosine", "warmup=2"), id="two epochs, schedule", marks=pytest.mark.slow),
    ],
)
def test_a_resume_goes_on_bit_for_bit(
    make_job: MakeJob,
    assert_same: Same,
    stop: Callable[..., Any],
    interrupted: type[Exception],
    changes: tuple[str, ...],
) -> None:
    settings = ("batch=4", "steps=6", "lr=0.01", "log_every=1", "checkpoint_every=3", *changes)
    whole = make_job("mo-odpo", *settings, where="whole")
    train(whole)
    progress = stop("online", 5)
    with pytest.raises(interrupted):
        train(make_job("mo-odpo", *settings, progress=progress))
    job = make_job("mo-odpo", *settings, progress=progress)
    train(job)
    assert_same(weights(job), weights(whole))
    assert job.notes == whole.notes
    assert [line["step"] for line in job.run.metrics()] == [1, 2, 3, 4, 5, 6]
    measured = ("loss", "kl", "utility", "grad_norm", "tokens_trained", "reward_calls")
    for found, wanted in zip(job.run.metrics(), whole.run.metrics(), strict=True):
        assert {key: found.get(key) for key in measured} == {key: wanted.get(key) for key in measured}


def test_what_every_step_logs(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=6", "steps=5", "log_every=2", "checkpoint_every=1")
    train(job)
    lines = job.run.metrics()
    assert [line["step"] for line in lines] == [2, 4, 5]
    wanted = {
        "kl",
        "length",
        "unfinished",
        "utility",
        "loss",
        "accuracy",
        "entropy",
        "dropped",
        "dropped_share",
        "grad_norm",
    }
    wanted |= {f"reward/{name}" for name in job.task.names}
    wanted |= {"tokens_generated", "tokens_trained", "reward_calls"}
    assert all(wanted <= set(line) for line in lines)
    maybe = {f"entropy/{name}" for name in job.task.names}  # of those that a preference weighs most
    assert all(set(line) - wanted <= {"step", "phase", "peak_memory_bytes", *maybe} for line in lines)
    assert all(0 <= line["unfinished"] <= 1 and 1 <= line["length"] <= 12 and line["entropy"] > 0 for line in lines)
    assert lines[-1]["reward_calls"] == 5 * 6 * 2 * 2  # steps x prompts x samples x objectives
    assert lines[-1]["tokens_generated"] <= 5 * 12 * 12
    assert lines[-1]["tokens_trained"] > lines[-1]["tokens_generated"] / 2


def test_a_line_has_what_the_loop_says_by_name_whatever_the_order(make_job: MakeJob) -> None:
    """Parts of 2, 2 and 1 rows: a metric of 0, 1 and 4 is .4 * 0 + .4 * 1 + .2 * 4 = 1.2. Of two updates the last."""
    lines = []
    for where, order in (("a", 1), ("b", -1)):
        job = make_job("mo-odpo", "batch=5", "samples=2", "steps=1", "micro_batch=2", "log_every=1", where=where)
        trainer = trainer_of(job)
        for _ in trainer.rollouts():
            for update in (1.0, 2.0):
                for index, part in enumerate(trainer.parts(np.array([0, 2, 4, 6, 8]), tensors={})):
                    told = {"squared": float(index**2), "update": update}
                    trainer.backward(0 * part.logps.sum() + index, dict(list(told.items())[::order]))
                trainer.step(dict([("mine", 10 * update), ("other", 1.0)][::order]))
        lines += job.run.metrics()
    left, right = ({key: value for key, value in line.items() if key != "peak_memory_bytes"} for line in lines)
    assert left == right
    assert (left["squared"], left["loss"]) == (pytest.approx(1.2), pytest.approx(0.8))
    assert (left["update"], left["mine"], left["other"], left["grad_norm"]) == (2.0, 20.0, 1.0, 0.0)


@pytest.mark.slow
def test_a_rollout_is_fixed_by_seed_and_step(make_job: MakeJob) -> None:
    def drawn(where: str, step: int, **changes: Any) -> Rollout:
        job = make_job("mo-odpo", *FEW, where=where, **changes)
        torch.rand(len(where))  # what ran before must not matter
        return trainer_of(job).sample(step)

    first, again, later = drawn("a", 0), drawn("other", 0), drawn("a", 1)
    other = drawn("a", 0, seed=5)
    assert first.responses == again.responses
    assert np.array_equal(first.preferences, again.preferences)
    assert np.array_equal(first.raw, again.raw)
    assert first.prompts != later.prompts
    assert first.prompts != other.prompts
    assert len(set(first.prompts)) == 4
    assert set(first.prompts) <= set(make_job("mo-odpo").task.prompts["train"])


def test_reference_log_probabilities_are_computed_when_asked_for_and_once(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", *FEW, "samples=4")
    rollout = trainer_of(job).sample(0)
    asked: list[list[int]] = []
    score = rollout.score_reference
    rollout.score_reference = lambda rows: (asked.append(rows.tolist()), score(rows))[1]
    few = rollout.ref_logps(torch.tensor([5, 2]))
    more = rollout.ref_logps(torch.tensor([2, 7, 5]))
    assert asked == [[5, 2], [7]]
    assert torch.equal(few[1], more[0])
    assert torch.equal(few[0], more[2])
    whole = score(torch.arange(16))
    torch.testing.assert_close(more, whole[[2, 7, 5]], rtol=0.0, atol=1e-5)

"""``share_prompts`` and ``group_by_length``: less work for the same training, online and on fixed pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.lm import adapters, shared_prompts
from moalign.lm.trainers import quiet_libraries
from moalign.methods import mo_odpo
from moalign.methods.pcm import Config as PcmConfig
from moalign.training.callbacks import order, trainable, trainer_settings
from moalign.training.job import Job
from moalign.training.offline_dpo import Batches, Margin, PairRows, PairTrainer, by_length, encode_pairs, train_dpo
from moalign.training.online import OnlineTrainer, PpoTrainer
from moalign.training.preference_draws import independent
from moalign.training.reference import pad_around, pad_rows
from moalign.training.settings import DpoStage

MakeJob = Callable[..., Job]
Same = Callable[..., None]
PLAIN, SHARED = (), ("share_prompts=true",)
BOTH = ("share_prompts=true", "group_by_length=true")


def moved(job: Job) -> Job:
    """Move the adapter off the base: B starts at zero."""
    generator = torch.Generator().manual_seed(1)
    start = adapters.tensors(job.task.language_model)
    shaken = {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in start.items()}
    adapters.set_tensors(job.task.language_model, shaken)
    return job


def gradients(job: Job) -> dict[str, torch.Tensor]:
    named = job.task.language_model.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Entry by entry to 1e-4 of the largest."""
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(value.abs().max()) for value in wanted.values())
    assert largest > 1e-3
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-4 * largest


def draw_of(job: Job) -> Any:
    return independent(None, len(job.task.names), 1.0)


# -- online ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [SHARED, (*BOTH, "micro_batch=6"), ("group_by_length=true", "micro_batch=4")])
@pytest.mark.parametrize("reference", ["base", "start"])
def test_the_gradient_of_online_pairs_is_the_same(make_job: MakeJob, changes: tuple[str, ...], reference: str) -> None:
    found = []
    for where, more in (("a", PLAIN), ("b", changes)):
        job = moved(make_job("mo-odpo", "batch=7", "temperature=0.7", f"reference={reference}", *more, where=where))
        trainer = OnlineTrainer(job, job.task.language_model, job.config, draw_of(job))
        rollouts = trainer.rollouts()  # its reference goes when it does
        pairs = mo_odpo.paired(next(rollouts), job.config, 0.1)
        if reference == "start":
            moved(job)  # else policy and reference agree
        for part in trainer.parts(pairs.rows, group=2, tensors=pairs.tensors):
            loss, metrics = mo_odpo.loss(part, job.config, job.task.names, 0.1)
            trainer.backward(loss, metrics)
        found.append((trainer._means.taken(())["loss"], gradients(job)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert_close(found[1][1], found[0][1])


@pytest.mark.parametrize("changes", [SHARED, (*BOTH, "micro_batch=5")])
def test_the_gradient_of_ppo_with_four_answers_a_prompt_is_the_same(
    make_job: MakeJob, changes: tuple[str, ...]
) -> None:
    """Value heads included, which read the states that predict the tokens."""
    found = []
    for where, more in (("a", PLAIN), ("b", changes)):
        job = moved(make_job("moc", "batch=3", "groups=3", "samples=4", "kl_coef=0.1", *more, where=where))
        trainer = PpoTrainer(job, job.task.language_model, job.config, draw_of(job), ["one", "two"])
        assert trainer.value_heads is not None
        torch.nn.init.constant_(trainer.value_heads.linear.weight, 0.3)
        experience = trainer.experience(next(trainer.rollouts()).z)
        trainer.step = lambda metrics=None: None  # type: ignore[method-assign]
        trainer.update(experience, experience.advantages[..., 0])
        heads = {name: value.grad.clone() for name, value in trainer.value_heads.named_parameters()}  # type: ignore[union-attr]
        found.append((trainer._means.taken(()), gradients(job), heads))
    for name, value in found[0][0].items():
        assert found[1][0][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for found_here, wanted in zip(found[1][1:], found[0][1:], strict=True):
        assert_close(found_here, wanted)


def test_a_prompt_passes_once_for_policy_and_reference(make_job: MakeJob) -> None:
    job = moved(make_job("mo-odpo", "batch=4", *SHARED))
    lm = job.task.language_model
    trainer = OnlineTrainer(job, lm, job.config, draw_of(job))
    rollout, seen = next(trainer.rollouts()), []
    before = rollout.samples.input_ids.shape[1] - rollout.samples.response_mask.shape[1]
    lm.model.get_input_embeddings().register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    list(trainer.parts(np.arange(8), group=2, tensors={}))
    assert seen == [(4, before), (8, rollout.samples.response_mask.shape[1] - 1)] * 2


def test_groups_come_by_length_and_rows_of_a_prompt_stay_together(make_job: MakeJob) -> None:
    job = make_job("moc", "batch=3", "groups=1", "samples=2", "group_by_length=true", "micro_batch=2")
    trainer = OnlineTrainer(job, job.task.language_model, job.config, draw_of(job))
    rollout = next(trainer.rollouts())
    rollout.samples.attention_mask = (torch.arange(9) < torch.tensor([4, 9, 1, 2, 6, 6])[:, None]).long()
    assert rollout.by_length(np.arange(6)[:, None]).tolist() == [2, 3, 4, 5, 0, 1]
    assert rollout.by_length(np.array([[0, 1], [2, 3], [4, 5]])).tolist() == [1, 2, 0]
    assert rollout.by_length(np.array([[0], [4], [3]])).tolist() == [2, 0, 1]  # row 1 is not trained on


SMALL = ("batch=4", "steps=4", "lr=0.001", "log_every=1", "checkpoint_every=2", "micro_batch=4")


@pytest.mark.parametrize(
    "method",
    ["mo-odpo", pytest.param("moc", marks=pytest.mark.slow), pytest.param("hindsight", marks=pytest.mark.slow)],
)
def test_a_whole_training_ends_where_the_plain_one_does_and_a_resume_bit_for_bit(
    make_job: MakeJob, assert_same: Same, stop: Callable[..., Any], interrupted: type[Exception], method: str
) -> None:
    own = {"moc": ("groups=2", "samples=2"), "hindsight": ("distil={steps: 0}",)}.get(method, ())

    def train(where: str, *more: str, **changes: Any) -> Job:
        job = make_job(method, *SMALL, *own, *more, where=where, **changes)
        if method == "moc":
            trainer = PpoTrainer(job, job.task.language_model, job.config, draw_of(job), ["one", "two"])
            for _ in trainer.rollouts():
                experience = trainer.experience(trainer._rollout.z)  # type: ignore[union-attr]
                trainer.update(experience, experience.advantages[..., 0])
        else:
            mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)
        return job

    plain, whole = train("plain"), train("whole", *BOTH)
    found, wanted = (adapters.tensors(job.task.language_model) for job in (whole, plain))
    assert_same(found, wanted, rtol=0.0, atol=1e-3)
    assert max(float(value.abs().max()) for name, value in wanted.items() if "lora_B" in name) > 2e-3
    for here, there in zip(whole.run.metrics(), plain.run.metrics(), strict=True):
        assert here["tokens_trained"] == there["tokens_trained"]
        assert here.get("loss", 0.0) == pytest.approx(there.get("loss", 0.0), abs=1e-3)
    progress = stop("online", 3)
    with pytest.raises(interrupted):
        train("cut", *BOTH, progress=progress)
    assert_same(adapters.tensors(train("cut", *BOTH, progress=progress).task.language_model), found)


# -- fixed pairs -------------------------------------------------------------------------------------------------------

TEXTS = ["how do i make soup today ?", "tell me how to plant roses on my own .", "any tips ?", "i want to"]
CHOSEN = ["sure thing , use a hot pan", "well ,", "take it slowly stay safe .", "good luck ."]
REJECTED = ["i am not sure", "careful now , use a wide brush and eat cake .", "well , good luck .", "sure thing ,"]
MARGIN = Margin(np.array([[0.5, -1.0], [-2.0, 0.3], [0.0, 0.0], [1.5, 0.7]]), [0.3, 0.2], 0.5)


def stage(**changes: Any) -> DpoStage:
    few: dict[str, Any] = {"steps": 4, "batch": 4, "lr": 1e-3, "log_every": 1, "checkpoint_every": 2, "max_tokens": 64}
    return DpoStage(**{**few, **changes})


def rows_of(job: Job) -> PairRows:
    chosen = [Response(text, finished=number != 1) for number, text in enumerate(CHOSEN)]
    return encode_pairs(job, job.task.language_model, TEXTS, chosen, REJECTED, 64)


def test_rows_are_padded_around_their_responses() -> None:
    padded = pad_around([([1, 5, 6, 7], 2), ([1, 8], 1), ([1, 5, 9, 9, 9], 3)], pad=0)
    assert padded["input_ids"].tolist() == [[1, 5, 6, 7, 0], [0, 1, 8, 0, 0], [1, 5, 9, 9, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert padded["completion_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_loss_metrics_and_gradient_of_fixed_pairs_are_the_same(make_job: MakeJob) -> None:
    found = []
    for where, share in (("a", False), ("b", True)):
        job = moved(make_job("sft", where=where))
        lm, config = job.task.language_model, stage(share_prompts=share, sft_coef=0.3)
        with quiet_libraries(), trainable(lm):
            batches = Batches(rows_of(job), MARGIN, np.arange(4), np.ones(4), lm.pad, pad_around if share else pad_rows)
            options = trainer_settings(job, lm, config, 1, "here")
            trainer = PairTrainer(config, batches, 0, options, model=lm.model, processing_class=lm.tokenizer)
            loss = trainer.compute_loss(trainer.model, batches([{"place": place} for place in range(4)]))
            loss.backward()
        found.append((float(loss.detach()), trainer.mean_metrics(), gradients(job)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-5)
    assert_close(found[1][2], found[0][2])


def test_a_batch_is_ordered_by_length_and_keeps_its_pairs_and_weights(make_job: MakeJob) -> None:
    rows = rows_of(make_job("sft"))
    lengths = [max(len(rows.chosen[at][0]), len(rows.rejected[at][0])) for at in range(4)]
    places, weights = np.array([1, 0, 3, 2, 2, 1]), np.array([10.0, 0.0, 30.0, 20.0, 21.0, 11.0])
    found, along = by_length(rows, places, weights, 3)
    for step in (slice(0, 3), slice(3, 6)):
        assert sorted(found[step]) == sorted(places[step])
        assert [lengths[at] for at in found[step]] == sorted(lengths[at] for at in found[step])
    assert (along // 10 == found).all() and sorted(along) == sorted(weights)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"share_prompts": True}, {"group_by_length": True, "accumulate": 2}])
def test_a_stage_ends_where_the_plain_one_does_and_a_resume_bit_for_bit(
    make_job: MakeJob,
    assert_same: Same,
    stop: Callable[..., Any],
    interrupted: type[Exception],
    changes: dict[str, Any],
) -> None:
    def train(where: str, *, progress: Any = None, **changes: Any) -> Job:
        job = make_job("sft", where=where, **({} if progress is None else {"progress": progress}))
        config = stage(**changes)
        places = order(4, config.steps, config.batch, 3)
        weights = np.linspace(0.5, 1.5, len(places))
        train_dpo(job, job.task.language_model, rows_of(job), config, "here", MARGIN, places, weights)
        return job

    both = {"share_prompts": True, "group_by_length": True, **changes}
    plain, whole = train("plain"), train("whole", **both)
    found, wanted = (adapters.tensors(job.task.language_model) for job in (whole, plain))
    assert_same(found, wanted, rtol=0.0, atol=1e-3)
    assert max(float(value.abs().max()) for name, value in wanted.items() if "lora_B" in name) > 2e-3
    for here, there in zip(whole.run.metrics(), plain.run.metrics(), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], abs=1e-3)
        assert here["tokens_trained"] == there["tokens_trained"]
    progress = stop("here", 3)
    with pytest.raises(interrupted):
        train("cut", progress=progress, **both)
    assert_same(adapters.tensors(train("cut", progress=progress, **both).task.language_model), found)


# -- what cannot share -------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_is_refused_before_anything_is_trained(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("mo-odpo", *SHARED)
    lm, rows = job.task.language_model, rows_of(job)
    config = MambaConfig(vocab_size=len(lm.tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    monkeypatch.setattr(lm, "model", MambaForCausalLM(config))
    for begin in (
        lambda: OnlineTrainer(job, lm, job.config, draw_of(job)),
        lambda: train_dpo(job, lm, rows, stage(share_prompts=True), "here"),
    ):
        with pytest.raises(RequestError, match=r"share_prompts: .* cannot be continued by several responses"):
            begin()
    assert job.run.metrics() == []
    monkeypatch.setattr(shared_prompts, "require", lambda lm: pytest.fail("asked without need"))
    OnlineTrainer(make_job("mo-odpo", where="b"), lm, make_job("mo-odpo", where="b").config, draw_of(job))


def test_experts_that_are_mixed_have_prompts_of_their_own() -> None:
    with pytest.raises(ValueError, match="share_prompts"):
        PcmConfig.model_validate({"share_prompts": True})
    assert PcmConfig.model_validate({"experts": {"share_prompts": True}}).experts.share_prompts

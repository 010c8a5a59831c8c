"""Settings that save memory change nothing else: gradient checkpointing, sampling in parts, lean log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer
from trl.trainer.utils import add_fused_lm_head

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, marked
from moalign.lm.language_model import LanguageModel
from moalign.lm.log_probs import token_outputs
from moalign.lm.sample_parts import in_parts
from moalign.lm.sampler import Samples, sample, uniforms
from moalign.lm.trainers import checkpointed
from moalign.methods import mo_odpo
from moalign.training.actor import AdapterActor
from moalign.training.dropout import without_dropout
from moalign.training.job import Job
from moalign.training.offline_dpo import encode_pairs, train_dpo
from moalign.training.settings import DpoStage, SftConfig
from moalign.training.sft import train_sft

MakeJob = Callable[..., Job]
Same = Callable[..., None]
TEXTS = ["how do i make soup today ?", "tell me how to plant roses on my own .", "any tips ?", "i want to"]
CHOSEN = ["sure thing , use a hot pan", "well ,", "take it slowly stay safe .", "good luck ."]
REJECTED = ["i am not sure", "careful now , use a wide brush and eat cake .", "well , good luck .", "sure thing ,"]
STAGE = {"steps": 3, "batch": 4, "lr": 1e-2, "log_every": 1, "max_tokens": 64}
CHECKPOINTING = "policy.gradient_checkpointing=true"


def weights(job: Job) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapters.tensors(job.task.language_model).items()}


@pytest.fixture
def adapted(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    """A tiny model with an adapter that has moved."""
    lm = make_lm()
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, value in lm.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    return lm


def batch(lm: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(3, 30, (4, 10), generator=torch.Generator().manual_seed(0))
    mask, response = torch.ones_like(ids), torch.ones(4, 6, dtype=torch.bool)
    mask[0, :2] = 0
    mask[1, 8:], response[1, 4:] = 0, False
    return ids, mask, response


# -- gradient checkpointing ------------------------------------------------------------------------------------------


def test_checkpointed_layers_run_twice_and_give_the_same_loss_and_gradients(adapted: LanguageModel) -> None:
    calls: list[bool] = []
    layer = adapted.model.get_base_model().model.layers[0]
    layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module.training))

    def step(on: bool) -> tuple[Tensor, dict[str, Tensor]]:
        calls.clear()
        with checkpointed(adapted.model, on):
            without_dropout(adapted.model)
            logps = token_outputs(adapted.model, *batch(adapted)).logps
            (logps * torch.arange(6)).sum().backward()
        gradients = {name: p.grad for name, p in adapted.model.named_parameters() if p.grad is not None}
        adapted.model.zero_grad(set_to_none=True)
        return logps.detach(), gradients

    (plain, wanted), once = step(False), list(calls)
    (again, found), twice = step(True), list(calls)
    assert (once, twice) == ([False], [False, False])  # without dropout both times
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert found.keys() == wanted.keys() and len(wanted) >= 28
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    assert step(False)[0].equal(plain) and calls == [False], "off again behind the block"


def test_the_embeddings_need_no_gradient(adapted: LanguageModel) -> None:
    """As torch recomputes without re-entering autograd; the backward pass need not reach them."""
    seen = []
    adapted.model.get_input_embeddings().register_forward_hook(lambda *given: seen.append(given[2].requires_grad))
    with checkpointed(adapted.model, True):
        without_dropout(adapted.model)
        token_outputs(adapted.model, *batch(adapted)).logps.sum().backward()
    assert seen == [False]


def test_a_model_whose_layers_cannot_is_refused(adapted: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(adapted.model.get_base_model()), "supports_gradient_checkpointing", False)
    wrong = pytest.raises(RequestError, match=r"policy.gradient_checkpointing: LlamaForCausalLM does not support")
    with wrong, checkpointed(adapted.model, True):
        pass


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trains_the_same_with_it(make_job: MakeJob, assert_same: Same, kind: str) -> None:
    """With dropout in supervised training: the second pass drops the same numbers."""
    results = []
    for where, more in (("off", ()), ("on", (CHECKPOINTING,))):
        job = make_job("sft", *more, where=where, lora="policy.lora={r: 4, alpha: 8, dropout: 0.1}")
        lm = job.task.language_model
        assert lm.model.is_gradient_checkpointing is False
        if kind == "sft":
            train_sft(job, lm, TEXTS, CHOSEN, SftConfig(**STAGE), "here")
        else:
            train_dpo(job, lm, encode_pairs(job, lm, TEXTS, CHOSEN, REJECTED, 64), DpoStage(**STAGE), "here")
        assert not any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules())
        results.append((weights(job), [line["loss"] for line in job.run.metrics()]))
    assert_same(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-6)


def test_the_online_engine_trains_the_same_with_it_and_in_parts(make_job: MakeJob, assert_same: Same) -> None:
    results = {}
    settings = {"plain": (), "less memory": (CHECKPOINTING, "sample_batch=3")}
    for where, more in settings.items():
        job = make_job("mo-odpo", "batch=4", "steps=2", "lr=0.01", "micro_batch=4", *more, where=where)
        mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)
        results[where] = weights(job)
    assert_same(results["plain"], results["less memory"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_adapters_on_a_4_bit_base_keep_single_precision_under_trl(
    make_job: MakeJob, assert_same: Same, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """trl rounds what is trained on a base that transformers marks as quantised; a step of 5e-6 is then lost."""
    monkeypatch.setattr(Trainer, "floating_point_ops", lambda *_: 0)  # counts 4-bit parameters by bitsandbytes
    results, stage = {}, {**STAGE, "lr": 5e-6}
    for four in (False, True):
        job = make_job("sft", where=str(four))
        lm = job.task.language_model
        lm.model.get_base_model().is_loaded_in_4bit = four
        start = weights(job)
        if kind == "sft":
            train_sft(job, lm, TEXTS, CHOSEN, SftConfig(**stage), "here")
        else:
            train_dpo(job, lm, encode_pairs(job, lm, TEXTS, CHOSEN, REJECTED, 64), DpoStage(**stage), "here")
        assert {p.dtype for p in lm.model.parameters() if p.requires_grad} == {torch.float32}
        results[four] = weights(job)
        assert all((value != start[name]).any() for name, value in results[four].items())
    assert_same(results[True], results[False])


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra gpu)")
def test_a_run_on_a_4_bit_base_learns_and_is_of_a_task_of_its_own(make_job: MakeJob) -> None:
    few = ("batch=4", "steps=1", "lr=0.01")
    plain, job = make_job("mo-odpo", *few), make_job("mo-odpo", *few, "policy.load_in_4bit=true")
    assert job.task.hash != plain.task.hash and job.task.language_model.in_4bit
    before = weights(job)
    mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)
    assert any(not value.equal(before[name]) for name, value in weights(job).items())


# -- sampling in parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 11])
def test_parts_draw_the_same_responses(lm: LanguageModel, most: int) -> None:
    """Prompts of different lengths, three responses each; parts that divide prompts, and parts of several."""
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]
    numbers, sizes = uniforms(1, range(12), 9), []

    def draw(part: slice, rows: slice, repeat: int) -> Samples:
        sizes.append(len(prompts[part]) * repeat)
        return sample(lm, prompts[part], numbers[rows], repeat=repeat, hidden=True)

    whole, parts = in_parts(draw, 4, 3, None, lm.pad), in_parts(draw, 4, 3, most, lm.pad)
    assert sizes[0] == 12 and max(sizes[1:]) <= most and sum(sizes[1:]) == 12
    for name in ("input_ids", "attention_mask", "response_mask", "finished"):
        assert getattr(parts, name).equal(getattr(whole, name)), name
    torch.testing.assert_close(parts.logps, whole.logps, rtol=1e-4, atol=1e-5)
    assert parts.hidden is not None and whole.hidden is not None
    torch.testing.assert_close(parts.hidden, whole.hidden, rtol=1e-4, atol=1e-5)


def test_a_policy_samples_no_more_rows_at_once_than_it_is_set_to(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.training import actor

    job, sizes, real = make_job("mo-odpo", "batch=4", "sample_batch=3"), [], actor.sample

    def watched(lm: LanguageModel, prompts: Any, numbers: Tensor, *rest: Any, **more: Any) -> Samples:
        sizes.append(len(numbers))
        return real(lm, prompts, numbers, *rest, **more)

    monkeypatch.setattr(actor, "sample", watched)
    policy = AdapterActor(job, job.task.language_model, job.config, "percent")
    prompts = job.task.prompts["train"][:4]
    numbers = torch.rand(4 * job.config.samples, 6, generator=torch.Generator().manual_seed(0))
    preferences = torch.full((4, 2), 0.5).numpy()
    policy.sample(prompts, preferences, numbers, job.config.samples, hidden=False)
    assert sizes == [2, 2, 2, 2]


# -- log-probabilities for trl's trainers ----------------------------------------------------------------------------


def test_lean_log_probabilities_are_those_of_trl(adapted: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values to 1e-5 and gradients to 1e-4; rows padded on the right, one of them without a response."""
    ids = torch.randint(3, 30, (4, 10), generator=torch.Generator().manual_seed(0))
    mask, responses = torch.ones_like(ids), torch.zeros(4, 10, dtype=torch.bool)
    responses[0, 4:], responses[1, 6:8], responses[2, 3:] = True, True, True
    mask[1, 8:] = 0
    add_fused_lm_head(adapted.model.get_base_model())
    found = []
    for most in (2**23, 0):
        monkeypatch.setattr(marked, "AT_ONCE", most)
        logps = marked.log_probs(adapted.model, ids, mask, responses)
        (logps * torch.arange(9)).sum().backward()
        found.append((logps.detach(), [p.grad for p in adapted.model.parameters() if p.grad is not None]))
        adapted.model.zero_grad(set_to_none=True)
    (theirs, wanted), (ours, gradients) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[~responses[:, 1:]] == 0).all() and (ours != 0).sum() == 15
    assert len(gradients) == len(wanted) >= 28
    for own, other in zip(gradients, wanted, strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_supervised_training_is_the_same_with_them(
    make_job: MakeJob, assert_same: Same, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """With parts of unequal numbers of tokens: a step's loss is the mean over all of them."""
    results, calls, real = [], [], marked.token_outputs
    monkeypatch.setattr(marked, "token_outputs", lambda *given: calls.append(1) or real(*given))
    for most in (2**23, 0):
        monkeypatch.setattr(marked, "AT_ONCE", most)
        job = make_job("sft", where=str(most))
        config = SftConfig(**{**STAGE, "accumulate": accumulate})
        train_sft(job, job.task.language_model, TEXTS, CHOSEN, config, "here")
        results.append((weights(job), [line["loss"] for line in job.run.metrics()]))
    assert len(calls) == 3 * accumulate
    assert_same(results[0][0], results[1][0], rtol=1e-4, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)

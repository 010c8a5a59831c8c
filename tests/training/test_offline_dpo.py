"""Offline DPO: the loss that trl's trainer is given, that the trainer does what it is told, and the optimum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import adapters
from moalign.lm.language_model import LanguageModel
from moalign.lm.trainers import quiet_libraries
from moalign.losses.dpo import modpo_losses
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.base import z_scale
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs
from moalign.training import reference
from moalign.training.callbacks import order, trainable, trainer_settings
from moalign.training.dropout import without_dropout
from moalign.training.job import Job
from moalign.training.offline_dpo import (
    Batches,
    Margin,
    PairRows,
    PairTrainer,
    encode_pairs,
    even_order,
    train_dpo,
)
from moalign.training.settings import DpoStage, SftConfig
from moalign.training.sft import train_sft

MakeJob = Callable[..., Job]
TEXTS = ["how do i make soup today ?", "tell me how to plant roses on my own .", "any tips ?", "i want to"]
CHOSEN = ["sure thing , use a hot pan", "well ,", "take it slowly stay safe .", "good luck ."]
REJECTED = ["i am not sure", "careful now , use a wide brush and eat cake .", "well , good luck .", "sure thing ,"]
GAPS = np.array([[0.5, -1.0], [-2.0, 0.3], [0.0, 0.0], [1.5, 0.7]])
NO_MARGIN = Margin(np.zeros((4, 0)), [], 1.0)


def settings(**changes: Any) -> DpoStage:
    plain: dict[str, Any] = {"steps": 3, "batch": 3, "lr": 1e-2, "log_every": 1, "checkpoint_every": 100}
    return DpoStage(**{**plain, "max_tokens": 64, **changes})


@pytest.fixture
def job(make_job: MakeJob) -> Job:
    return make_job("sft")


def encoded(job: Job, **changes: Any) -> PairRows:
    return encode_pairs(job, job.task.language_model, TEXTS, CHOSEN, REJECTED, changes.pop("max_tokens", 64), **changes)


def weights(job: Job) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapters.tensors(job.task.language_model).items()}


def shake(job: Job) -> None:
    """Move the adapter off the base: B starts at zero, where policy and reference agree."""
    generator = torch.Generator().manual_seed(5)
    moved = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in weights(job).items()}
    adapters.set_tensors(job.task.language_model, moved)


# -- rows and reference ----------------------------------------------------------------------------------------------


def by_tokens(lm: LanguageModel, ids: list[int], length: int) -> float:
    """log pi of the last ``length`` tokens, one row at a time, nothing shared with what is tested."""
    with torch.no_grad():
        told = torch.log_softmax(lm.model(input_ids=torch.tensor([ids])).logits[0], -1)
    return float(sum(told[at - 1, ids[at]] for at in range(len(ids) - length, len(ids))))


def test_the_reference_is_the_base_whatever_the_adapter(job: Job) -> None:
    lm = job.task.language_model
    shake(job)
    rows = encoded(job)
    assert len(rows) == 4
    assert lm.decode([rows.chosen[0][0][-rows.chosen[0][1] :]]) == [CHOSEN[0]]
    lm.model = lm.model.unload()
    wanted = [[by_tokens(lm, *rows.chosen[i]), by_tokens(lm, *rows.rejected[i])] for i in range(4)]
    np.testing.assert_allclose(rows.reference, wanted, atol=1e-4)


def test_or_the_policy_as_it_is_now(job: Job) -> None:
    lm = job.task.language_model
    shake(job)
    rows = encoded(job, own_reference=True)
    lm.model.eval()
    wanted = [[by_tokens(lm, *rows.chosen[i]), by_tokens(lm, *rows.rejected[i])] for i in range(4)]
    np.testing.assert_allclose(rows.reference, wanted, atol=1e-4)
    assert abs(rows.reference - encoded(job).reference).max() > 0.1


def test_the_reference_is_asked_once_for_the_same_rows(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = reference._compute
    monkeypatch.setattr(
        reference, "_compute", lambda j, lm, rows, own: asked.append(len(rows)) or plain(j, lm, rows, own)
    )
    first = encoded(job)
    again = encoded(job)
    assert asked == [8]
    assert first.reference.tobytes() == again.reference.tobytes()
    encoded(job, max_tokens=9)  # cut rows are other rows
    assert len(asked) == 2
    assert len(list((job.task.folder / "reference").glob("*.safetensors"))) == 2


def test_a_response_that_several_pairs_share_is_scored_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = reference._compute
    monkeypatch.setattr(
        reference, "_compute", lambda j, lm, rows, own: asked.append(len(rows)) or plain(j, lm, rows, own)
    )
    lm = job.task.language_model
    rows = encode_pairs(job, lm, [TEXTS[0]] * 3, ["well ,", "well ,", "sure"], ["sure", "take it", "take it"], 64)
    assert asked == [3]
    assert rows.reference[0, 1] == rows.reference[2, 0]


def test_pairs_that_are_the_same_tokens_are_left_out(job: Job) -> None:
    lm = job.task.language_model
    rows = encode_pairs(job, lm, TEXTS[:3], ["well ,", *CHOSEN[1:3]], ["well  ,", *REJECTED[1:3]], 64, np.arange(3.0))
    assert rows.kept.tolist() == [1, 2]
    assert rows.chance.tolist() == [1.0, 2.0]
    with pytest.raises(RequestError, match="chosen and rejected are the same text in all 2 pairs"):
        encode_pairs(job, lm, TEXTS[:2], ["well ,"] * 2, ["well ,"] * 2, 64)
    with pytest.raises(RequestError, match="no pairs to train on"):
        encode_pairs(job, lm, [], [], [], 64)
    with pytest.raises(RequestError, match="pair 0: the chosen response has no tokens"):
        encode_pairs(job, lm, TEXTS[:1], [" "], ["well"], 64)
    with pytest.raises(RequestError, match="pair 1: the rejected response has no tokens"):
        encode_pairs(job, lm, TEXTS[:2], CHOSEN[:2], ["well", ""], 64)


def test_only_what_came_to_its_end_has_an_end_token(job: Job) -> None:
    lm = job.task.language_model
    cut = Response(REJECTED[1], finished=False)
    sampled = Response("other words", (*lm.tokenizer("well , use", add_special_tokens=False)["input_ids"], lm.eos))
    rows = encode_pairs(job, lm, TEXTS[:1], [sampled], [cut], 64)
    (chosen, first), (rejected, second) = rows.chosen[0], rows.rejected[0]
    assert chosen[:-first] == rejected[:-second] == lm.encode(TEXTS[:1])[0]
    assert chosen[-first:] == list(sampled.ids or ())
    assert lm.decode([rejected[-second:]]) == [REJECTED[1]]
    assert lm.eos not in rejected


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (GAPS[:, :1], r"found a matrix of shape \[4, 1\]; needed \[4, 2\]"),
        (GAPS[:3], r"found a matrix of shape \[3, 2\]; needed \[4, 2\]"),
        (np.where(GAPS == 0.7, np.nan, GAPS), "the margin of pair 3, column 1 is nan"),
    ],
)
def test_margins_that_do_not_fit(job: Job, values: np.ndarray, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        train_dpo(job, job.task.language_model, encoded(job), settings(), "here", Margin(values, [0.3, 0.2], 0.5))


# -- trl's trainer ---------------------------------------------------------------------------------------------------


class Opened:
    """A trainer that was made but not run, and one batch for it."""

    def __init__(self, job: Job, config: DpoStage, margin: Margin | None) -> None:
        lm = job.task.language_model
        rows = encoded(job)
        self.batches = Batches(rows, margin or NO_MARGIN, np.arange(3), np.ones(3), lm.pad)
        options = trainer_settings(job, lm, config, 1, "here")
        self.trainer = PairTrainer(config, self.batches, 0, options, model=lm.model, processing_class=lm.tokenizer)
        self.batch = self.batches([{"place": 0}, {"place": 1}, {"place": 2}])

    def own(self) -> torch.Tensor:
        return self.trainer.compute_loss(self.trainer.model, self.batch)

    def trl(self, beta: float, shift: float = 0.0) -> torch.Tensor:
        """The loss of the unchanged DPOTrainer on the same tokens and reference."""
        from trl import DPOTrainer

        assert DPOTrainer in type(self.trainer).__mro__
        self.trainer.beta, self.trainer.precompute_ref_logps = beta, True
        plain = {name: self.batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        plain["ref_chosen_logps"] = self.batch["ref_logps"][:, 0] + shift
        plain["ref_rejected_logps"] = self.batch["ref_logps"][:, 1]
        return DPOTrainer.compute_loss(self.trainer, self.trainer.model, plain)


@pytest.fixture
def opened(job: Job) -> Any:
    """``opened(config, margin)``; what the trainer did to the model is undone afterwards."""
    with quiet_libraries(), trainable(job.task.language_model):
        shake(job)
        yield lambda config, margin=None: Opened(job, config, margin)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
def test_without_margin_the_loss_is_trl_s_dpo_bit_for_bit(opened: Any, loss: str) -> None:
    """The guard of trl's hooks: our loss on our batches is what the unchanged trainer computes from them."""
    for margin in (None, Margin(GAPS, [0.0, 0.0], 1.0)):
        made = opened(settings(loss=loss, beta=0.2), margin)
        made.trainer.loss_types = [loss]
        found, wanted = made.own(), made.trl(0.2)
        assert found.requires_grad
        assert abs(float(found.detach()) - np.log(2)) > 1e-2
        assert torch.equal(found.detach(), wanted.detach())


def test_margins_are_trl_s_dpo_on_a_shifted_reference(opened: Any) -> None:
    """The same number by another way: beta / w_k, and the margin moved into the reference (all margins alike)."""
    gaps = np.tile([0.8, -0.4], (4, 1))
    made = opened(settings(beta=0.2), Margin(gaps, [0.3, 0.1], 0.6))
    wanted = made.trl(0.2 / 0.6, shift=(0.3 * 0.8 - 0.1 * 0.4) / 0.2)
    torch.testing.assert_close(made.own(), wanted, rtol=0.0, atol=1e-6)


def test_the_private_hook_that_we_override_is_still_the_one(job: Job) -> None:
    from trl import DPOTrainer

    assert list(inspect.signature(DPOTrainer._prepare_dataset).parameters)[:2] == ["self", "dataset"]
    told = inspect.signature(DPOTrainer.compute_loss).parameters
    assert list(told) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


def by_hand(job: Job, config: DpoStage, margin: Margin) -> dict[str, torch.Tensor]:
    """Train by a plain loop that shares nothing with the trainer, pair by pair."""
    lm = job.task.language_model
    rows = encoded(job, max_tokens=config.max_tokens)
    places = order(4, config.steps, config.batch, derive(job.seed, "here", "order"))
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)

    def log_prob(row: reference.Row) -> torch.Tensor:
        ids, length = torch.tensor([row[0]]), row[1]
        told = torch.log_softmax(lm.model(input_ids=ids).logits[0, :-1], -1)
        return told.gather(-1, ids[0, 1:, None])[-length:].sum()

    for step in range(config.steps):
        total = torch.zeros(())
        for at in places[step * config.batch : (step + 1) * config.batch].tolist():
            first, second = log_prob(rows.chosen[at]), log_prob(rows.rejected[at])
            gap = config.beta * (first - float(rows.reference[at, 0]) - second + float(rows.reference[at, 1]))
            z = (gap - float(margin.values[at] @ np.array(margin.weights))) / margin.share
            told = torch.log1p(torch.exp(-z)) if config.loss == "sigmoid" else torch.relu(1 - z)
            likely = [first / rows.chosen[at][1], second / rows.rejected[at][1]]
            kept = likely[0] if config.sft_on == "chosen" else (likely[0] + likely[1]) / 2
            total = total + told - config.sft_coef * kept
        optimizer.zero_grad()
        (total / config.batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor(config.schedule, step, config.steps, config.warmup)
        optimizer.step()
    return weights(job)


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"schedule": "linear", "warmup": 1, "weight_decay": 0.1, "clip": 0.5}, id="linear, warmup, clip"),
        slow({"batch": 4, "accumulate": 2, "loss": "hinge", "clip": 1e6}, id="two parts, hinge"),
        slow({"schedule": "constant", "max_tokens": 12, "sft_coef": 0.3}, id="cut rows, sft"),
        slow({"sft_coef": 0.3, "sft_on": "both"}, id="sft on both"),
    ],
)
def test_the_trainer_does_what_a_plain_loop_does(
    make_job: MakeJob, assert_same: Callable[..., None], changes: dict[str, Any]
) -> None:
    config, margin = settings(**changes), Margin(GAPS, [0.3, 0.2], 0.5)
    job = make_job("sft")
    start = weights(job)
    train_dpo(job, job.task.language_model, encoded(job, max_tokens=config.max_tokens), config, "here", margin)
    found = weights(job)
    assert max(float((found[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert_same(found, by_hand(make_job("sft", where="b"), config, margin), rtol=0.0, atol=1e-5)


def test_it_counts_logs_and_leaves_the_model_as_it_was(job: Job) -> None:
    lm, rows = job.task.language_model, encoded(job)
    told = train_dpo(job, lm, rows, settings(), "here", Margin(GAPS, [0.3, 0.2], 0.5))
    places = order(4, 3, 3, derive(job.seed, "here", "order"))
    tokens = [len(rows.chosen[at][0]) + len(rows.rejected[at][0]) for at in places]
    assert job.meter.tokens_trained == sum(tokens)
    lines = job.run.metrics()
    assert [(line["phase"], line["step"]) for line in lines] == [("here", 1), ("here", 2), ("here", 3)]
    margins = np.abs(GAPS @ [0.3, 0.2])
    assert lines[0]["margin"] == pytest.approx(margins[places[:3]].mean(), abs=1e-6)
    assert lines[0]["preference"] == pytest.approx(0.0, abs=1e-5)  # the policy starts as the base
    assert lines[2]["margin_ratio"] == pytest.approx(lines[2]["margin"] / lines[2]["preference"])
    assert told == {name: lines[2][name] for name in told}
    assert {"loss", "accuracy", "preference", "margin", "margin_ratio", "chosen_log_ratio"} == set(told)
    assert not lm.model.training
    for module in (lm.model, lm.model.get_base_model()):
        assert "forward" not in vars(module)  # trl's fused head is gone: the next trainer would wrap it again


def test_dropout_is_off_in_ratios_and_on_in_supervised_training(make_job: MakeJob) -> None:
    """From a reference that is the policy itself every pair of the first batch has margin 0."""
    job = make_job("sft", lora="policy.lora={r: 4, alpha: 8, dropout: 0.3}")
    lm = job.task.language_model
    shake(job)
    start = weights(job)
    modes: list[bool] = []
    dropout = next(m for m in lm.model.modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.3)
    dropout.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    train_dpo(job, lm, encoded(job, own_reference=True), settings(), "here")
    line = job.run.metrics()[0]
    assert line["preference"] == pytest.approx(0.0, abs=1e-5)
    assert line["chosen_log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert max(float((value - start[name]).abs().max()) for name, value in weights(job).items()) > 1e-3
    assert modes and not any(modes)
    modes.clear()
    train_sft(job, lm, TEXTS, CHOSEN, SftConfig(steps=1, batch=2), "then")
    assert dropout.p == 0.3
    assert all(modes)


def test_layers_that_compute_their_activations_again_still_do() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.arange(12).reshape(1, 12)

    def gradient() -> torch.Tensor:
        model.train()  # as a trainer does
        without_dropout(model)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    wanted, seen = gradient(), []
    model.gradient_checkpointing_enable()
    attention = model.model.layers[0].self_attn
    attention.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    torch.testing.assert_close(gradient(), wanted)
    assert seen == [False, False]  # once forward, once again for the gradient, without dropout both times


def test_no_steps_change_nothing(job: Job, assert_same: Callable[..., None]) -> None:
    before = weights(job)
    assert train_dpo(job, job.task.language_model, encoded(job), settings(steps=0), "here") == {}
    assert_same(weights(job), before)


@pytest.mark.slow
def test_an_interrupted_stage_ends_bit_for_bit_as_a_whole_one(
    make_job: MakeJob, stop: Callable[..., Any], interrupted: type[Exception], assert_same: Callable[..., None]
) -> None:
    config, margin = settings(steps=6, checkpoint_every=2, log_every=3), Margin(GAPS, [0.3, 0.2], 0.5)
    lora = "policy.lora={r: 4, alpha: 8, dropout: 0.1}"
    whole = make_job("sft", where="whole", lora=lora)
    train_dpo(whole, whole.task.language_model, encoded(whole), config, "here", margin)
    progress = stop("here", 5)
    job = make_job("sft", lora=lora, progress=progress)
    with pytest.raises(interrupted):
        train_dpo(job, job.task.language_model, encoded(job), config, "here", margin)
    again = make_job("sft", lora=lora, progress=progress)
    told = train_dpo(again, again.task.language_model, encoded(again), config, "here", margin)
    assert progress.seen[-2:] == [("here", 5), ("here", 6)]
    assert_same(weights(again), weights(whole))
    clocks = {"seconds", "peak_memory_bytes"}
    lines = [
        [{k: v for k, v in line.items() if k not in clocks} for line in one.run.metrics()] for one in (again, whole)
    ]
    assert lines[0] == lines[1]
    assert again.meter.tokens_trained == whole.meter.tokens_trained
    assert told


# -- weighted losses (dpo-lw) ----------------------------------------------------------------------------------------


def test_a_batch_holds_every_part_alike() -> None:
    places, counts = even_order([10, 3], steps=5, batch=5, seed=1)
    assert counts == [3, 2]
    batches = places.reshape(5, 5)
    assert ((batches[:, :3] < 10) & (batches[:, :3] >= 0)).all()
    assert ((batches[:, 3:] >= 10) & (batches[:, 3:] < 13)).all()
    assert sorted(batches[:, :3].reshape(-1)[:10]) == list(range(10))  # a pass over all rows before any repeats
    assert even_order([10], 4, 5, seed=1)[1] == [5]
    assert places.tolist() == even_order([10, 3], 5, 5, seed=1)[0].tolist()


def test_weights_make_the_weighted_sum_of_mean_losses(job: Job) -> None:
    rows = encoded(job)
    w, counts = (0.7, 0.3), [2, 1]
    each = np.repeat([w[k] * 3 / counts[k] for k in range(2)], counts)
    batch = Batches(rows, NO_MARGIN, np.array([0, 1, 3]), each, 0)([{"place": i} for i in range(3)])
    logps = -torch.rand(6, 20, generator=torch.Generator().manual_seed(0))
    per_pair = [batch[name] for name in ("ref_logps", "completion_mask", "margins", "chance", "weights")]
    found, _ = modpo_losses(logps, *per_pair, margin_weights=torch.zeros(0), share=1.0, beta=0.2)
    ratio = logps.sum(-1) - torch.tensor(rows.reference[[0, 1, 3]].T.reshape(-1))
    plain = torch.log1p(torch.exp(-0.2 * (ratio[:3] - ratio[3:])))
    assert found.mean().item() == pytest.approx(float(0.7 * plain[:2].mean() + 0.3 * plain[2]), abs=1e-6)


# -- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("w", "beta"), [((0.6, 0.4, 0.0), 0.5), ((1.0, 0.0, 0.0), 0.5), ((0.3, 0.2, 0.5), 0.3), ((0.05, 0.95, 0.0), 0.5)]
)
def test_the_closed_form_is_reached_on_the_enumerated_sandbox(w: tuple[float, ...], beta: float) -> None:
    """``pi_ref exp(w . r / beta) / Z`` over all 15,625 responses to a prompt, by the very loss that is trained.

    One free logit per response; labels follow r_k (Bradley-Terry) on random pairs; total variation within 2 %.
    """
    context = world.context_of(world.prompts()[7])
    mean, sd = z_scale()
    values = ((all_rewards(context) - mean) / sd)[:, :3]
    log_ref = corpus_log_probs(context)
    logits = log_ref + values @ np.array(w) / beta
    wanted = np.exp(logits - logits.max())
    wanted /= wanted.sum()
    k, others = 0, [1, 2]
    rng = np.random.default_rng(0)
    count = len(values)
    first, second = np.tile(np.arange(count), 12), np.concatenate([rng.permutation(count) for _ in range(12)])
    gap = values[first] - values[second]
    per_pair = (
        torch.tensor(np.stack([log_ref[first], log_ref[second]], axis=1)),
        torch.ones(2 * len(first), 1),
        torch.tensor(gap[:, others]),
        torch.tensor(1 / (1 + np.exp(-gap[:, k]))),
        torch.ones(len(first), dtype=torch.float64),
    )
    margin_weights = torch.tensor([w[j] for j in others], dtype=torch.float64)
    free = torch.tensor(log_ref, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=150, history_size=20, line_search_fn="strong_wolfe")

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        policy = torch.log_softmax(free, 0)
        logps = torch.cat([policy[first], policy[second]])[:, None]
        loss = modpo_losses(logps, *per_pair, margin_weights=margin_weights, share=w[k], beta=beta)[0].mean() * count
        loss.backward()
        return loss

    start = torch.softmax(free.detach(), 0).numpy()
    assert 0.5 * np.abs(start - wanted).sum() > 0.2
    optimizer.step(evaluate)
    found = torch.softmax(free.detach(), 0).numpy()
    assert 0.5 * np.abs(found - wanted).sum() < 0.02

"""Supervised training: what rows become, and that trl's trainer does exactly what it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm import adapters
from moalign.lm.language_model import LanguageModel
from moalign.lm.trainers import checkpointing_option, on_one_gpu
from moalign.training.callbacks import order
from moalign.training.job import Job
from moalign.training.settings import SftConfig
from moalign.training.sft import encode_rows, train_sft

MakeJob = Callable[..., Job]
TEXTS = [
    "how do i make soup today ?",
    "tell me how to plant roses on my own .",
    "any tips ?",
    "can you help me paint a wall ?",
    "i want to",
]
ANSWERS = [
    "sure thing , use a hot pan",
    "well ,",
    "take it slowly stay safe .",
    "good luck .",
    "careful now , use a wide brush and eat cake .",
]


def weights(job: Job) -> dict[str, torch.Tensor]:
    """A copy of the trained adapter's weights."""
    return {name: value.clone() for name, value in adapters.tensors(job.task.language_model).items()}


def settings(**changes: Any) -> SftConfig:
    plain: dict[str, Any] = {
        "steps": 3,
        "batch": 4,
        "lr": 1e-2,
        "log_every": 1,
        "checkpoint_every": 100,
        "max_tokens": 64,
    }
    return SftConfig(**{**plain, **changes})


@pytest.fixture
def lm(make_job: MakeJob) -> LanguageModel:
    model: LanguageModel = make_job("sft").task.language_model
    return model


# -- rows ----------------------------------------------------------------------------------------------------------


def test_only_the_response_and_its_end_token_are_learnt(lm: LanguageModel) -> None:
    inputs, labels = encode_rows(lm, TEXTS, ANSWERS, 64)
    for text, answer, row, told in zip(TEXTS, ANSWERS, inputs, labels, strict=True):
        head = lm.encode([text])[0]
        assert row[: len(head)] == head
        assert told[: len(head)] == [-100] * len(head)
        assert row[len(head) :] == told[len(head) :]
        assert row[-1] == lm.eos
        assert lm.decode([row[len(head) :]]) == [answer]


def test_a_row_too_long_loses_the_left_of_its_prompt(lm: LanguageModel) -> None:
    whole = encode_rows(lm, TEXTS[1:2], ANSWERS[:1], 64)
    inputs, labels = encode_rows(lm, TEXTS[1:2], ANSWERS[:1], 12)
    assert len(whole[0][0]) > 12
    assert inputs[0] == whole[0][0][:1] + whole[0][0][-11:]  # the begin token stays, as when sampling
    assert labels[0] == whole[1][0][:1] + whole[1][0][-11:]
    assert labels[0].count(-100) == 12 - len(ANSWERS[0].split()) - 1


def test_a_response_longer_than_a_row_is_cut_on_its_right_and_not_taught_to_end_there(lm: LanguageModel) -> None:
    inputs, labels = encode_rows(lm, TEXTS[1:2], ANSWERS[4:], 8)
    assert inputs[0][:2] == [lm.tokenizer.bos_token_id, lm.encode(TEXTS[1:2])[0][-1]]  # the prompt keeps its last token
    assert labels[0][:2] == [-100, -100]
    assert inputs[0][2:] == labels[0][2:]
    assert lm.decode([labels[0][2:]]) == [" ".join(ANSWERS[4].split()[:6])]
    assert len(inputs[0]) == 8
    assert lm.eos not in inputs[0]


def test_a_response_cut_at_the_samplers_limit_is_not_taught_to_end_there(lm: LanguageModel) -> None:
    cut = Response(ANSWERS[0], finished=False)
    sampled = Response("", tuple(lm.tokenizer(ANSWERS[0], add_special_tokens=False)["input_ids"]), finished=False)
    inputs, labels = encode_rows(lm, [TEXTS[0]] * 2 + TEXTS[1:2], [cut, sampled, ANSWERS[1]], 64)
    for row, told in zip(inputs[:2], labels[:2], strict=True):
        assert lm.eos not in row
        assert lm.decode([[token for token in told if token != -100]]) == [ANSWERS[0]]
    assert inputs[2][-1] == lm.eos  # another ended by itself


def test_what_ended_a_sample_is_learnt_as_it_was_sampled(lm: LanguageModel) -> None:
    ids = (*lm.tokenizer(ANSWERS[0], add_special_tokens=False)["input_ids"], lm.eos)
    inputs, labels = encode_rows(lm, TEXTS[:1], [Response("not these words", ids)], 64)
    head = lm.encode(TEXTS[:1])[0]
    assert inputs == [head + list(ids)]  # one end token, not two
    assert labels == [[-100] * len(head) + list(ids)]


def test_a_stop_text_ends_responses_of_a_model_that_never_learnt_its_end_token(make_job: MakeJob) -> None:
    job = make_job("sft", "task.template.stop=[' ?']", "task.template.end=' ?'")
    lm = job.task.language_model
    inputs, labels = encode_rows(lm, TEXTS, ANSWERS, 64)
    mark = lm.tokenizer("?", add_special_tokens=False)["input_ids"]
    for row, told, answer in zip(inputs, labels, ANSWERS, strict=True):
        assert row[-1:] == told[-1:] == mark
        assert lm.eos not in row
        assert lm.decode([row])[0].endswith(answer + " ?")


@pytest.mark.parametrize("nothing", ["", "   "])
def test_an_empty_response_is_an_error_and_not_a_row_that_teaches_nothing(lm: LanguageModel, nothing: str) -> None:
    with pytest.raises(RequestError, match="row 1: the response has no tokens"):
        encode_rows(lm, TEXTS[:2], [ANSWERS[0], nothing], 64)


def test_the_order_is_reshuffled_passes_over_all_rows() -> None:
    places = order(rows=10, steps=9, batch=3, seed=5)
    assert len(places) == 27
    first, second, third = places[:10], places[10:20], places[20:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert len(set(third.tolist())) == 7
    assert order(10, 9, 3, seed=5).tolist() == places.tolist()
    assert order(10, 9, 3, seed=6).tolist() != places.tolist()
    assert order(10, 3, 3, seed=5).tolist() == places[:9].tolist()


def test_without_rows_there_is_nothing_to_train(make_job: MakeJob) -> None:
    job = make_job("sft")
    with pytest.raises(RequestError, match="no rows to train on in stage here"):
        train_sft(job, job.task.language_model, [], [], settings(), "here")


def test_no_steps_change_nothing(make_job: MakeJob, assert_same: Callable[..., None]) -> None:
    job = make_job("sft")
    before = weights(job)
    train_sft(job, job.task.language_model, TEXTS, ANSWERS, settings(steps=0), "here")
    assert_same(weights(job), before)


def test_parts_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="multiple of accumulate"):
        settings(batch=4, accumulate=3)


# -- the trainer ---------------------------------------------------------------------------------------------------


def by_hand(job: Job, config: SftConfig) -> dict[str, torch.Tensor]:
    """Train by a plain loop that shares nothing with the trainer: mean loss over a batch's response tokens."""
    lm = job.task.language_model
    inputs, labels = encode_rows(lm, TEXTS, ANSWERS, config.max_tokens)
    places = order(len(inputs), config.steps, config.batch, derive(job.seed, "here", "order"))
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    lm.model.train()
    for step in range(config.steps):
        rows = places[step * config.batch : (step + 1) * config.batch]
        total, count = torch.zeros(()), 0
        for row in rows:
            ids, told = torch.tensor([inputs[row]]), torch.tensor(labels[row])
            log_probs = torch.log_softmax(lm.model(input_ids=ids).logits[0, :-1], -1)
            learnt = told[1:] != -100
            total = total - log_probs[learnt].gather(-1, told[1:][learnt].unsqueeze(-1)).sum()
            count += int(learnt.sum())
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * factor(config.schedule, step, config.steps, config.warmup)
        optimizer.step()
    lm.model.eval()
    return weights(job)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"schedule": "linear", "warmup": 1, "weight_decay": 0.1, "clip": 0.5}, id="linear, warmup, clip"),
        pytest.param({"schedule": "constant", "clip": 1e6, "accumulate": 2}, id="two parts"),
        pytest.param({"schedule": "cosine", "max_tokens": 12}, id="cosine, cut rows"),
    ],
)
def test_the_trainer_does_what_a_plain_loop_does(
    make_job: MakeJob, assert_same: Callable[..., None], changes: dict[str, Any]
) -> None:
    """The guard of trl's hooks: it fails when SFTTrainer no longer honours our labels (it would learn prompts), our
    order of rows (it would shuffle), our optimizer and schedule, the clip, or the mean over a batch's tokens."""
    config = settings(**changes)
    job = make_job("sft")
    start = weights(job)
    train_sft(job, job.task.language_model, TEXTS, ANSWERS, config, "here")
    found = weights(job)
    wanted = by_hand(make_job("sft", where="b"), config)
    assert max(float((found[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert_same(found, wanted, rtol=0.0, atol=1e-5)


@pytest.mark.slow
def test_the_guard_would_see_another_order_and_other_labels(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guard above tells apart does differ by more than its tolerance."""
    config = settings(schedule="constant")
    plain = by_hand(make_job("sft"), config)
    monkeypatch.setitem(globals(), "order", lambda rows, steps, batch, seed: np.arange(steps * batch) % rows)
    other = by_hand(make_job("sft", where="b"), config)
    assert max(float((plain[name] - other[name]).abs().max()) for name in plain) > 1e-4


@pytest.mark.slow
def test_two_parts_of_a_batch_are_the_whole_batch(make_job: MakeJob, assert_same: Callable[..., None]) -> None:
    found = []
    for where, parts in (("a", 1), ("b", 2), ("c", 4)):
        job = make_job("sft", where=where)
        train_sft(job, job.task.language_model, TEXTS, ANSWERS, settings(accumulate=parts), "here")
        found.append(weights(job))
    assert_same(found[0], found[1], rtol=0.0, atol=1e-5)
    assert_same(found[0], found[2], rtol=0.0, atol=1e-5)


def test_it_counts_logs_and_reports(make_job: MakeJob) -> None:
    told: list[tuple[str, int, int]] = []
    job = make_job("sft", progress=lambda *what: told.append(what))
    config = settings()
    train_sft(job, job.task.language_model, TEXTS, ANSWERS, config, "here")
    inputs, _ = encode_rows(job.task.language_model, TEXTS, ANSWERS, config.max_tokens)
    places = order(len(inputs), config.steps, config.batch, derive(job.seed, "here", "order"))
    assert job.meter.tokens_trained == sum(len(inputs[row]) for row in places)
    assert told == [("here", 1, 3), ("here", 2, 3), ("here", 3, 3)]
    lines = job.run.metrics()
    assert [(line["phase"], line["step"]) for line in lines] == [("here", 1), ("here", 2), ("here", 3)]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_the_log_is_the_same_after_a_resume(
    make_job: MakeJob, stop: Callable[..., Any], interrupted: type[Exception]
) -> None:
    """Checkpoints every 3 steps, a line every 2: a line is a mean since the last, so that checkpoints end one, too."""
    config = settings(steps=8, log_every=2, checkpoint_every=3)
    whole = make_job("sft", where="whole")
    train_sft(whole, whole.task.language_model, TEXTS, ANSWERS, config, "here")
    progress = stop("here", 5)
    job = make_job("sft", progress=progress)
    with pytest.raises(interrupted):
        train_sft(job, job.task.language_model, TEXTS, ANSWERS, config, "here")
    job = make_job("sft", progress=progress)
    train_sft(job, job.task.language_model, TEXTS, ANSWERS, config, "here")
    assert [line["step"] for line in job.run.metrics()] == [2, 3, 4, 6, 8]
    clocks = {"seconds", "peak_memory_bytes"}
    lines = [[{k: v for k, v in line.items() if k not in clocks} for line in one.run.metrics()] for one in (job, whole)]
    assert lines[0] == lines[1]


def test_a_checkpoint_is_never_ahead_of_the_log(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill right after a checkpoint loses no line: those up to its step are written by then."""
    from moalign.runs.run import Run

    job = make_job("sft")
    seen: dict[int, list[int]] = {}
    monkeypatch.setattr(
        Run,
        "save_checkpoint",
        lambda run, phase, step, *rest: seen.update({step: [line["step"] for line in run.metrics()]}),
    )
    config = settings(steps=7, log_every=2, checkpoint_every=3)
    train_sft(job, job.task.language_model, TEXTS, ANSWERS, config, "here")
    assert seen == {3: [2, 3], 6: [2, 3, 4, 6]}
    assert [line["step"] for line in job.run.metrics()] == [2, 3, 4, 6, 7]


def test_gradient_checkpointing_goes_by_the_name_that_the_installed_trainer_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    assert checkpointing_option() in transformers.TrainingArguments.__dataclass_fields__
    older = type("TrainingArguments", (), {"__dataclass_fields__": {"gradient_checkpointing": None}})
    monkeypatch.setattr(transformers, "TrainingArguments", older)
    assert checkpointing_option() == "gradient_checkpointing"


def test_a_batch_is_as_large_on_a_machine_with_several_gpus(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    options = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    options._n_gpu = 4  # what transformers finds there
    assert options.train_batch_size == 8
    assert on_one_gpu(options).train_batch_size == 2
    options._n_gpu = 0
    assert on_one_gpu(options).n_gpu == 0

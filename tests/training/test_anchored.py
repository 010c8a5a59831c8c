"""The trainer with anchors: its gradient is that of DPO's loss and the anchor's, however it accumulates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moalign.core.records import Response
from moalign.lm import adapters
from moalign.lm.trainers import quiet_libraries
from moalign.training.anchored import Anchored, AnchoredBatches, Anchors, encode_anchors
from moalign.training.callbacks import trainable, trainer_settings
from moalign.training.job import Job
from moalign.training.offline_dpo import Margin, PairRows, encode_pairs
from moalign.training.reference import pad_around, pad_rows
from moalign.training.settings import DpoStage

MakeJob = Callable[..., Job]
TEXTS = ["how do i make soup today ?", "any tips ?"]
GOOD, BAD = ["sure thing , use a hot pan", "well ,"], ["i am not sure", "take it slowly stay safe ."]
OWN = ["take it slowly", "stay safe .", "well , use a hot pan"]
WEIGHTS, BETA, ANCHOR = np.array([1.4, 0.6]), 0.2, 3.0


def shaken(job: Job) -> Job:
    """Move the adapter off the base, where B is zero and A has no gradient."""
    generator = torch.Generator().manual_seed(5)
    lm = job.task.language_model
    tensors = {name: v + 0.3 * torch.randn(v.shape, generator=generator) for name, v in adapters.tensors(lm).items()}
    adapters.set_tensors(lm, tensors)
    return job


def learned(job: Job) -> list[torch.nn.Parameter]:
    return [p for p in job.task.language_model.model.parameters() if p.requires_grad]


def wanted(job: Job, rows: PairRows, anchors: Anchors, at: list[int]) -> tuple[float, list[torch.Tensor]]:
    """The loss of one batch and its gradient from nothing but the model, one row at a time."""
    model = job.task.language_model.model

    def log_prob(row: tuple[list[int], int]) -> torch.Tensor:
        ids, length = row
        logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        return torch.stack([logps[i - 1, ids[i]] for i in range(len(ids) - length, len(ids))]).sum()

    total = torch.zeros(())
    for i in range(2):
        z = BETA * (
            (log_prob(rows.chosen[i]) - float(rows.reference[i, 0]))
            - (log_prob(rows.rejected[i]) - float(rows.reference[i, 1]))
        )
        lost = float(anchors.reference[at[i]]) - log_prob(anchors.rows[at[i]])
        total = total - WEIGHTS[i] * F.logsigmoid(z) + ANCHOR * lost.clamp_min(0) / anchors.rows[at[i]][1]
    return float(total.detach() / 2), list(torch.autograd.grad(total / 2, learned(job)))


@pytest.mark.parametrize(("accumulate", "share"), [(1, False), (2, False), (1, True)])
def test_its_gradient_is_that_of_pairs_and_anchors(make_job: MakeJob, accumulate: int, share: bool) -> None:
    job = shaken(make_job("sft"))
    lm = job.task.language_model
    few: dict[str, Any] = {"steps": 3, "batch": 2, "lr": 1e-2, "max_tokens": 64, "beta": BETA}
    config = DpoStage(**few, accumulate=accumulate, share_prompts=share)
    rows = encode_pairs(job, lm, TEXTS, GOOD, BAD, 64)
    anchors = encode_anchors(job, lm, [TEXTS[0], TEXTS[1], TEXTS[0]], [Response.of(text) for text in OWN], 64)
    places, weights = np.tile([0, 1], 3), np.tile(WEIGHTS, 3)
    with quiet_libraries(), trainable(lm):
        batches = AnchoredBatches(
            anchors, rows, Margin(np.zeros((2, 0)), [], 1.0), places, weights, lm.pad, pad_around if share else pad_rows
        )
        options = trainer_settings(job, lm, config, 3, "here")
        made = Anchored(ANCHOR, "below", config, batches, 0, options, model=lm.model, processing_class=lm.tokenizer)
        value, size = 0.0, 2 // accumulate
        for part in range(accumulate):  # as the trainer does: the loss over the number of parts
            inputs = batches([{"place": place} for place in range(part * size, (part + 1) * size)])
            loss = made.compute_loss(made.model, inputs) / accumulate
            loss.backward()
            value += float(loss.detach())
    assert sorted(batches.anchor_places[:3]) == [0, 1, 2] == sorted(batches.anchor_places[3:])
    gradients = [p.grad.clone() for p in learned(job) if p.grad is not None]
    by_hand, direction = wanted(job, rows, anchors, batches.anchor_places[:2].tolist())
    assert made.mean_metrics()["anchor"] > 0  # else nothing is anchored
    assert value == pytest.approx(by_hand, rel=1e-5)
    for found, own in zip(gradients, direction, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-5)


def test_anchors_are_counted_and_empty_ones_left_out(make_job: MakeJob) -> None:
    job = make_job("sft")
    lm = job.task.language_model
    rows = encode_pairs(job, lm, TEXTS, GOOD, BAD, 64)
    texts, cut_short = [TEXTS[0]] * 2, Response("", (), False)
    anchors = encode_anchors(job, lm, texts, [Response.of(OWN[0]), cut_short], 64)
    assert len(anchors.rows) == len(anchors.reference) == 1
    batches = AnchoredBatches(
        anchors, rows, Margin(np.zeros((2, 0)), [], 1.0), np.array([1, 0]), np.ones(2), lm.pad, pad_rows
    )
    ids, _ = anchors.rows[0]
    assert batches.tokens() == [len(rows.chosen[i][0]) + len(rows.rejected[i][0]) + len(ids) for i in (1, 0)]
    batch = batches([{"place": 0}, {"place": 1}])
    assert batch["anchor_input_ids"].tolist() == [ids, ids]
    assert batch["anchor_logps"].tolist() == pytest.approx([float(anchors.reference[0])] * 2)

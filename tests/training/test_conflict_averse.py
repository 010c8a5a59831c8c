"""The trainer of conflict-averse steps: its gradient is the step that the method defines, however it accumulates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moalign.lm import adapters
from moalign.lm.trainers import quiet_libraries
from moalign.losses.cagrad import step_weights
from moalign.training.callbacks import trainable, trainer_settings
from moalign.training.conflict_averse import ConflictAverse, PerToken
from moalign.training.job import Job
from moalign.training.offline_dpo import Batches, Margin, PairRows, encode_pairs, joined, train_dpo
from moalign.training.reference import pad_rows
from moalign.training.settings import DpoStage

MakeJob = Callable[..., Job]
TEXTS = ["how do i make soup today ?", "any tips ?"]
ANSWERS = ["sure thing , use a hot pan", "well ,"], ["i am not sure", "take it slowly stay safe ."]
W, C, BETA = (0.7, 0.3), 0.4, 0.2
EACH = np.array([0.7, 0.3, 0.7, 0.3]) * 4 / 2
"""Weights of the places of a batch of two pairs of each objective, as DPO-LW has them; parts hold one of each."""
ORDER = np.array([0, 2, 1, 3])


def rows_of(job: Job) -> PairRows:
    """The same two prompts; the second objective prefers the other answers, and is less sure of it."""
    lm, (good, bad) = job.task.language_model, ANSWERS
    first = encode_pairs(job, lm, TEXTS, good, bad, 64)
    other = encode_pairs(job, lm, TEXTS, bad, good, 64, np.array([0.9, 0.7]))
    return joined([first, other])


def settings(**changes: Any) -> DpoStage:
    few: dict[str, Any] = {"steps": 3, "batch": 4, "lr": 1e-2, "log_every": 1, "checkpoint_every": 2, "max_tokens": 64}
    return DpoStage(**{**few, "beta": BETA, **changes})


def shaken(job: Job) -> Job:
    """Move the adapter off the base, where B is zero and A has no gradient."""
    generator = torch.Generator().manual_seed(5)
    lm = job.task.language_model
    tensors = {name: v + 0.3 * torch.randn(v.shape, generator=generator) for name, v in adapters.tensors(lm).items()}
    adapters.set_tensors(lm, tensors)
    return job


def learned(job: Job) -> list[torch.nn.Parameter]:
    return [p for p in job.task.language_model.model.parameters() if p.requires_grad]


def wanted(job: Job, rows: PairRows) -> list[torch.Tensor]:
    """The step from nothing but the model: each objective's mean loss, one row at a time, and its gradient."""
    model = job.task.language_model.model

    def log_prob(row: tuple[list[int], int]) -> torch.Tensor:
        ids, length = row
        logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        return torch.stack([logps[at - 1, ids[at]] for at in range(len(ids) - length, len(ids))]).sum()

    gradients = []
    for part in (0, 1):
        losses = []
        for i in np.flatnonzero(rows.part == part):
            z = BETA * (
                (log_prob(rows.chosen[i]) - float(rows.reference[i, 0]))
                - (log_prob(rows.rejected[i]) - float(rows.reference[i, 1]))
            )
            chance = float(rows.chance[i])
            losses.append(-chance * F.logsigmoid(z) - (1 - chance) * F.logsigmoid(-z))
        gradients.append(torch.autograd.grad(torch.stack(losses).mean(), learned(job)))
    flat = torch.stack([torch.cat([g.reshape(-1) for g in gradient]) for gradient in gradients]).double()
    a, _ = step_weights((flat @ flat.T).numpy(), W, C)
    assert float(F.cosine_similarity(flat[0], flat[1], dim=0)) < 0  # else there is nothing to avert
    return [float(a[0]) * x + float(a[1]) * y for x, y in zip(*gradients, strict=True)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_gradient_is_the_conflict_averse_step_of_the_whole_batch(make_job: MakeJob, accumulate: int) -> None:
    job = shaken(make_job("sft"))
    lm, config = job.task.language_model, settings(accumulate=accumulate)
    rows = rows_of(job)
    step = wanted(job, rows)
    with quiet_libraries(), trainable(lm):
        batches = Batches(rows, Margin(np.zeros((4, 0)), [], 1.0), ORDER, EACH, lm.pad, pad_rows)
        options = trainer_settings(job, lm, config, 1, "here")
        made = ConflictAverse(W, ["a", "b"], C, config, batches, 0, options, lm.model, processing_class=lm.tokenizer)
        total, places = 0.0, [{"place": place} for place in range(4)]
        for part in range(accumulate):  # as the trainer does: the loss over the number of parts
            size = 4 // accumulate
            loss = made.compute_loss(made.model, batches(places[part * size : (part + 1) * size])) / accumulate
            loss.backward()
            total += float(loss.detach())
    metrics = made.mean_metrics()
    assert metrics["cosine"] < 0
    assert {"accuracy", "share/a", "share/b"} <= set(metrics)
    assert total == pytest.approx(plain_loss(job, rows), rel=1e-5)
    for parameter, direction in zip(learned(job), step, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, direction, rtol=1e-4, atol=1e-6)


def plain_loss(job: Job, rows: PairRows) -> float:
    """``sum_k w_k L_k`` of the log-probabilities as they are looked up elsewhere."""
    from moalign.training.reference import reference_log_probs

    own = reference_log_probs(job, job.task.language_model, [*rows.chosen, *rows.rejected], own=True)
    d = (own.reshape(2, -1).T - rows.reference) @ [1.0, -1.0]
    losses = rows.chance * np.log1p(np.exp(-BETA * d)) + (1 - rows.chance) * np.log1p(np.exp(BETA * d))
    return float(np.array(W) @ [losses[rows.part == part].mean() for part in (0, 1)])


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}])
def test_with_a_tiny_c_it_trains_as_the_plain_trainer(
    make_job: MakeJob, assert_same: Callable[..., None], changes: dict[str, int]
) -> None:
    found = []
    for where, trainer in (("a", None), ("b", partial(ConflictAverse, W, ["a", "b"], 1e-9))):
        job = shaken(make_job("sft", where=where))
        lm, config = job.task.language_model, settings(**changes)
        places, weights = np.tile(ORDER, 3), np.tile(EACH, 3)
        train_dpo(job, lm, rows_of(job), config, "here", places=places, weights=weights, trainer=trainer)
        found.append(({name: v.clone() for name, v in adapters.tensors(lm).items()}, job.run.metrics()))
    assert_same(found[0][0], found[1][0], rtol=0.0, atol=1e-4)
    for plain, averse in zip(found[0][1], found[1][1], strict=True):
        for name in ("loss", "grad_norm", "accuracy"):
            assert averse[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_it_averts_with_layers_that_are_computed_again(make_job: MakeJob, assert_same: Callable[..., None]) -> None:
    """Gradient checkpointing, which a GPU has: the same adapters, though each pass backward recomputes the layers."""
    found = []
    for where, on in (("a", False), ("b", True)):
        job = make_job("sft", where=where)
        job.policy_spec = job.policy_spec.model_copy(update={"gradient_checkpointing": on})
        shaken(job)
        lm, trainer = job.task.language_model, partial(ConflictAverse, W, ["a", "b"], C)
        places, weights = np.tile(ORDER, 3), np.tile(EACH, 3)
        train_dpo(job, lm, rows_of(job), settings(), "here", places=places, weights=weights, trainer=trainer)
        found.append({name: v.clone() for name, v in adapters.tensors(lm).items()})
    assert_same(found[0], found[1], rtol=0.0, atol=1e-5)


def test_amopo_compares_means_of_tokens_and_no_reference(make_job: MakeJob) -> None:
    """The loss of a batch is the one by hand, whatever the reference's log-probabilities are."""
    job = shaken(make_job("sft"))
    lm, config, rows = job.task.language_model, settings(), rows_of(job)
    losses = []
    for reference in (rows.reference, rows.reference - 3.0 * np.array([[1, 0]], dtype=np.float32)):
        moved = replace(rows, reference=reference)
        with quiet_libraries(), trainable(lm):
            batches = Batches(moved, Margin(np.zeros((4, 0)), [], 1.0), ORDER, EACH, lm.pad, pad_rows)
            options = trainer_settings(job, lm, config, 1, "here")
            made = PerToken(config, batches, 0, options, lm.model, processing_class=lm.tokenizer)
            losses.append(float(made.compute_loss(made.model, batches([{"place": i} for i in range(4)])).detach()))
    assert losses[0] == losses[1]
    from moalign.training.reference import reference_log_probs

    own = reference_log_probs(job, lm, [*rows.chosen, *rows.rejected], own=True)
    means = own.reshape(2, -1).T / np.array([[c[1], r[1]] for c, r in zip(rows.chosen, rows.rejected, strict=True)])
    z = BETA * (means @ [1.0, -1.0])
    each = rows.chance * np.log1p(np.exp(-z)) + (1 - rows.chance) * np.log1p(np.exp(z))
    assert losses[0] == pytest.approx(float(np.array(W) @ [each[rows.part == k].mean() for k in (0, 1)]), rel=1e-5)

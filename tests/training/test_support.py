"""Rewards of responses that nothing in the data resembles are not believed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moalign.lm.log_probs import token_outputs
from moalign.methods import mo_odpo
from moalign.training import support
from moalign.training.job import Job
from moalign.training.online import OnlineTrainer
from moalign.training.preference_draws import independent

MakeJob = Callable[..., Job]


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


def test_a_rollout_believes_no_reward_outside_and_logs_how_many_were(make_job: MakeJob) -> None:
    """With the end put at 0 every response is outside; with an end below all of them none is."""
    found = {}
    for end in (0.0, -1e9):
        job = make_job("mo-odpo", "batch=8", "steps=1", "support=0", "log_every=1", where=str(end))
        config = job.config
        trainer = OnlineTrainer(job, job.task.language_model, config, independent(None, 2, config.alpha))
        trainer.support.end = end
        rollout = next(trainer.rollouts())
        found[end] = rollout
        lower = job.panel.z_bounds()[:, 0]
        plain = job.panel.z(rollout.raw)
        expected = np.minimum(plain, lower) if end == 0 else plain
        assert rollout.z.tolist() == expected.tolist()
    assert (found[0.0].outside, found[-1e9].outside) == (1.0, 0.0)


def test_the_share_outside_is_in_the_log(make_job: MakeJob) -> None:
    job = make_job("mo-odpo", "batch=4", "steps=1", "support=0", "log_every=1")
    mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)
    assert 0 <= job.run.metrics()[0]["outside"] <= 1

"""Rollouts that vLLM draws, with a stand-in for it: the trainer takes its own log-probabilities, and corrects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.config.recipe import RolloutSpec
from moalign.lm import adapters
from moalign.lm.log_probs import token_outputs
from moalign.training.job import Job
from moalign.training.online import OnlineTrainer, PpoTrainer
from moalign.training.preference_draws import grouped, independent
from moalign.training.rollout import rollout_metrics

MakeJob = Callable[..., Job]
FEW = ("batch=6", "steps=3", "lr=0.01", "log_every=1", "warmup=0", "rollout.engine=vllm", "policy.lora.r=4")
LOGP = -6.0  # of every token, in vllm_stand_in.py


@pytest.fixture
def ppo(make_job: MakeJob, vllm: list[Any]) -> PpoTrainer:
    job = make_job("morlhf", *FEW, "groups=3", "temperature=0.7", "micro_batch=4")
    generator = torch.Generator().manual_seed(1)
    lm = job.task.language_model
    moved = {k: v + 0.2 * torch.randn(v.shape, generator=generator) for k, v in adapters.tensors(lm).items()}
    adapters.set_tensors(lm, moved)
    return PpoTrainer(job, lm, job.config, grouped(job.preferences, 3), ["utility"])


def test_a_rollout_has_the_trainers_log_probabilities_and_states(ppo: PpoTrainer) -> None:
    """And vLLM's beside them; value heads read the states of the same pass."""
    heads = ppo.value_heads
    assert heads is not None
    torch.nn.init.normal_(heads.linear.weight)
    rollout = ppo.sample(0)
    samples, lm = rollout.samples, ppo.lm
    with torch.no_grad():
        outputs = token_outputs(
            lm.model, samples.input_ids, samples.attention_mask, samples.response_mask, 0.7, hidden=True
        )
        assert outputs.hidden is not None and rollout.values is not None
        torch.testing.assert_close(samples.logps, outputs.logps, rtol=0, atol=1e-5)
        mask = samples.response_mask
        torch.testing.assert_close(rollout.values[mask], heads(outputs.hidden)[mask], rtol=0, atol=1e-5)
    assert rollout.drawn_logps is not None
    assert torch.equal(rollout.drawn_logps, torch.where(mask, LOGP, 0.0))
    assert ppo.job.meter.cost()["tokens_generated"] == samples.tokens


def test_the_mismatch_is_logged_and_the_weights_are_truncated(ppo: PpoTrainer) -> None:
    """pi / pi_drawn = exp(.5), exp(1), exp(-2): the second is cut at 2."""
    rollout = ppo.sample(0)
    mask = torch.zeros_like(rollout.samples.response_mask)
    mask[0, :2] = mask[1, 0] = True
    own = torch.zeros(mask.shape)
    own[0, 0], own[0, 1], own[1, 0] = LOGP + 0.5, LOGP + 1.0, LOGP - 2.0
    rollout.samples.response_mask, rollout.samples.logps = mask, own
    rollout.drawn_logps, rollout.correction = torch.where(mask, LOGP, 0.0), 2.0
    metrics = rollout_metrics(rollout, ppo.job.task.names)
    assert metrics["mismatch"] == pytest.approx(3.5 / 3) and metrics["mismatch_max"] == pytest.approx(2.0)
    weights = rollout.importance
    assert weights is not None
    assert weights[mask].tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-2.0)])
    assert weights[~mask].eq(1).all()
    rollout.drawn_logps = None
    assert rollout.importance is None and "mismatch" not in rollout_metrics(rollout, ppo.job.task.names)


@pytest.mark.parametrize(("correction", "most"), [("rollout.correction=1.5", 1.5), ("rollout.correction=null", None)])
def test_the_loss_of_ppo_is_weighted_by_them(
    make_job: MakeJob, vllm: list[Any], correction: str, most: float | None
) -> None:
    job = make_job("morlhf", *FEW, "groups=3", correction)
    trainer = PpoTrainer(job, job.task.language_model, job.config, grouped(job.preferences, 3), ["utility"])
    trainer._rollout = rollout = trainer.sample(0)
    experience = trainer.experience(np.ones((6, 1)))
    tensors = experience.tensors(experience.advantages[..., 0])
    if most is None:
        assert "importance" not in tensors
        return
    gap = rollout.samples.logps - LOGP
    expected = torch.where(rollout.samples.response_mask, gap.exp().clamp_max(most), 1.0)
    torch.testing.assert_close(tensors["importance"], expected)
    assert expected.max() == 1.5 > expected.min(), "some are cut"


def test_each_update_serves_a_new_state_and_a_step_draws_by_its_own_numbers(make_job: MakeJob, vllm: list[Any]) -> None:
    """What is drawn depends on seed and step alone, so that a resumed run draws it again."""
    from moalign.lm.adapters import read

    job = make_job("mo-odpo", *FEW)
    draw = independent(None, len(job.task.names), 1.0)
    trainer = OnlineTrainer(job, job.task.language_model, job.config, draw)
    states = []
    for rollout in trainer.rollouts():
        (folder,) = [path for path in Path(job.task.engine._folder.name).iterdir()]  # type: ignore[union-attr]
        states.append(read(trainer.lm, folder).weights)
        rows = np.arange(len(rollout.responses))
        for part in trainer.parts(rows, tensors={}):
            trainer.backward(-part.logps.sum(-1).mean())
        trainer.step()
    assert all((a[key] != b[key]).any() for a, b in itertools.pairwise(states) for key in a if "_B" in key)
    (llm,) = vllm
    seeds = [[request.how.seed for request in call] for call in llm.calls]
    assert len({seed for call in seeds for seed in call}) == 3 * 12, "two responses to each of six prompts"
    prompts = [request.prompt for request in llm.calls[0]]
    assert prompts[0::2] == prompts[1::2] and llm.removed == [1, 2]
    again = make_job("mo-odpo", *FEW, where="b")
    other = OnlineTrainer(again, again.task.language_model, again.config, draw)
    other.sample(2)
    assert [request.how.seed for request in vllm[1].calls[0]] == seeds[2]
    logged = job.run.metrics()
    assert [row["step"] for row in logged] == [1, 2, 3] and all(row["mismatch"] > 0 for row in logged)


def test_settings_of_vllm_need_it() -> None:
    assert RolloutSpec().engine == "hf"
    with pytest.raises(ValueError, match="needs engine: vllm; found correction with engine: hf"):
        RolloutSpec(correction=3.0)
    with pytest.raises(ValueError, match="correction"):
        RolloutSpec(engine="vllm", correction=0.5)
    assert RolloutSpec(engine="vllm", correction=None).correction is None

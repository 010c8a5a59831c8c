"""GRPO: whose answers are compared, what is whitened together, and what may be asked of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from moalign.cli.main import main
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.losses import grpo
from moalign.methods.grpo import Config, advantages_of, batch_tensors
from moalign.training.rollout import Rollout

FEW = ("steps=2", "batch=4", "samples=3", "groups=2", "log_every=1", "lr=0.01", "policy.lora={r: 4, alpha: 8}")


def rollout(preferences: list[list[float]], answers: int) -> Rollout:
    nothing: Any = None
    z = np.random.default_rng(4).normal(size=(len(preferences) * answers, 2))
    return Rollout(["x"] * len(preferences), np.array(preferences), answers, nothing, [], z, z, nothing)


def test_groups_are_the_answers_to_a_prompt_and_whitening_is_by_preference() -> None:
    """Row 3 i + j is answer j to prompt i. Prompts 0 and 2 are asked at (.5, .5), prompt 1 at (1, 0)."""
    made = rollout([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]], 3)
    found, metrics = advantages_of(made, Config(aggregation="gdpo"))
    z = grpo.standardised(made.z.reshape(3, 3, 2))
    even, corner = z.mean(axis=-1)[[0, 2]], z[1, :, 0]
    np.testing.assert_allclose(found[:3], even[0] / (even.std(ddof=1) + 1e-4))
    np.testing.assert_allclose(found[6:], even[1] / (even.std(ddof=1) + 1e-4))
    np.testing.assert_allclose(found[3:6], corner / (corner.std(ddof=1) + 1e-4))
    utility = [made.z[:3].mean(1), made.z[3:6, 0], made.z[6:].mean(1)]
    assert metrics["signal"] == pytest.approx(np.mean([values.std(ddof=1) for values in utility]))


def test_its_ways_to_aggregate_are_those_of_the_loss() -> None:
    assert get_args(Config.model_fields["aggregation"].annotation) == get_args(grpo.Aggregation)


@pytest.mark.parametrize("how", ["sum", "dvao"])
def test_what_its_source_does_not_whiten_is_left(how: grpo.Aggregation) -> None:
    made = rollout([[0.3, 0.7], [0.9, 0.1]], 4)
    wanted = grpo.aggregated(made.z.reshape(2, 4, 2), made.preferences, how)
    assert advantages_of(made, Config(aggregation=how))[0].tolist() == wanted.reshape(-1).tolist()


def test_it_trains_one_policy_that_reads_its_preference(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run, _ = train(plan(TrainRequest("grpo", overrides=(*small_task, *FEW, "beta=0.1"), results=tmp_path)))
    assert {"kl", "entropy", "clip_fraction", "signal"} == set(run.record.notes["diagnostics"])
    lines = list(run.metrics())
    assert len(lines) == 2
    assert lines[0]["clip_fraction"] == 0  # of one update, which begins where the answers were sampled
    assert lines[0]["k3"] == pytest.approx(0, abs=1e-4)  # the policy starts as the base
    assert lines[1]["k3"] > 0
    method, context = context_of(run, tmp_path)
    assert method.policy(context, (0.3, 0.7)).render("hi") == context.task.renderer.preference("hi", (0.3, 0.7))


@pytest.mark.slow
def test_a_kl_budget_steers_beta(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """From the base the KL is 0, below any budget: beta falls by a fifth of the share of the horizon, twice."""
    more = ("beta=0.1", "kl_budget=50", "kl_horizon=120", "lr=1e-6")
    run, _ = train(plan(TrainRequest("grpo", overrides=(*small_task, *FEW, *more), results=tmp_path)))
    assert run.record.notes["kl_budget"]["beta_at_the_end"] == pytest.approx(0.1 * (1 - 0.2 * 12 / 120) ** 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("samples=1", "a group of one has none; at least 2, found 1"),
        ("groups=9", "groups must be at most batch; found 9 and 4"),
        ("risk=0", "found 0; allowed: a number > 0"),
        ("beta=-1", "found -1; allowed: a number >= 0"),
        ("aggregation=gpdo", "gdpo"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert main(["train", "grpo", "--results", str(tmp_path), "--set", "batch=4", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert message in error and setting.partition("=")[0] in error
    assert len(error.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_tokens_that_another_engine_drew_are_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers of one token, both as likely as when they were sampled, so that the loss is -mean(weight A)."""
    mask = torch.ones(2, 1, dtype=torch.bool)
    made = rollout([[1.0, 0.0]], 2)
    made.samples = SimpleNamespace(response_mask=mask, logps=torch.log(torch.tensor([[0.6], [0.2]])))
    tokens = (made.samples.logps, made.samples.logps, made.samples.logps, torch.zeros(2, 1), mask)

    def loss() -> float:
        tensors = batch_tensors(made, np.array([2.0, -3.0]))
        return float(grpo.loss(*tokens, tensors, clip_range=0.2, beta=0.0)[0])

    assert loss() == pytest.approx(-(2.0 - 3.0) / 2)
    made.drawn_logps, made.correction = torch.log(torch.tensor([[0.4], [0.05]])), 2.0
    assert loss() == pytest.approx(-(1.5 * 2.0 - 2.0 * 3.0) / 2)  # .6 / .4, and .2 / .05 cut at 2

"""MORLHF and P-MORL: the scalar reward, which prompts are read, and what a run answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm.language_model import LanguageModel
from moalign.methods import registry
from moalign.methods.morlhf import Config
from moalign.training.rollout import Rollout

FEW = ("steps=3", "batch=6", "groups=3", "log_every=1", "lr=0.01", "policy.lora={r: 4, alpha: 8, dropout: 0.0}")


def test_the_reward_is_the_response_s_own_preference_times_its_rewards() -> None:
    nothing: Any = None
    z = np.array([[1.0, 2.0], [3.0, -1.0], [4.0, 4.0], [0.0, 8.0]])
    rollout = Rollout([], np.array([[0.25, 0.75], [1.0, 0.0]]), 2, nothing, [], z, z, nothing)
    assert rollout.utility.tolist() == [1.75, 0.0, 4.0, 0.0]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the policy reads, from here on."""
    texts: list[str] = []
    encode = LanguageModel.encode

    def look(self: LanguageModel, given: Any, *rest: Any) -> Any:
        texts.extend(given)
        return encode(self, given, *rest)

    monkeypatch.setattr(LanguageModel, "encode", look)
    return texts


@pytest.mark.slow
def test_every_preference_has_a_training_of_its_own_on_bare_prompts(
    small_task: tuple[str, ...], tmp_path: Path, read: list[str]
) -> None:
    made = plan(TrainRequest("morlhf", overrides=(*small_task, *FEW), prefs=("1,0", "0.25,0.75"), results=tmp_path))
    _ = made.task.normaliser
    read.clear()
    run, _ = train(made)
    assert set(read) <= set(made.task.prompts["train"])
    assert len(read) == 2 * 3 * 6
    assert [line["phase"] for line in run.metrics()] == ["pref-0"] * 3 + ["pref-1"] * 3
    for stage in ("pref-0", "pref-1"):
        assert (run.path / f"adapter-{stage}" / "adapter_model.safetensors").is_file()
        assert run.load_tensors(f"value_heads-{stage}")["linear.weight"].shape == (1, 16)
    assert {"kl", "kl_coef", "entropy", "clip_fraction", "value_loss/utility"} == set(run.record.notes["diagnostics"])

    method, context = context_of(run, tmp_path)
    told = evaluate.evaluate(method, context).result.content
    assert [tuple(point["prefs"]) for point in told["points"]] == [(1.0, 0.0), (0.25, 0.75)]
    with pytest.raises(RequestError, match="preference 0.3,0.7: .* the nearest is 0.25,0.75"):
        method.policy(context, (0.3, 0.7))


def test_experts_for_different_objectives_part(small_task: tuple[str, ...], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run, _ = train(plan(TrainRequest("morlhf", overrides=(*small_task, *FEW), prefs=("1,0", "0,1"), results=tmp_path)))
    left, right = (load_file(run.path / f"adapter-pref-{k}" / "adapter_model.safetensors") for k in (0, 1))
    assert max(float((left[name] - right[name]).abs().max()) for name in left) > 1e-3
    assert all(torch.isfinite(value).all() for value in left.values())


SAME = (
    "style=fraction",
    "lr=0.003",
    "value_lr=0.01",
    "kl_coef=0.05",
    "temperature=1.0",
    "schedule=linear",
    "warmup=1",
    "micro_batch=64",
)
"""What the two methods' recipes may set differently."""


@pytest.mark.slow
def test_conditioned_is_p_morl(small_task: tuple[str, ...], tmp_path: Path, read: list[str]) -> None:
    """The same adapter, bit for bit; under the name morlhf it is judged at the vectors that it was trained on."""
    found = {}
    for name, more in (("morlhf", ("conditioned=true",)), ("p-morl", ())):
        made = plan(TrainRequest(name, overrides=(*small_task, *FEW, *SAME, *more), results=tmp_path))
        _ = made.task.normaliser
        read.clear()
        run, _ = train(made)
        assert all(text.startswith("[helpfulness ") for text in read)
        assert "[helpfulness 0.5 harmlessness 0.5] " in {text[:35] for text in read}
        found[name] = (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
        method, context = context_of(run, tmp_path)
        told = evaluate.evaluate(method, context).result.content
        assert [tuple(point["prefs"]) for point in told["points"]] == context.task.grid
        if name == "morlhf":
            with pytest.raises(RequestError, match="trained on"):
                method.policy(context, (0.3, 0.7))
        else:
            assert (
                len(method.policy(context, (0.3, 0.7)).respond(context.task.eval_prompts[:2], context.task.sampling(0)))
                == 2
            )
    assert found["morlhf"] == found["p-morl"]


def test_what_they_can() -> None:
    alone, together = registry.get("morlhf").capabilities, registry.get("p-morl").capabilities
    assert (alone.one_policy, alone.steerable) == (False, False)
    assert (together.one_policy, together.steerable) == (True, True)
    assert alone.needs_online_rewards
    assert together.needs_online_rewards


def test_holding_out_what_is_never_asked_for_is_refused(small_task: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holdout: morlhf answers only for preferences that it was trained on"):
        plan(TrainRequest("morlhf", overrides=(*small_task, "holdout=[[0.5, 0.5]]"), results=tmp_path))


def test_a_warm_start_needs_a_policy_that_reads_its_preference() -> None:
    with pytest.raises(ValueError, match="warm_start teaches to read a preference: it needs conditioned: true"):
        Config(warm_start="hindsight")
    assert Config(warm_start="hindsight", conditioned=True).warm_start == "hindsight"

"""Hindsight and the warm start that it lends to the other conditioned online methods."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.methods import registry
from moalign.methods.hindsight import Config
from moalign.methods.morlhf import Config as MorlhfConfig
from moalign.training.distil import PHASE

WARM = ("distil.steps=2", "distil.batch=4", "distil.n=2", "distil.max_tokens=128")
QUICK = ("steps=2", "batch=4")


def test_it_always_distils() -> None:
    with pytest.raises(ValueError, match="warm_start"):
        Config.model_validate({"warm_start": "none"})
    assert Config().warm_start == "hindsight"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mo-odpo", "moc", "p-morl"])
def test_the_conditioned_online_methods_can_be_warmed_up(
    method: str, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    few = (*small_task, *QUICK, *(("groups=2",) if method != "mo-odpo" else ("warmup=0",)))
    plain, _ = train(plan(TrainRequest(method, overrides=few, results=tmp_path)))
    warm, _ = train(plan(TrainRequest(method, overrides=(*few, "warm_start=hindsight", *WARM), results=tmp_path)))
    assert PHASE not in plain.record.phases
    assert PHASE in warm.record.phases
    assert [line["step"] for line in warm.metrics() if line["phase"] == PHASE] == [2]
    extra = warm.record.cost.reward_calls - plain.record.cost.reward_calls
    prompts = warm.record.notes[PHASE]["prompts"]
    assert extra == prompts * 2 * 2  # n responses of each prompt, two objectives
    assert warm.record.cost.tokens_trained > plain.record.cost.tokens_trained


def test_morlhf_without_a_preference_in_the_prompt_has_nothing_to_warm_up() -> None:
    with pytest.raises(ValueError, match="it needs conditioned: true"):
        MorlhfConfig(warm_start="hindsight")
    assert MorlhfConfig(warm_start="hindsight", conditioned=True).warm_start == "hindsight"


def test_without_online_steps_it_is_the_distillation_alone(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run, _ = train(plan(TrainRequest("hindsight", overrides=(*small_task, "steps=0", *WARM), results=tmp_path)))
    assert {line["phase"] for line in run.metrics()} == {PHASE}
    assert run.record.cost.tokens_generated == 0
    assert registry.get("hindsight").capabilities.steerable


def test_a_warm_start_that_would_distil_nothing_is_refused(tmp_path: Path) -> None:
    """As on a task whose recipe of hindsight leaves the distillation out; hindsight itself may."""
    nothing = ("distil.steps=0", "warm_start=hindsight")
    with pytest.raises(RequestError, match=r"warm_start: hindsight needs distil\.steps of 1 or more; found 0"):
        plan(TrainRequest("moc", task="sandbox", overrides=nothing, results=tmp_path))
    with pytest.raises(RequestError, match="warm_start: hindsight needs"):
        plan(TrainRequest("moc", task="assistant", overrides=nothing[1:], results=tmp_path))
    assert plan(TrainRequest("hindsight", task="sandbox", overrides=nothing[:1], results=tmp_path)).config.steps > 0

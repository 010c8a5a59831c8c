"""Reward models leave the GPU between uses (``rewards.offload``); a stand-in notes where its model was sent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import WorkError
from moalign.rewards import model_scorer
from moalign.rewards.model_scorer import share
from moalign.rewards.panel import RewardPanel

TEXTS = ["x", "y"]


class Sent:
    """Stands for a model: its places, and what a scorer did meanwhile."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def to(self, place: str) -> Sent:
        self.log.append(f"{self.name} to {place}")
        return self

    def modules(self) -> list[Any]:
        return []


class FakeScorer(model_scorer.ModelScorer[ClassifierObjective]):
    """Its model is on the GPU once loaded."""

    def __init__(self, name: str, log: list[str], model: str = "a") -> None:
        self.spec = ClassifierObjective(name=name, kind="hf-classifier", model=model)
        self.name, self.maximise, self.cheap, self.log = name, True, True, log
        self._leader, self._leads, self._resting = self, False, False
        self.revision: Any = name  # type: ignore[misc]
        self.broken = False

    def _identity(self, content: str) -> list[Any]:
        return [content]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if "_loaded" not in self._leader.__dict__:
            self._leader.__dict__["_loaded"] = (Sent(self.log, self.spec.model), None)
        _ = self._model
        if self.broken:
            raise ValueError("no")
        self.log.append(f"{self.name} scores")
        return [1.0] * len(prompts)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_scorer, "_place", lambda: "cuda")


def test_each_model_leaves_when_it_has_scored_and_comes_back_for_the_next_time() -> None:
    log: list[str] = []
    panel = RewardPanel([FakeScorer("p", log, "a"), FakeScorer("q", log, "b")], offload=True)
    panel.score(TEXTS, TEXTS)
    assert log == ["p scores", "a to cpu", "q scores", "b to cpu"]
    log.clear()
    panel.score(TEXTS, TEXTS)
    assert log == ["a to cuda", "p scores", "a to cpu", "b to cuda", "q scores", "b to cpu"]


def test_what_bitsandbytes_keeps_of_8_bit_layers_leaves_with_them() -> None:
    """``Linear8bitLt`` keeps its matrix in ``state.CB``, no parameter and no buffer, once it was used."""
    import torch

    used, fresh, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Sequential()
    matrix, scale = torch.ones(2, 2), torch.ones(2)
    used.state = SimpleNamespace(CB=matrix, SCB=scale)  # type: ignore[assignment]
    fresh.state = SimpleNamespace(CB=None, SCB=None)  # type: ignore[assignment]
    model.extend([used, fresh])
    model_scorer._move(model, "cpu")
    assert used.weight.data_ptr() == used.state.CB.data_ptr() == matrix.data_ptr(), "one copy"
    model_scorer._move(model, "meta")
    assert (used.state.CB.device.type, used.state.SCB.device.type) == ("meta", "meta")
    assert used.weight.device.type == "meta" and fresh.state.CB is None


def test_without_the_setting_models_stay() -> None:
    log: list[str] = []
    panel = RewardPanel([FakeScorer("p", log)])
    panel.score(TEXTS, TEXTS)
    panel.score(TEXTS, TEXTS)
    assert log == ["p scores", "p scores"]


def test_objectives_of_one_model_move_it_together() -> None:
    log: list[str] = []
    first, second = FakeScorer("p", log), FakeScorer("q", log)
    share([first, second])
    RewardPanel([first, second], offload=True).score(TEXTS, TEXTS)
    assert log == ["p scores", "a to cpu", "a to cuda", "q scores", "a to cpu"]


def test_a_scorer_that_raises_leaves_too() -> None:
    log: list[str] = []
    scorer = FakeScorer("p", log)
    scorer.broken = True
    with pytest.raises(WorkError, match="raised ValueError"):
        RewardPanel([scorer], offload=True).score(TEXTS, TEXTS)
    assert log == ["a to cpu"]


def test_the_setting_reaches_the_panel_of_a_task_and_stays_with_its_copies(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    from moalign.experiment.train import TrainRequest, plan

    plans = {
        on: plan(TrainRequest("sft", task="sandbox", overrides=(*small_task, *more), results=tmp_path))
        for on, more in ((False, ()), (True, ("rewards.offload=true",)))
    }
    for on, made in plans.items():
        copied = made.task.panel.replaced(made.task.panel)
        assert (made.task.panel.offload, copied.offload) == (on, on)
    assert plans[True].folder == plans[False].folder, "the same run: it changes no score"

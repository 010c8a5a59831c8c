"""Jobs for the engines, on a base of random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.experiment.train import TrainRequest, plan
from moalign.lm import adapters
from moalign.runs.meter import Meter
from moalign.training.job import Job

LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"
SPLITS = "task.splits={train: 0.7, calibration: 0.1, eval: 0.2}"  # the sandbox's own: all its training prompts


class Interrupted(Exception):
    """What the tests raise in the middle of training."""


@dataclass
class Stop:
    """A progress callback that raises once at a given step of a phase."""

    phase: str
    step: int
    armed: bool = True
    seen: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, phase: str, done: int, total: int) -> None:
        self.seen.append((phase, done))
        if self.armed and phase == self.phase and done >= self.step:
            self.armed = False
            raise Interrupted(f"{phase} {done}")


@pytest.fixture
def stop() -> type[Stop]:
    """``stop(phase, step)`` is a ``progress`` that interrupts there, once."""
    return Stop


@pytest.fixture
def interrupted() -> type[Interrupted]:
    """What :func:`stop` raises."""
    return Interrupted


MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(small_task: tuple[str, ...], tmp_path: Path) -> MakeJob:
    """``make_job(method, *overrides, where=...)``: a job with its run opened and a fresh adapter attached.

    Settings are the method's defaults, not those of the task's recipe. The same ``where`` gives the same run folder,
    with a model and a meter of its own: what a new process would have.
    """
    return _maker(small_task, tmp_path)


@pytest.fixture(scope="module")
def make_shared_job(small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """The same for jobs that several tests of a module look at."""
    return _maker(small_task, tmp_path_factory.mktemp("shared"))


def _maker(small_task: tuple[str, ...], tmp_path: Path) -> MakeJob:
    def make(method: str, *overrides: str, where: str = "a", lora: str = LORA, **changes: Any) -> Job:
        recipe = tmp_path / f"{method}.yaml"
        recipe.write_text(f"method: {method}\ntask: sandbox\n")
        request = TrainRequest(
            method, recipe=recipe, overrides=(*small_task, SPLITS, lora, *overrides), results=tmp_path / where
        )
        made = plan(request)
        job = made.job(made.open(), Meter())
        for name, value in changes.items():
            setattr(job, name, value)
        adapters.attach(made.task.language_model, made.recipe.policy.lora, made.seed)
        return job

    return make


def _assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}))


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(left, right, rtol=..., atol=...)`` compares named tensors; without tolerance bit for bit."""
    return _assert_same

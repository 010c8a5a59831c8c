"""How many runs are trained at a time where nobody says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moalign.comparison import executors
from moalign.comparison.compare import CompareRequest, plan_all
from moalign.config import load
from moalign.core.errors import RequestError
from moalign.runs import environment
from moalign.tasks.load import make_task


def default_jobs(task: str, small_task: tuple[str, ...], tmp_path: Path, *more: str) -> int:
    return executors.jobs_by_default(make_task(load.load_card(task, [*small_task, *more]), tmp_path))


@pytest.fixture(autouse=True)
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "usable_cpus", lambda: 6)


def test_tiny_models_have_a_run_for_every_cpu(small_task: tuple[str, ...], tmp_path: Path) -> None:
    assert default_jobs("sandbox", small_task, tmp_path) == 6


def test_larger_ones_use_the_cpus_themselves(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moalign.lm.language_model.TINY", 1_000)
    assert default_jobs("sandbox", small_task, tmp_path) == 1


def test_a_gpu_is_left_to_one_run(small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_jobs("sandbox", small_task, tmp_path) == 1


def test_reward_models_count_and_unknown_ones_may_be_large(small_task: tuple[str, ...], tmp_path: Path) -> None:
    other = "task.objectives=[{name: helpfulness, kind: sandbox}, {name: fun, kind: hf-classifier, model: %s}]"
    assert default_jobs("sandbox", small_task, tmp_path, other % "nobody/knows-it") == 1
    assert default_jobs("sandbox", small_task, tmp_path, other % "mohameddhiab/humor-no-humor") == 1


@pytest.mark.parametrize(("value", "wanted"), [("", None), ("1", 1), ("12", 12)])
def test_the_environment_says_it_for_every_comparison(
    value: str, wanted: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(executors.JOBS, value)
    assert executors.jobs_requested() == wanted


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_what_is_no_number_of_runs_is_refused_before_anything_is_trained(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(executors.JOBS, value)
    with pytest.raises(RequestError, match=f"MOALIGN_JOBS={value}: allowed: 1 or more") as caught:
        plan_all(CompareRequest(task="sandbox", methods=["sfft"], results=tmp_path))
    assert "did you mean 'sft'" in str(caught.value)


def test_a_container_may_be_held_to_fewer_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bound = environment.usable_cpus()
    limits = {"max 100000\n": bound, "50000 100000\n": 1, "150000 100000\n": min(bound, 2), "nonsense\n": bound}
    for text, wanted in limits.items():
        monkeypatch.setattr(Path, "read_text", lambda self, text=text, **more: text)
        assert environment.usable_cpus() == wanted

"""A grid of per-preference policies: stages of one run, resumable, one adapter each."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.lm import adapters
from moalign.lm.generator import RESIDENT, ModelGenerator
from moalign.policies import per_preference
from moalign.policies.policy import Policy
from moalign.runs.run import Run
from moalign.training.grid import each_preference
from moalign.training.job import Job
from moalign.training.settings import SftConfig
from moalign.training.sft import train_sft

LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"
GRID = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
SFT = SftConfig(steps=4, batch=4, lr=0.01, max_tokens=48, checkpoint_every=1)
MakeJob = Callable[..., Job]


def train(job: Job, seen: list[Preference] | None = None) -> None:
    """Fine-tune for every vector on the responses that are best by w.r; two parts a vector."""
    lm, scored = job.task.language_model, job.task.scored()
    z = job.panel.z(scored.raw)

    for _, preference, stage in each_preference(job):
        if seen is not None:
            seen.append(preference)
        best = np.argsort(-(z @ np.array(preference)))[:12].tolist()
        texts = [job.task.renderer.plain(scored.prompts[i]) for i in best]
        train_sft(job, lm, texts, [scored.responses[i] for i in best], SFT, stage)
        job.notes["diagnostics"] = {"first weight": preference[0]}


@dataclass
class Whole:
    """A grid that was trained without interruption."""

    job: Job
    seen: list[tuple[str, int]]
    on_model: dict[str, Any]
    """Adapters on the model after training."""


@pytest.fixture(scope="module")
def whole(make_shared_job: MakeJob) -> Whole:
    seen: list[tuple[str, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        seen.append((phase, done))

    job = make_shared_job("sft", preferences=GRID, progress=progress)
    train(job)
    assert job.progress is progress
    return Whole(job, seen, dict(job.task.language_model.model.peft_config))


def adapters_of(job: Job) -> list[dict[str, Any]]:
    from safetensors.torch import load_file

    return [
        dict(load_file(job.run.path / f"adapter-pref-{index}" / "adapter_model.safetensors"))
        for index in range(len(GRID))
    ]


def differ(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return any(not bool((left[name] == right[name]).all()) for name in left)


def test_every_vector_gets_an_adapter_of_its_own_and_the_base_stays(whole: Whole) -> None:
    job = whole.job
    first, _, last = adapters_of(job)
    assert differ(first, last)
    assert whole.on_model == {}
    assert [name for name in job.run.record.phases if name.startswith("pref-")] == ["pref-0", "pref-1", "pref-2"]
    assert not list((job.run.path / "checkpoints").glob("pref-*"))


@pytest.mark.slow
def test_a_vector_does_not_depend_on_those_before_it(
    whole: Whole, make_job: MakeJob, assert_same: Callable[..., None]
) -> None:
    # The stage's name seeds the order of rows, so the vector keeps its place; what stood before it is another one.
    other = make_job("sft", preferences=[GRID[2], GRID[1], GRID[2]], where="b")
    train(other)
    assert_same(adapters_of(whole.job)[1], adapters_of(other)[1])


def test_progress_names_the_vector_and_its_place(whole: Whole) -> None:
    assert {phase for phase, _ in whole.seen if "preference" in phase} == {
        "preference 0,1 (1/3)",
        "preference 0.5,0.5 (2/3)",
        "preference 1,0 (3/3)",
    }


def test_a_part_of_a_stage_is_named_behind_the_vector(make_job: MakeJob, stop: Any) -> None:
    said = stop("none", 0)
    job = make_job("sft", preferences=GRID[:1], progress=said)
    for _, _, stage in each_preference(job):
        job.progress(f"{stage}-second", 1, 2)
    assert ("preference 0,1 (1/1) second", 1) in said.seen


def test_progress_is_the_job_s_own_again_when_a_vector_fails(make_job: MakeJob, stop: Any) -> None:
    reports = stop("none", 0)
    job = make_job("sft", preferences=GRID, progress=reports)

    def fail() -> None:
        for _ in each_preference(job):
            assert job.progress is not reports
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert job.progress is reports


@pytest.mark.slow  # quick ones resume one policy: test_sft, test_online
def test_a_crash_in_the_second_vector_loses_only_what_it_did_since_its_checkpoint(
    whole: Whole, make_job: MakeJob, assert_same: Callable[..., None], stop: Any, interrupted: type[Exception]
) -> None:
    job = make_job("sft", preferences=GRID, where="b", progress=stop("preference 0.5,0.5 (2/3)", 3))
    begun: list[Preference] = []
    with pytest.raises(interrupted):
        train(job, begun)
    assert begun == GRID[:2]
    assert (job.run.path / "adapter-pref-0").is_dir()
    assert not (job.run.path / "adapter-pref-1").exists()

    again, after = make_job("sft", preferences=GRID, where="b"), stop("none", 0)
    again.progress = after
    resumed: list[Preference] = []
    train(again, resumed)
    assert resumed == GRID[1:]
    # Two steps were in the checkpoint; the third, in flight, is made once more.
    assert [done for phase, done in after.seen if "(2/3)" in phase] == [3, 4]
    for left, right in zip(adapters_of(whole.job), adapters_of(again), strict=True):
        assert_same(left, right)
    assert again.meter.tokens_trained == whole.job.meter.tokens_trained
    assert [line["phase"] for line in again.run.metrics()] == [line["phase"] for line in whole.job.run.metrics()]
    assert again.notes == whole.job.notes


def test_diagnostics_are_kept_by_vector_and_averaged(whole: Whole) -> None:
    job = whole.job
    assert job.notes["per_preference"]["0.5,0.5"]["first weight"] == 0.5
    assert job.notes["diagnostics"]["first weight"] == pytest.approx(0.5)
    assert set(job.notes["per_preference"]) == {"0,1", "0.5,0.5", "1,0"}


# -- answering -------------------------------------------------------------------------------------------------------


def test_each_vector_answers_with_its_own_adapter_and_only_one_lies_on_the_model(
    whole: Whole, make_job: MakeJob
) -> None:
    job = whole.job
    lm, prompts = job.task.language_model, job.task.eval_prompts[:6]
    limits = job.task.sampling(3, temperature=1.0)
    policies = [per_preference.trained_for(job, w) for w in GRID]
    assert not getattr(lm.model, "peft_config", {})  # nothing is loaded before it is asked
    answers = [policy.respond(prompts, limits) for policy in policies]
    assert len(lm.model.peft_config) == 1
    assert answers[0] != answers[2]

    fresh = make_job("sft", preferences=GRID, where="b").task.language_model
    adapters.load(fresh, job.run.path / "adapter-pref-2", "other")
    assert Policy(ModelGenerator(fresh, "other"), job.task.renderer.plain).respond(prompts, limits) == answers[2]
    assert policies[0].respond(prompts, limits) == answers[0]
    assert len(lm.model.peft_config) == 1
    adapters.drop(lm, job.cache.pop(RESIDENT))  # other tests look at the same model


def test_a_vector_that_was_not_trained_is_refused_with_the_nearest(make_job: MakeJob) -> None:
    job = make_job("sft", preferences=GRID)
    with pytest.raises(RequestError) as caught:
        per_preference.trained_for(job, (0.6, 0.4))
    assert "preference 0.6,0.4" in str(caught.value)
    assert "0,1; 0.5,0.5; 1,0" in str(caught.value)
    assert "the nearest is 0.5,0.5" in str(caught.value)
    assert per_preference.index_of(job, (0.5 + 1e-9, 0.5 - 1e-9)) == 1


# -- kill -9 of the command line -------------------------------------------------------------------------------------


def command(task: tuple[str, ...], results: Path) -> list[str]:
    """A grid of three MODPO policies, each of some seconds."""
    settings = ["steps=60", "batch=4", "max_tokens=48", "per_prompt=1", "lr=0.002", "checkpoint_every=10"]
    sets = [part for text in (*task, LORA, *settings) for part in ("--set", text)]
    return [*(sys.executable, "-m", "moalign", "train", "modpo", "--no-eval", "--results", str(results)), *sets]


@pytest.mark.slow
def test_a_grid_survives_kill_9_in_its_second_vector(small_task: tuple[str, ...], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(small_task, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(killed.glob("runs/*/*/*/checkpoints/pref-1/step-*/state.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (left,) = killed.glob("runs/*/*/*")
    assert {name for name in Run.load(left).record.phases if name.startswith("pref-")} == {"pref-0"}
    before = (left / "adapter-pref-0" / "adapter_model.safetensors").stat().st_mtime_ns

    for results in (killed, whole):
        subprocess.run(command(small_task, results), check=True, capture_output=True)
    (other,) = whole.glob("runs/*/*/*")
    assert (left / "adapter-pref-0" / "adapter_model.safetensors").stat().st_mtime_ns == before  # not made again
    for index in range(3):
        name = f"adapter-pref-{index}/adapter_model.safetensors"
        assert (left / name).read_bytes() == (other / name).read_bytes()
    resumed, straight = Run.load(left).record, Run.load(other).record
    assert resumed.cost.tokens_trained == straight.cost.tokens_trained
    assert resumed.notes == straight.notes

"""A run that was interrupted ends exactly as one that was not: the same bytes, the same books."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.core.progress import silent
from moalign.experiment.train import TrainRequest, plan, train
from moalign.runs.run import Run

LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.1}"
STAGE = "{steps: 6, batch: 4, lr: 0.01, max_tokens: 48, log_every: 1, checkpoint_every: 2}"
SETTINGS = {
    "sft": ("steps=6", "batch=4", "lr=0.01", "max_tokens=48", "log_every=1", "checkpoint_every=2"),
    "ric": (f"offline={STAGE}", f"online={STAGE}", "online_rounds=2", "online_prompts=12", "offline_part=12"),
    "mo-odpo": ("steps=6", "batch=4", "samples=2", "lr=0.01", "log_every=1", "checkpoint_every=2"),
    "moc": ("steps=6", "batch=4", "groups=2", "lr=0.01", "kl_budget=0.1", "log_every=1", "checkpoint_every=2"),
}
SETTINGS["morlhf"] = SETTINGS["moc"]
SETTINGS["grpo"] = (*SETTINGS["moc"], "samples=2", "epochs=2")
SETTINGS["pd-morl"] = SETTINGS["moc"]
SETTINGS["maxmin-rlhf"] = (*(text for text in SETTINGS["moc"] if "groups" not in text), "pairs=8", "starts=2")
SETTINGS["raco"] = (*SETTINGS["sft"], "per_prompt=1", "accumulate=2")
EXPERTS = "experts={steps: 2, batch: 4, lr: 0.05}"
SETTINGS["evo-soups"] = (EXPERTS, "groups=1", "population=4", "generations=4", "prompts=6")
SETTINGS["bone-soups"] = (EXPERTS, "extrapolate=[0, 0.2, 0.5]", "prompts=6")
SETTINGS["bapo"] = (*SETTINGS["raco"], "anchors=6")
SETTINGS["spo"] = (*SETTINGS["raco"], "steps=12")
SETTINGS["mrpo"] = (*SETTINGS["raco"], f"experts={STAGE[:-1]}, per_prompt: 1}}")
SETTINGS["few-shot-steer"] = (*SETTINGS["sft"], "per_prompt=2", "encoder={steps: 6, users: 4, width: 8}")
SECOND = "preference 0.5,0.5 (2/3)"
"""How progress names the second vector of the task's grid of three."""
CLOCKS = {"seconds", "peak_memory_bytes"}


def trained(
    method: str, task: tuple[str, ...], results: Path, progress: Callable[[str, int, int], None] = silent
) -> Run:
    """Train with a new plan: a model, a meter and a job of its own, as a new process would have."""
    return train(plan(TrainRequest(method, overrides=(*task, LORA, *SETTINGS[method]), results=results)), progress)[0]


def lines(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.metrics()]


def assert_same_run(run: Run, whole: Run) -> None:
    patterns = ("adapter*/*", "value_heads*", "control*", "front*", "extrapolation*", "groups*", "encoder*")
    kept = [path for pattern in patterns for path in whole.path.glob(pattern)]
    assert {path.name for path in kept} >= {"adapter_model.safetensors", "adapter_config.json"}
    for path in kept:
        assert (run.path / path.relative_to(whole.path)).read_bytes() == path.read_bytes()
    assert [(line["phase"], line["step"]) for line in lines(run)] == [
        (line["phase"], line["step"]) for line in lines(whole)
    ]
    assert lines(run) == lines(whole)
    for counter in ("tokens_generated", "tokens_trained", "reward_calls"):
        assert getattr(run.record.cost, counter) == getattr(whole.record.cost, counter), counter
    assert run.record.notes == whole.record.notes
    assert set(run.record.phases) == set(whole.record.phases)
    assert run.record.status == "done"
    assert not (run.path / "checkpoints").exists()


@pytest.fixture(scope="module")
def kept() -> dict[str, tuple[Run, tuple[str, ...]]]:
    """Uninterrupted runs by method, trained once."""
    return {}


@pytest.fixture
def whole(
    kept: dict[str, Any], small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Run]:
    def make(method: str) -> Run:
        if method not in kept:
            kept[method] = trained(method, small_task, tmp_path_factory.mktemp(f"whole-{method}"))
        run: Run = kept[method]
        return run

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "phase", "step"),
    [
        pytest.param("sft", "sft", 1, marks=pytest.mark.slow),  # before the first checkpoint
        ("sft", "sft", 5),
        ("mo-odpo", "online", 5),
        ("moc", "online", 5),
        ("grpo", "online", 5),
        ("morlhf", SECOND, 5),
        ("pd-morl", "online", 5),
        ("maxmin-rlhf", "online", 5),
        ("raco", SECOND, 5),
        ("evo-soups", "search", 1),  # before the first generation is kept
        ("evo-soups", "search", 3),
        ("bone-soups", "extrapolation", 5),  # all of it is tried again
        ("bapo", SECOND, 5),
        ("spo", f"{SECOND} 1", 5),
        ("spo", f"{SECOND} 2", 5),
        ("mrpo", SECOND, 5),
        ("few-shot-steer", "dpo", 5),
        pytest.param("ric", "offline", 3, marks=pytest.mark.slow),
        pytest.param("ric", "sampling-1", 12, marks=pytest.mark.slow),  # all sampled, nothing kept yet
        ("ric", "round-1", 5),
        pytest.param("ric", "round-2", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    whole: Callable[[str], Run],
    small_task: tuple[str, ...],
    tmp_path: Path,
    stop: Callable[..., Any],
    interrupted: type[Exception],
    method: str,
    phase: str,
    step: int,
) -> None:
    progress = stop(phase, step)
    with pytest.raises(interrupted):
        trained(method, small_task, tmp_path, progress)
    (left,) = (tmp_path / "runs").glob(f"*/{method}/*")
    assert Run.load(left).record.status == "failed"
    before = len(progress.seen)
    run = trained(method, small_task, tmp_path, progress)
    assert run.path == left
    assert_same_run(run, whole(method))
    again = progress.seen[before:]
    resumed = next((done for what, done in again if what == phase), None)
    from_there = phase.startswith("sampling") or phase == "search"  # a generation is a checkpoint
    expected = 1 if phase == "extrapolation" else step if from_there else (step - 1) // 2 * 2 + 1
    assert resumed == expected  # from the last checkpoint
    done_before = {
        "search": {"experts by morlhf: preference 1,0 (1/2)"},
        "extrapolation": {"experts by morlhf: preference 0.7,0.3 (1/2)"},
        SECOND: {"preference 0,1 (1/3)", "anchors: the base answers"},
        f"{SECOND} 2": {"preference 0,1 (1/3)", f"{SECOND} 1"},
        "round-1": {"offline", "sampling-1"},
        "round-2": {"offline", "sampling-1", "round-1", "sampling-2"},
    }
    assert not done_before.get(phase, set()) & {what for what, _ in again}


@pytest.mark.slow
def test_it_may_be_interrupted_again_and_again(
    whole: Callable[[str], Run],
    small_task: tuple[str, ...],
    tmp_path: Path,
    stop: Callable[..., Any],
    interrupted: type[Exception],
) -> None:
    for phase, step in (("offline", 3), ("offline", 5), ("round-1", 1), ("round-1", 4)):
        with pytest.raises(interrupted):
            trained("ric", small_task, tmp_path, stop(phase, step))
    assert_same_run(trained("ric", small_task, tmp_path), whole("ric"))


@pytest.mark.slow
def test_ctrl_c_leaves_an_interrupted_run_that_goes_on(
    whole: Callable[[str], Run], small_task: tuple[str, ...], tmp_path: Path
) -> None:
    def progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("online", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained("mo-odpo", small_task, tmp_path, progress)
    (left,) = (tmp_path / "runs").glob("*/*/*")
    assert Run.load(left).record.status == "interrupted"
    assert_same_run(trained("mo-odpo", small_task, tmp_path), whole("mo-odpo"))


# -- kill -9 of the command line -------------------------------------------------------------------------------------

LONG = "{steps: 120, batch: 4, lr: 0.002, max_tokens: 48, log_every: 20, checkpoint_every: 20}"
LONG_SETTINGS = {
    "ric": (
        f"offline={LONG}",
        f"online={LONG}",
        "online_prompts=600",
        "offline_part=200",
        "task.generation.batch_size=8",
    ),
    "mo-odpo": ("steps=120", "batch=4", "samples=2", "lr=0.002", "log_every=20", "checkpoint_every=20"),
    "moc": ("steps=120", "batch=4", "groups=2", "lr=0.002", "log_every=20", "checkpoint_every=20"),
    "grpo": ("steps=120", "batch=4", "groups=2", "samples=2", "lr=0.002", "log_every=20", "checkpoint_every=20"),
    "pcm": (
        "steps=40",
        "batch=4",
        "lr=0.002",
        "log_every=10",
        "checkpoint_every=10",
        "control={width: 16, layers: 1}",
        "experts={steps: 40, batch: 4, max_tokens: 48, per_prompt: 1, log_every: 10, checkpoint_every: 10}",
        "task.generation.batch_size=8",
    ),
}


def start(method: str, task: tuple[str, ...], results: Path) -> subprocess.Popen[str]:
    sets = [part for text in (*task, LORA, *LONG_SETTINGS[method]) for part in ("--set", text)]
    command = [
        sys.executable,
        "-m",
        "moalign",
        "train",
        method,
        "--results",
        str(results),
        "--no-eval",
        "--json",
        *sets,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen[str], there: Callable[[], bool], seconds: float = 300) -> None:
    """Kill -9 the process as soon as ``there()``; it must still be at work then."""
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[1][-2000:]}"
        assert time.monotonic() < deadline, "it never came so far"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def checkpoint(results: Path, phase: str) -> Callable[[], bool]:
    return lambda: bool(list(results.glob(f"runs/*/*/*/checkpoints/{phase}/step-*/state.json")))


def only_run(results: Path, method: str = "*") -> Run:
    (path,) = results.glob(f"runs/*/{method}/*")
    return Run.load(path)


def finish(method: str, task: tuple[str, ...], results: Path) -> Run:
    process = start(method, task, results)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    assert json.loads(out)["status"] == "done"
    return only_run(results, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mo-odpo", "moc", "grpo"])
def test_an_online_method_survives_kill_9(small_task: tuple[str, ...], tmp_path: Path, method: str) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(start(method, small_task, killed), checkpoint(killed, "online"))
    assert only_run(killed).status == "interrupted"
    assert_same_run(finish(method, small_task, killed), finish(method, small_task, whole))


@pytest.mark.slow
def test_ric_survives_kill_9_in_every_stage(small_task: tuple[str, ...], tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(start("ric", small_task, killed), checkpoint(killed, "offline"))
    kill_when(start("ric", small_task, killed), lambda: "offline" in only_run(killed).record.phases)
    assert set(only_run(killed).record.phases) == {"offline"}  # it was sampling
    kill_when(start("ric", small_task, killed), checkpoint(killed, "round-1"))
    assert set(only_run(killed).record.phases) == {"offline", "sampling-1"}
    assert_same_run(finish("ric", small_task, killed), finish("ric", small_task, whole))


@pytest.mark.slow
def test_pcm_survives_kill_9_in_every_stage(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """While its experts are trained, while the base answers, while the control model is trained."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    kill_when(start("pcm", small_task, killed), checkpoint(killed, "pref-1"))
    assert only_run(killed, "modpo").status == only_run(killed, "pcm").status == "interrupted"
    kill_when(start("pcm", small_task, killed), lambda: "experts" in only_run(killed, "pcm").record.phases)
    assert set(only_run(killed, "pcm").record.phases) == {"experts"}  # the base was to answer
    kill_when(start("pcm", small_task, killed), checkpoint(killed, "control"))
    assert set(only_run(killed, "pcm").record.phases) == {"experts", "base_scores"}
    assert_same_run(finish("pcm", small_task, killed), finish("pcm", small_task, whole))

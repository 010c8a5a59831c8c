"""Snapshots: which steps, in which folders, that they change nothing, and that an interruption loses none."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError, WorkError
from moalign.core.progress import Progress, silent
from moalign.experiment.train import TrainRequest, plan, train
from moalign.methods import registry
from moalign.runs.run import SNAPSHOTS, Run
from moalign.training.job import RunContext
from moalign.training.snapshots import kept, steps_of

STAGE = "{steps: 4, batch: 4, lr: 0.01, max_tokens: 48, checkpoint_every: 3}"
ONLINE = ("steps=4", "batch=4", "lr=0.01", "checkpoint_every=3", "log_every=1")
PPO = (*ONLINE, "groups=2")
WAYS: dict[str, tuple[tuple[str, ...], dict[str, list[int]]]] = {
    "mo-odpo": ((*ONLINE, "samples=2"), {"online": [1, 4]}),
    "hindsight": ((*ONLINE, "samples=2", f"distil={STAGE[:-1]}, n: 2}}"), {"distil": [1, 4], "online": [1, 4]}),
    "moc": (PPO, {"online": [1, 4]}),
    "grpo": ((*PPO, "samples=2"), {"online": [1, 4]}),
    "ric": (
        (f"offline={STAGE}", f"online={STAGE}", "online_rounds=2", "online_prompts=12", "offline_part=12"),
        {"offline": [1, 4], "round-1": [1, 4], "round-2": [1, 4]},
    ),
    "modpo": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1"), {"pref": [1, 4]}),
    "morlhf": (PPO, {"pref": [1, 4]}),
    "p-morl": (PPO, {"online": [1, 4]}),
    "pd-morl": (PPO, {"online": [1, 4]}),
    "maxmin-rlhf": ((*ONLINE, "pairs=8", "starts=1"), {"online": [1, 4]}),
    "sft": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48"), {"sft": [1, 4]}),
    "cpo": ((f"cpsft={STAGE}", f"cdpo={STAGE}"), {"cpsft": [1, 4], "cdpo": [1, 4]}),
    "dpo-lw": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1"), {"pref": [1, 4]}),
    "raco": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1"), {"pref": [1, 4]}),
    "bapo": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1", "anchors=4"), {"pref": [1, 4]}),
    "spo": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1"), {"pref": [1, 4]}),
    "mrpo": (("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=1", "references=[]"), {"pref": [1, 4]}),
    "few-shot-steer": (
        ("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=2", "encoder={steps: 2, users: 4, width: 8}"),
        {"dpo": [1, 4]},
    ),
    "paretohqd": (
        ("k=8", "min_pool=24", "augment_prompts=48", f"first={STAGE}", f"second={STAGE}"),
        {"stage1": [1, 4], "pref": [1, 4]},
    ),
}
"""Settings of seconds, and where two snapshots of each stage are taken: ceil(4 (1/2)^2) and 4."""
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.1}"
CLOCKS = {"seconds", "peak_memory_bytes"}


def trained(method: str, task: tuple[str, ...], results: Path, *more: str, progress: Progress = silent) -> Run:
    request = TrainRequest(method, overrides=(*task, LORA, *WAYS[method][0], *more), results=results)
    return train(plan(request), progress)[0]


def files(run: Run, below: str = ".") -> dict[str, bytes]:
    folder = run.path / below
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def lines(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.metrics()]


def assert_taken(method: str, plain: Run, run: Run) -> None:
    """Training is the same bit for bit, and every snapshot is there under the name of the finished adapter."""
    adapters = {path.name for path in run.path.glob("adapter*")}
    folder = run.path / SNAPSHOTS
    parts = WAYS[method][1]
    assert {path.name for path in folder.iterdir()} == {f"{part}-{step}" for part in parts for step in parts[part]}
    for place in folder.iterdir():
        assert {path.name for path in place.iterdir()} == adapters, place
    assert list(run.record.notes[SNAPSHOTS].items()) == [(part, 4) for part in parts]
    own = {name: content for name, content in files(run).items() if not name.startswith(SNAPSHOTS)}
    assert own == files(plain)
    assert lines(run) == lines(plain)
    assert {key: note for key, note in run.record.notes.items() if key != SNAPSHOTS} == plain.record.notes
    last = f"{SNAPSHOTS}/{list(parts)[-1]}"
    for adapter in adapters:
        early, late = (files(run, f"{last}-{step}/{adapter}") for step in (1, 4))
        assert late == files(run, adapter)
        assert early != late


# -- which steps -------------------------------------------------------------------------------------------------------


def test_steps_are_spaced_quadratically_and_end_with_the_last() -> None:
    assert steps_of(250, 5) == [10, 40, 90, 160, 250]  # 250 / 25 = 10 times 1, 4, 9, 16, 25
    assert steps_of(10, 4) == [1, 3, 6, 10]  # .625, 2.5, 5.625 and 10, rounded up
    assert steps_of(2, 5) == [1, 2]  # .08 .32 .72 1.28 2
    assert steps_of(7, 1) == [7]
    assert steps_of(7, 0) == steps_of(0, 3) == []
    assert steps_of(10**9, 1000)[:2] == [1000, 4000]  # in whole numbers: no rounding of floats


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [name if name == "mo-odpo" else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_training_is_the_same_with_snapshots_and_all_of_them_are_there(
    method: str, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    plain = trained(method, small_task, tmp_path)
    run = trained(method, small_task, tmp_path, "snapshots=2")
    assert run.path != plain.path and not (plain.path / SNAPSHOTS).exists()
    assert_taken(method, plain, run)


def test_snapshots_are_part_of_a_run_s_identity_where_there_are_any(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    plans = [
        plan(TrainRequest("mo-odpo", overrides=(*small_task, *more), results=tmp_path))
        for more in ((), ("snapshots=0",), ("snapshots=2",), ("snapshots=3",))
    ]
    assert "snapshots" not in plans[0].identity and plans[0].folder == plans[1].folder
    assert len({made.folder for made in plans}) == 3
    assert [made.identity.get("snapshots") for made in plans] == [None, None, 2, 3]


@pytest.mark.parametrize("method", registry.names())
def test_a_method_keeps_snapshots_or_refuses_before_training(
    method: str, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    request = TrainRequest(method, overrides=(*small_task, "snapshots=2"), results=tmp_path)
    if method in {"best-of-n", "prompting", "mod", "pcm", "rewarded-soups", "dpo-soups", "bone-soups", "evo-soups"}:
        with pytest.raises(RequestError, match=f"^snapshots: {method} trains no adapter of its own"):
            plan(request)
        assert not (tmp_path / "runs").exists()
    else:
        assert plan(request).recipe.snapshots == 2


def test_a_run_whose_folder_was_removed_gets_no_snapshots(small_task: tuple[str, ...], tmp_path: Path) -> None:
    def progress(what: str, done: int, total: int) -> None:
        if (what, done) == ("online", 3):
            (path,) = (tmp_path / "runs").glob("*/*/*")
            shutil.rmtree(path)

    with pytest.raises(WorkError, match="was removed or moved"):
        trained(
            "mo-odpo", small_task, tmp_path, "snapshots=2", "checkpoint_every=100", "log_every=100", progress=progress
        )
    assert not list((tmp_path / "runs").glob("*/*/*"))


# -- reading them ------------------------------------------------------------------------------------------------------


def finished(tmp_path: Path, parts: Any, count: Any, *folders: str) -> Any:
    from types import SimpleNamespace

    for folder in folders:
        (tmp_path / SNAPSHOTS / folder).mkdir(parents=True)
        (tmp_path / SNAPSHOTS / folder / "adapter_config.json").write_text("{}")
    record = SimpleNamespace(notes={"snapshots": parts} if parts else {}, recipe={"snapshots": count}, method="m")
    return SimpleNamespace(path=tmp_path, record=record)


def test_shares_run_over_the_parts_in_order_and_the_last_is_the_finished_run(tmp_path: Path) -> None:
    folders = [f"{name}/adapter" for name in ("distil-25", "distil-100", "online-75", "online-300")]
    points = kept(finished(tmp_path, {"distil": 100, "online": 300}, 2, *folders))
    assert [(point.part, point.step, point.share) for point in points] == [
        ("distil", 25, 25 / 400),
        ("distil", 100, 100 / 400),
        ("online", 75, 175 / 400),
        ("online", 300, 1.0),
    ]
    assert [point.folder for point in points] == [
        "snapshots/distil-25",
        "snapshots/distil-100",
        "snapshots/online-75",
        "",
    ]


def test_a_snapshot_that_lacks_an_adapter_is_named(tmp_path: Path) -> None:
    run = finished(tmp_path, {"pref": 4}, 2, "pref-1/adapter-pref-0", "pref-4/adapter-pref-0", "pref-4/adapter-pref-1")
    with pytest.raises(RequestError, match="pref-1: adapter-pref-1 is missing"):
        kept(run)


def test_a_snapshot_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="online-1: adapter is missing"):
        kept(finished(tmp_path, {"online": 4}, 2, "online-4/adapter"))


def test_an_adapter_that_no_step_trained_is_the_finished_one(tmp_path: Path) -> None:
    """MODPO's corner with an implicit margin: an expert's adapter, taken over as it is."""
    run = finished(tmp_path, {"pref": 4}, 1, "pref-4/adapter-pref-1")
    parts: dict[str, Any] = dict.fromkeys(("task", "config", "policy_spec", "panel"))
    now = RunContext(run=run, preferences=[], **parts)
    then = replace(now, snapshot=kept(finished(tmp_path, {"pref": 4}, 2, "pref-1/adapter-pref-1"))[0].folder)
    assert then.adapter_folder("adapter-pref-1") == tmp_path / "snapshots/pref-1/adapter-pref-1"
    assert then.adapter_folder("adapter-pref-0") == now.adapter_folder("adapter-pref-0") == tmp_path / "adapter-pref-0"


def test_a_run_without_snapshots_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="it has no snapshots; train it with some: moalign train m --snapshots 8"):
        kept(finished(tmp_path, None, None))


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "phase", "step"),
    [
        ("mo-odpo", "online", 1),  # before the first checkpoint
        ("mo-odpo", "online", 4),  # the last snapshot is there, the run is not done
        ("hindsight", "online", 2),
        ("modpo", "preference 0.5,0.5 (2/3)", 2),
        ("paretohqd", "stage1: preference 1,0 (3/3)", 3),
    ],
)
def test_an_interrupted_run_has_the_same_snapshots_in_the_end(
    small_task: tuple[str, ...],
    tmp_path: Path,
    stop: Callable[..., Any],
    interrupted: type[Exception],
    method: str,
    phase: str,
    step: int,
) -> None:
    whole = trained(method, small_task, tmp_path / "whole", "snapshots=2")
    with pytest.raises(interrupted):
        trained(method, small_task, tmp_path / "b", "snapshots=2", progress=stop(phase, step))
    run = trained(method, small_task, tmp_path / "b", "snapshots=2")
    assert files(run) == files(whole)
    assert run.record.notes == whole.record.notes
    assert kept(run) == kept(whole)


@pytest.mark.slow
def test_snapshots_survive_kill_9(small_task: tuple[str, ...], tmp_path: Path) -> None:
    def start(results: Path) -> subprocess.Popen[str]:
        settings = (*small_task, LORA, "steps=40", "batch=4", "samples=2", "lr=0.002", "checkpoint_every=5")
        sets = [part for text in settings for part in ("--set", text)]
        command = [sys.executable, "-m", "moalign", "train", "mo-odpo", "--snapshots", "4", "--no-eval", "--json"]
        return subprocess.Popen(
            [*command, "--results", str(results), *sets], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(results: Path) -> Run:
        out, err = (process := start(results)).communicate()
        assert process.returncode == 0, err[-2000:]
        return Run.load(Path(json.loads(out)["run"]))

    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("runs/*/*/*/snapshots/online-10")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    run, whole = finish(tmp_path / "killed"), finish(tmp_path / "whole")
    assert {path.name for path in (run.path / SNAPSHOTS).iterdir()} == {f"online-{n}" for n in (3, 10, 23, 40)}
    assert files(run) == files(whole)

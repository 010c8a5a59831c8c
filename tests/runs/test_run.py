"""One run: lock, metrics, phases, tables."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moalign.core.errors
from moalign.core.errors import RequestError
from moalign.runs import atomic
from moalign.runs import record as records
from moalign.runs import run as runs
from moalign.runs.meter import Meter
from moalign.runs.record import RunRecord
from moalign.runs.run import Run

ROOT = Path(moalign.core.errors.__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from moalign.runs.run import Run
with Run.load(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    record = RunRecord(
        run_id="0123456789ab", method="moc", task="sandbox", card_hash="c", seed=0, created=records.now()
    )
    path = tmp_path / record.run_id
    path.mkdir()
    record.write(path)
    return Run.load(path)


def holder(run: Run) -> subprocess.Popen[str]:
    """Start a process that holds the run's lock; returns once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.slow
def test_a_second_process_is_refused_and_told_who_holds_the_run(run: Run) -> None:
    process = holder(run)
    try:
        started = time.monotonic()
        with pytest.raises(RequestError) as caught, run.lock():
            pytest.fail("two writers")
        assert time.monotonic() - started < 5
        assert f"another process (pid {process.pid} on " in str(caught.value)
        assert "is training this run" in str(caught.value)
        assert str(run.path) in str(caught.value)
        assert caught.value.exit_code == 2
        assert run.is_locked()
        assert run.status == "running"
    finally:
        process.kill()
        process.communicate()


def test_the_lock_of_a_killed_process_does_not_block(run: Run) -> None:
    process = holder(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not run.is_locked()
    assert run.status == "interrupted"
    with run.lock():
        owner = json.loads((run.path / runs.OWNER).read_text())
        assert owner["pid"] == os.getpid()
        assert run.status == "running"
    assert not run.is_locked()
    assert not (run.path / runs.OWNER).exists()


@pytest.mark.slow
def test_a_lock_that_is_waited_for_is_taken_when_the_other_process_ends(run: Run) -> None:
    process = holder(run)
    threading.Timer(0.8, process.kill).start()
    started = time.monotonic()
    with run.lock(wait=True):
        assert time.monotonic() - started > 0.6
        assert process.wait() == -signal.SIGKILL
        assert run.is_locked()


def test_without_flock_the_lock_of_a_killed_process_is_seen_to_be_stale(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a lock is a file, which outlives its process; else ``compare`` would wait for somebody who is gone."""

    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    process = holder(run)
    monkeypatch.setattr(fcntl, "flock", missing)
    assert run.status == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run.status == "interrupted"
    (run.path / runs.OWNER).unlink()
    assert run.status == "running", "whoever holds it has not written its name yet"


def test_a_file_system_that_has_no_locks_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network share whose lock service is down."""

    def none_left(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none_left)
    told = "cannot write here: No locks available; .*choose another folder"
    with pytest.raises(RequestError, match=told), run.lock():
        pytest.fail("locked")
    assert run.status == "running", "somebody may be at work"


def test_the_lock_is_freed_on_an_exception_and_can_be_taken_again(run: Run) -> None:
    with pytest.raises(ValueError, match="boom"), run.lock():
        raise ValueError("boom")
    with run.lock(), pytest.raises(RequestError, match="is training this run"), Run.load(run.path).lock():
        pytest.fail("two writers in one process")
    with run.lock():
        assert run.is_locked()


def test_a_holder_that_has_not_written_its_name_yet(run: Run) -> None:
    with run.lock():
        (run.path / runs.OWNER).write_text("{")
        with pytest.raises(RequestError, match=r": another process is training this run"), Run.load(run.path).lock():
            pytest.fail("two writers")


def test_locking_reads_the_record_again(run: Run) -> None:
    Run.load(run.path).mark("done")  # another process finished it meanwhile
    assert run.record.status == "running"
    with run.lock():
        assert run.record.status == "done"


def test_locking_cleans_what_a_killed_writer_left(run: Run) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = run.path / "checkpoints" / "sft" / f".tmp-{atomic._host()}-{process.pid}-00000000-step-00000001"
    left.mkdir(parents=True)
    (left / "tensors.safetensors").write_text("half")
    with run.lock():
        assert not left.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_locking_in_a_folder_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    opener = os.open

    def refuse(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith(runs.LOCK):
            raise OSError(code, os.strerror(code), str(path))
        return opener(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RequestError, match=f"cannot write here: {os.strerror(code)}"), run.lock():
        pytest.fail("locked")


def test_mark_saves_status_cost_and_time(run: Run) -> None:
    meter = Meter()
    meter.add_reward_calls(3)
    run.mark("failed", "scorer x: NaN", meter)
    found = Run.load(run.path).record
    assert (found.status, found.error, found.cost.reward_calls) == ("failed", "scorer x: NaN", 3)
    assert found.finished is not None
    assert found.seconds >= 0
    assert found.cost.peak_memory_bytes > 2**20
    run.mark("running")
    found = Run.load(run.path).record
    assert (found.status, found.error, found.finished, found.cost.reward_calls) == ("running", None, None, 3)


@pytest.mark.parametrize(
    ("error", "written", "kept"),
    [
        (RequestError("groups: found 9"), False, False),
        (RequestError("the endpoint answers 401"), True, True),
        (ValueError("a fault of ours"), False, True),
    ],
)
def test_a_request_refused_before_anything_was_written_leaves_no_run(
    run: Run, error: Exception, written: bool, kept: bool
) -> None:
    with pytest.raises(type(error)), run.training():
        if written:
            run.log(1, loss=0.5)
        raise error
    assert run.path.exists() == kept
    if kept:
        assert Run.load(run.path).record.status == "failed"


def test_a_judges_costs_are_kept_though_nothing_else_was_computed(run: Run) -> None:
    with pytest.raises(RequestError), run.training():
        run.record.notes = {"judges": {"help": {"verdicts": 16}}}
        raise RequestError("the endpoint answers 401")
    assert Run.load(run.path).record.notes["judges"]["help"]["verdicts"] == 16


def test_who_waited_for_a_run_that_was_refused_is_told(run: Run) -> None:
    said: list[str] = []

    def wait() -> None:
        try:
            with Run.load(run.path).training(wait=True):
                said.append("trained")
        except RequestError as error:
            said.append(str(error))

    waiting = threading.Thread(target=wait)
    with pytest.raises(RequestError, match="groups"), run.training():
        waiting.start()
        time.sleep(2 * runs._POLL)
        raise RequestError("groups: found 9")
    waiting.join(timeout=30)
    assert len(said) == 1 and "the run is gone" in said[0]
    assert not run.path.exists()


def test_a_run_that_is_done_has_no_checkpoints_left(run: Run) -> None:
    """A kill between the two leaves them."""
    run.save_checkpoint("train", 10, {"w": torch.zeros(3)}, {})
    run.mark("done")
    Run.load(run.path).drop_leftovers()
    assert not (run.path / runs.CHECKPOINTS).exists()
    assert Run.load(run.path).record.status == "done"


def test_a_run_done_knows_the_gpu_that_its_training_loaded_torch_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is first written before torch is loaded, when there is no GPU to be seen."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: False,
        device_count=lambda: 1,
        get_device_name=lambda index: f"GPU {index}",
    )
    assert run.record.environment.get("gpus", []) == []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, get_num_threads=lambda: 3))
    run.mark("done", meter=Meter())
    environment = Run.load(run.path).record.environment
    assert (environment["gpus"], environment["threads"]) == (["GPU 0"], 3)


def test_log_and_read_metrics(run: Run) -> None:
    assert run.metrics() == []
    run.log(1, loss=0.5, phase="sft")
    run.log(2, loss=torch.tensor(0.25), rewards=np.array([1.0, 2.0]), kl=math.nan)
    assert run.metrics() == [
        {"step": 1, "phase": "sft", "loss": 0.5},
        {"step": 2, "phase": "train", "loss": 0.25, "rewards": [1.0, 2.0], "kl": None},
    ]


def test_lines_are_on_disk_at_once(run: Run) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
from moalign.runs.run import Run
run = Run.load(Path(sys.argv[1]))
run.log(1, loss=1.0)
run.log(2, loss=2.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run(
        [sys.executable, "-c", code, str(run.path)], check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert [line["step"] for line in run.metrics()] == [1, 2]


@pytest.mark.parametrize(
    ("tail", "kept"),
    [('{"step": 2, "phase": "train", "lo', [1]), ('{"step": 2, "phase": "train", "loss": 2.0}', [1, 2]), ("", [1])],
)
def test_a_half_written_last_line_is_tolerated_and_removed(run: Run, tail: str, kept: list[int]) -> None:
    run.log(1, loss=1.0)
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write(tail)
    again = Run.load(run.path)
    assert [line["step"] for line in again.metrics()] == kept
    again.log(3, loss=3.0)
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [*kept, 3]


def test_a_half_line_is_removed_by_truncate_too(run: Run) -> None:
    run.log(1)
    with open(run.path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2')
    again = Run.load(run.path)
    again.truncate_metrics("train", 1)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 1, "phase": "train"}\n'


def test_a_damaged_line_in_the_middle_is_named(run: Run) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(RequestError, match=r"metrics\.jsonl:2: damaged line"):
        run.metrics()


def test_a_damaged_line_in_the_middle_stops_no_training(run: Run) -> None:
    damaged = '{"step": 1}\n{"step": \n{"step": 3}\n'
    (run.path / "metrics.jsonl").write_text(damaged + '{"step": 4, "lo')
    run.log(4, loss=1.0)
    assert (run.path / "metrics.jsonl").read_text() == damaged + '{"step": 4, "phase": "train", "loss": 1.0}\n'


def test_truncate_drops_only_the_phase_after_the_step(run: Run) -> None:
    run.truncate_metrics("train", 5)  # nothing there yet
    assert not (run.path / "metrics.jsonl").exists()
    for step in (1, 2, 3):
        run.log(step, phase="sft", loss=step)
    for step in (1, 2, 3, 4):
        run.log(step, phase="rl", loss=step)
    before = (run.path / "metrics.jsonl").read_bytes()
    run.truncate_metrics("rl", 4)
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.truncate_metrics("rl", 2)
    run.log(3, phase="rl", loss=3)
    found = [(line["phase"], line["step"]) for line in run.metrics()]
    assert found == [("sft", 1), ("sft", 2), ("sft", 3), ("rl", 1), ("rl", 2), ("rl", 3)]
    run.truncate_metrics("rl", -1)
    assert {line["phase"] for line in run.metrics()} == {"sft"}


class FullDisk(io.FileIO):
    """Takes the first 5 bytes of a write, as a disk with 5 bytes left does."""

    def write(self, data: Any) -> int:
        return super().write(bytes(data)[:5])


def test_a_full_disk_leaves_no_half_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.log(1, loss=1.0)
    before = (run.path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(runs, "open", lambda path, mode, buffering: FullDisk(path, "ab"), raising=False)
    with pytest.raises(RequestError, match="No space left on device"):
        run.log(2, loss=2.0)
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_phases(run: Run) -> None:
    assert not run.phase_done("sft")
    run.finish_phase("sft", steps=5, loss=np.float32(0.5))
    again = Run.load(run.path)
    assert again.phase_done("sft")
    assert not again.phase_done("rl")
    info = again.phase_info("sft")
    assert (info["steps"], info["loss"], set(info)) == (5, 0.5, {"finished", "steps", "loss"})


def test_checkpoints_of_phases_are_apart_and_dropped_together(run: Run) -> None:
    assert run.load_checkpoint("sft") is None
    run.save_checkpoint("sft", 5, {"a": torch.ones(2)}, {"meter": Meter().state()})
    run.save_checkpoint("rl-0.3,0.7", 7, {"a": torch.zeros(2)}, {})
    found = run.load_checkpoint("sft")
    assert found is not None
    step, tensors, state = found
    assert (step, tensors["a"].tolist(), state["meter"]["reward_calls"]) == (5, [1.0, 1.0], 0)
    run.drop_checkpoints()
    run.drop_checkpoints()
    assert run.load_checkpoint("sft") is None
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]


def test_checkpoints_of_one_phase_and_its_parts_are_dropped(run: Run) -> None:
    for phase in ("pref-1", "pref-1-second", "pref-10", "pref-2"):
        run.save_checkpoint(phase, 1, {"a": torch.ones(1)}, {})
    run.drop_checkpoints("pref-1")
    run.drop_checkpoints("pref-1")
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["pref-10", "pref-2"]


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b"])
def test_phase_names_are_folder_names(run: Run, name: str) -> None:
    with pytest.raises(ValueError, match="folder's name"):
        run.checkpoint_dir(name)


def test_tables(run: Run) -> None:
    import pandas as pd

    table = pd.DataFrame({"prompt": ["a", "é"], "score": [1.5, math.nan], "preference": [[0.3, 0.7], [1.0, 0.0]]})
    path = run.write_table("responses", table)
    assert path == run.path / "responses.parquet"
    back = run.read_table("responses.parquet")
    assert list(back.columns) == ["prompt", "score", "preference"]
    assert back["prompt"].tolist() == ["a", "é"]
    assert back["preference"][1].tolist() == [1.0, 0.0]
    with pytest.raises(RequestError, match=r"other\.parquet: no such table"):
        run.read_table("other")
    os.truncate(path, 60)
    with pytest.raises(RequestError, match=r"responses\.parquet: truncated, or not a parquet file"):
        run.read_table("responses")


def test_tensors(run: Run) -> None:
    assert run.save_tensors("bounds", {"lo": torch.tensor([1.0])}) == run.path / "bounds.safetensors"
    assert run.load_tensors("bounds")["lo"].tolist() == [1.0]
    for name in ("../x", "/x"):
        with pytest.raises(ValueError, match="lies in its folder"):
            run.save_tensors(name, {})


def test_reading_a_run_writes_nothing(run: Run) -> None:
    run.log(1)
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
    again = Run.load(run.path)
    again.metrics()
    again.load_checkpoint("sft")
    assert again.status == "interrupted"
    assert {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()} == before

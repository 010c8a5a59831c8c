"""The meter counts on over a resume and knows its own process's memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import moalign.core.errors
from moalign.runs import meter as meters
from moalign.runs.meter import Meter
from moalign.runs.record import Cost

ROOT = Path(moalign.core.errors.__file__).parents[2]


def test_counts_and_cost() -> None:
    meter = Meter()
    meter.add_tokens_generated(10)
    meter.add_tokens_generated(5)
    meter.add_tokens_trained(7)
    meter.add_reward_calls(6)
    cost = meter.cost()
    assert (cost["tokens_generated"], cost["tokens_trained"], cost["reward_calls"]) == (15, 7, 6)
    assert Cost(**cost).model_dump() == cost
    for add in (meter.add_tokens_generated, meter.add_tokens_trained, meter.add_reward_calls):
        with pytest.raises(ValueError, match="counts upwards"):
            add(-1)


def test_seconds_pass() -> None:
    meter = Meter()
    before = meter.seconds
    time.sleep(0.02)
    assert 0.02 <= meter.seconds - before < 5


def test_a_resume_counts_on_and_lost_work_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(meters, "process_peak_bytes", lambda: 1000)
    first = Meter()
    first.add_reward_calls(4)
    clock[0] += 30
    saved = first.state()
    first.add_reward_calls(100)  # after the checkpoint, lost
    clock[0] += 500

    monkeypatch.setattr(meters, "process_peak_bytes", lambda: 400)
    second = Meter()
    clock[0] += 2
    second.load(saved)
    second.add_reward_calls(1)
    clock[0] += 10
    assert second.state() == {
        "tokens_generated": 0,
        "tokens_trained": 0,
        "reward_calls": 5,
        "seconds": 42.0,
        "peak_memory_bytes": 1000,
    }


def test_peak_memory_is_of_this_process_in_bytes() -> None:
    size = 200 * 2**20
    code = (
        "import subprocess, sys\n"
        "from moalign.runs.meter import process_peak_bytes\n"
        "before = process_peak_bytes()\n"
        f"block = b'x' * {size}\n"
        "del block\n"
        "inner = 'from moalign.runs.meter import process_peak_bytes as p; print(p())'\n"
        "print(before, process_peak_bytes(), flush=True)\n"
        f"block = b'x' * {size}\n"
        "subprocess.run([sys.executable, '-c', inner], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    before, after, child = map(int, done.stdout.split())
    assert before < size < after < before + 2 * size
    if Path("/proc/self/status").exists() and "VmHWM" in Path("/proc/self/status").read_text():
        assert child < size  # a child does not inherit its parent's peak


def test_getrusage_is_used_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "Path", lambda _: Path("/no/such/file"))
    monkeypatch.setattr(meters.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=2048))
    monkeypatch.setattr(meters.sys, "platform", "linux")
    assert meters.process_peak_bytes() == 2048 * 1024
    monkeypatch.setattr(meters.sys, "platform", "darwin")
    assert meters.process_peak_bytes() == 2048


@pytest.mark.parametrize(("initialised", "expected"), [(True, 900), (False, 50)])
def test_gpu_memory_counts_once_cuda_was_used(
    monkeypatch: pytest.MonkeyPatch, initialised: bool, expected: int
) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: initialised,
        device_count=lambda: 2,
        max_memory_allocated=lambda index: [300, 900][index],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(meters, "process_peak_bytes", lambda: 50)
    assert Meter().peak_memory_bytes == expected


def test_a_gpu_s_peak_may_be_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = [300, 900]
    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        max_memory_allocated=peaks.__getitem__,
        reset_peak_memory_stats=lambda index: peaks.__setitem__(index, 10 * index),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert meters.device_peak_bytes() == 900
    meters.fresh_peak()
    assert peaks == [0, 10] and meters.device_peak_bytes() == 10
    monkeypatch.delitem(sys.modules, "torch")
    meters.fresh_peak()
    assert meters.device_peak_bytes() == 0


def test_another_run_s_cost_counts_whole_and_its_seconds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "process_peak_bytes", lambda: 500)
    now = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    meter = Meter()
    meter.add_tokens_trained(5)
    now[0] += 10  # of its own
    cost = {"tokens_generated": 7, "tokens_trained": 20, "reward_calls": 3, "peak_memory_bytes": 900}
    now[0] += 4  # the other run was resumed meanwhile; it took 30 seconds over its two halves
    meter.add_run(cost, 30.0, passed=4.0)
    assert meter.cost() == {"tokens_generated": 7, "tokens_trained": 25, "reward_calls": 3, "peak_memory_bytes": 900}
    assert meter.seconds == pytest.approx(40)
    later = Meter()
    later.load(meter.state())
    now[0] += 1
    assert later.seconds == pytest.approx(41)
    assert later.cost() == meter.cost()

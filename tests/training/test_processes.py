"""Several processes train one run: the same adapter as one process, one log, one message when one of them is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moalign.core import processes
from moalign.core.errors import RequestError
from moalign.runs.run import Run
from moalign.training.callbacks import own_places, parts_of

LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"
OFTEN = ("log_every=1", "checkpoint_every=2")
STAGE = "{steps: 4, batch: 4, lr: 0.01, max_tokens: 48, log_every: 1, checkpoint_every: 2}"
SETTINGS = {
    "sft": ("steps=4", "batch=4", "lr=0.01", "max_tokens=48", *OFTEN),
    "modpo": ("steps=4", "batch=4", "lr=0.01", "max_tokens=48", "per_prompt=2", *OFTEN),
    "mo-odpo": ("steps=4", "batch=8", "lr=0.01", "micro_batch=4", "kl_budget=0.1", *OFTEN),
    "moc": ("steps=4", "batch=8", "groups=2", "lr=0.01", "epochs=2", "support=9.0", *OFTEN),
    "ric": (f"offline={STAGE}", f"online={STAGE}", "online_rounds=1", "online_prompts=12", "offline_part=12"),
    "evo-soups": (
        "experts={steps: 2, batch: 4, lr: 0.01}",
        "groups=1",
        "population=4",
        "generations=3",
        "prompts=6",
    ),
    "mod": (f"experts={STAGE.replace('}', ', per_prompt: 1}')}",),
}
CLOCKS = {"seconds", "peak_memory_bytes"}
GONE = "another process of this training is gone"


@dataclass
class Ended:
    """How a process ended: its exit code, and what it has printed."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


Launch = Callable[..., list[Ended]]


@pytest.fixture(scope="module")
def launcher() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("launcher.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


@pytest.fixture
def launch(launcher: subprocess.Popen[str], tmp_path: Path) -> Launch:
    """``launch(count, arguments, ending)``: run a command in that many processes.

    ``ending``: (rank, step, "kill" or the message of an error), how one of them ends.
    """

    def run(count: int, arguments: Sequence[str], ending: Any = None, **variables: str) -> list[Ended]:
        given = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
        request = {"count": count, "arguments": arguments, "ending": ending, "variables": given, "where": str(tmp_path)}
        assert launcher.stdin is not None and launcher.stdout is not None
        launcher.stdin.write(json.dumps(request) + "\n")
        launcher.stdin.flush()
        return [
            Ended(code, *((tmp_path / f"{name}-{rank}").read_text(encoding="utf-8") for name in ("stdout", "stderr")))
            for rank, code in enumerate(json.loads(launcher.stdout.readline()))
        ]

    return run


@pytest.fixture
def words(small_task: tuple[str, ...], tmp_path: Path) -> Callable[..., list[str]]:
    """The command that trains a method in a results folder."""

    def make(method: str, folder: str, *more: str) -> list[str]:
        sets = [part for text in (*small_task, LORA, *SETTINGS[method], *more) for part in ("--set", text)]
        return ["train", method, "--results", str(tmp_path / folder), "--no-eval", "--json", *sets]

    return make


def run_of(folder: Path, method: str) -> Run:
    (path,) = folder.glob(f"runs/*/{method}/*")
    return Run.load(path)


def assert_same_run(run: Run, alone: Run) -> None:
    """Weights to 1e-5, and all that the log and the record count."""
    files = sorted(path.relative_to(alone.path) for path in alone.path.glob("*/adapter_model.safetensors"))
    files += sorted(path.relative_to(alone.path) for path in alone.path.glob("value_heads*"))
    assert files
    for file in files:
        ours, theirs = load_file(run.path / file), load_file(alone.path / file)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0.0, atol=1e-5)
    assert run.record.status == "done" and not (run.path / "checkpoints").exists()
    for counter in ("tokens_generated", "tokens_trained", "reward_calls"):
        assert getattr(run.record.cost, counter) == getattr(alone.record.cost, counter), counter
    assert len(run.metrics()) == len(alone.metrics())
    for ours, theirs in zip(run.metrics(), alone.metrics(), strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - CLOCKS - {"phase"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), f"{name}: {ours} {theirs}"
    assert run.record.notes.keys() == alone.record.notes.keys() and set(run.record.phases) == set(alone.record.phases)


# -- the same adapter ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("sft", ()),
        ("mo-odpo", ()),
        pytest.param("sft", ("accumulate=2",), marks=pytest.mark.slow),
        pytest.param("modpo", ("group_by_length=true", "accumulate=2"), marks=pytest.mark.slow),
        # Not with extremes=advantage: at first log-ratios are rounding alone, and choose between equal rewards.
        pytest.param("mo-odpo", ("group_by_length=true", "samples=4"), marks=pytest.mark.slow),
        pytest.param("moc", (), marks=pytest.mark.slow),
        pytest.param("ric", (), marks=pytest.mark.slow),
        pytest.param("evo-soups", (), marks=pytest.mark.slow),
        pytest.param("mod", (), marks=pytest.mark.slow),  # experts: a run inside a run
    ],
)
def test_two_processes_train_what_one_does(
    launch: Launch, words: Callable[..., list[str]], tmp_path: Path, method: str, more: tuple[str, ...]
) -> None:
    (alone,) = launch(1, words(method, "alone", *more))
    assert alone.code == 0, alone.err
    first, second = launch(2, words(method, "two", *more))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert json.loads(first.out)["status"] == "done" and second.out == ""
    methods = {path.name for path in (tmp_path / "alone").glob("runs/*/*")}
    for each in methods:
        assert_same_run(run_of(tmp_path / "two", each), run_of(tmp_path / "alone", each))


def test_each_process_reads_rows_of_every_batch_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process reads more rows at once than one alone would; a batch that rises in length is evenly shared."""
    assert [parts_of(16, accumulate, 2) for accumulate in (1, 2, 4, 8, 16)] == [1, 1, 2, 4, 8]
    assert parts_of(12, 4, 2) == 2 and parts_of(10, 5, 2) == 5  # of 6 rows 3 at a time, of 5 rows 1, where 2 fit
    of_each = []
    for rank in range(3):
        monkeypatch.setattr(processes, "_group", processes._Group(rank, 3, None))
        of_each.append(own_places(np.arange(12), 6).tolist())
    assert of_each == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_the_parts_of_all_processes_are_all_rows_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0, 1, 2, 7):
        parts: list[int] = []
        for rank in range(3):
            monkeypatch.setattr(processes, "_group", processes._Group(rank, 3, None))
            parts += processes.share(list(range(size)))
        assert parts == list(range(size))


# -- when one of them ends -------------------------------------------------------------------------------------------


def messages(*ended: Ended) -> list[str]:
    return [line for process in ended for line in process.err.splitlines() if line.startswith("error")]


@pytest.mark.parametrize("method", ["sft", pytest.param("moc", marks=pytest.mark.slow)])
def test_a_killed_process_ends_all_and_the_run_goes_on_with_two_or_with_one(
    launch: Launch, words: Callable[..., list[str]], tmp_path: Path, method: str
) -> None:
    first, second = launch(2, words(method, "two"), (1, 3, "kill"))
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    (message,) = messages(first, second)
    assert GONE in message and "the same command goes on" in message and "Traceback" not in first.err
    left = run_of(tmp_path / "two", method)
    assert left.record.status == "failed" and GONE in str(left.record.error)
    assert len(left.metrics()) >= 2 and list(left.path.glob("checkpoints/*/step-00000002"))
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for ended in launch(2, words(method, "two")) + launch(1, words(method, "one")) + launch(1, words(method, "alone")):
        assert ended.code == 0, ended.err
    for folder in ("two", "one"):
        assert_same_run(run_of(tmp_path / folder, method), run_of(tmp_path / "alone", method))


@pytest.mark.slow
def test_without_the_first_process_another_says_so(launch: Launch, words: Callable[..., list[str]]) -> None:
    first, second = launch(2, words("sft", "two"), (0, 3, "kill"))
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    assert len(messages(first, second)) == 1 and GONE in second.err


def test_what_fails_in_one_process_is_the_message_and_the_record_of_all(
    launch: Launch, words: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = launch(2, words("sft", "two"), (1, 1, "objective 'helpfulness': the scorer raised"))
    assert [process.code for process in ended] == [1, 1]
    assert messages(*ended) == ["error: objective 'helpfulness': the scorer raised"]
    assert run_of(tmp_path / "two", "sft").record.error == "WorkError: objective 'helpfulness': the scorer raised"


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "more", "variables", "message"),
    [
        ("sft", ["batch=5"], {}, "batch: found 5, which 2 processes cannot share equally; allowed: multiples of 2"),
        ("ric", ["online.batch=3"], {}, "online.batch: found 3, which 2 processes cannot share equally"),
        ("pcm", [], {}, "pcm cannot be trained by 2 processes: what its experts find of the sampled tokens is known"),
        ("sft", [], {"ACCELERATE_USE_FSDP": "true"}, "accelerate launch asks for FSDP"),
        ("sft", ["lrr=1"], {}, "did you mean"),
    ],
)
def test_what_processes_cannot_share_is_refused_once(
    launch: Launch,
    words: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    more: list[str],
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setitem(SETTINGS, "pcm", ("steps=2",))
    ended = launch(2, words(method, "two", *more), **variables)
    assert [process.code for process in ended] == [2, 2]
    (only,) = messages(*ended)
    assert message in only and not list(tmp_path.glob("two/runs/*/*/*"))


def test_other_commands_are_not_shared(launch: Launch) -> None:
    ended = launch(2, ["ls", "methods"])
    assert [process.code for process in ended] == [2, 2]
    (only,) = messages(*ended)
    assert "only moalign train shares its work; start it alone: moalign ls methods" in only


@pytest.mark.parametrize(("given", "kept"), [(None, "1"), ("4,5,6,7", "5"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_process_keeps_one_gpu(monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str) -> None:
    """So that no library takes all there are; more processes than GPUs share them."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if given is None else len(given.split(",")))
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    processes._keep_one_gpu(1 if given else 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == kept
    late = pytest.raises(RequestError, match="before anything uses a GPU")
    with monkeypatch.context() as patched, late:
        patched.setattr(torch.cuda, "is_initialized", lambda: True)
        processes._keep_one_gpu(0)
    # A script that has only asked whether there is a GPU: the driver sees all of them for good.
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 2, raising=False)
    with late:
        processes._keep_one_gpu(0)


# -- a real launcher -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_trains_and_when_a_worker_is_killed_ends_with_one_message(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    arguments = words("sft", "two", "steps=4000", "checkpoint_every=20", "log_every=20")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    launcher = subprocess.Popen([*torchrun, "-m", "moalign", *arguments], stderr=subprocess.PIPE, text=True)
    last = time.monotonic() + 600
    while not list(tmp_path.glob("two/runs/*/*/*/checkpoints/*/step-*/state.json")):
        assert launcher.poll() is None and time.monotonic() < last
        time.sleep(0.05)
    workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text(encoding="utf-8").split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    err = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 1
    ours = [line for line in err.splitlines() if line.startswith(("error: ", "terminated"))]
    assert len(ours) == 1 and (GONE in ours[0] or "finished work is kept" in ours[0])
    assert run_of(tmp_path / "two", "sft").status in ("failed", "interrupted")

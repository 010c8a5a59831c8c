"""Training that is stopped from outside: by SIGTERM, or by whoever takes its folder away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moalign import __main__

RESUMES = "finished work is kept: the same command resumes from there"


def record() -> dict[str, Any]:
    (path,) = Path("results/runs").glob("*/*/*/run.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_sigterm_is_an_interruption_with_its_own_exit_code(moalign: Any, toys: None) -> None:
    """Batch systems and supervisors send it; the checkpoint stays, and a process that goes on is as it was."""
    ended = moalign("train", "toy", "--set", "fail=terminate")
    assert ended.code == 143
    assert ended.err.splitlines()[-1] == f"terminated; {RESUMES}"
    assert record()["status"] == "interrupted"
    assert len(list(Path("results").rglob("step-00000001"))) == 1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_interruption_while_the_command_is_still_loading_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "moalign.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "moalign.cli.main", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert __main__.main() == 130
    assert capsys.readouterr().err == "interrupted; nothing was begun\n"


def test_a_handler_of_ones_own_stays(moalign: Any, toys: None) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        assert moalign("ls", "methods").code == 0
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM, signal.SIGTERM]


@pytest.mark.slow
def test_a_training_that_is_terminated_resumes_from_its_checkpoint(
    moalign: Any, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    sets = [*small_task, "steps=400", "batch=4", "samples=2", "checkpoint_every=2", "policy.lora={r: 4, alpha: 8}"]
    command = ["train", "mo-odpo", "--no-eval", "--json", *(part for text in sets for part in ("--set", text))]
    process = subprocess.Popen(
        [sys.executable, "-m", "moalign", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not list(Path("results").rglob("step-*/state.json")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1] == f"terminated; {RESUMES}"
    assert record()["status"] == "interrupted"
    assert list(Path("results").rglob("step-*/state.json"))
    shown = moalign("train", *command[1:4], "--dry-run", *command[4:])
    assert json.loads(shown.out)["status"] == "interrupted"


@pytest.mark.parametrize("how", ["remove", "move"])
def test_a_run_whose_folder_goes_while_it_trains_ends_with_one_message(moalign: Any, toys: None, how: str) -> None:
    """Nothing is written in the folder's place: half a run would be found there the next time."""
    ended = moalign("train", "toy", "--set", f"fail={how}")
    assert (ended.code, len(ended.errors)) == (1, 1)
    assert "the run's folder was removed or moved while the run was trained" in ended.errors[0]
    assert not Path(ended.errors[0].partition(":")[0]).exists()
    assert moalign("train", "toy", "--set", f"fail={how}").code == 1  # as at the first time

"""The environment is captured without importing or breaking anything."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moalign.runs import environment


def git(folder: Path, *arguments: str) -> str:
    told = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *told, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_capture_is_plain_json() -> None:
    found = environment.capture()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__
    assert set(found["packages"]) == set(environment.PACKAGES)
    assert found["cpus"] >= 1
    assert found["memory_bytes"] > 2**26


def test_version_of_a_missing_package() -> None:
    assert environment.version("no-such-package-anywhere") is None


def test_git_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.git_state(tmp_path) == (None, None)
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    assert environment.git_state(tmp_path) == (None, True)
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook
    assert environment.git_state(tmp_path) == (head, False)
    (tmp_path / "b").write_text("untracked")
    assert environment.git_state(tmp_path) == (head, True)


def test_folder_inside_a_repository_is_not_a_checkout(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "site-packages").mkdir()
    assert environment.git_state(tmp_path / "site-packages") == (None, None)


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state(tmp_path) == (None, None)


def test_threads_and_gpus_come_from_a_loaded_torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = environment.capture()
    assert (found["threads"], found["gpus"]) == (3, [])
    assert "torch" not in sys.modules
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, get_num_threads=lambda: 7))
    found = environment.capture()
    assert (found["threads"], found["gpus"]) == (7, ["GPU 0", "GPU 1"])

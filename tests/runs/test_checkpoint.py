"""Checkpoints: bit for bit, whole or passed over, pruned."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moalign.core.errors
from moalign.core.errors import RequestError
from moalign.runs import checkpoint

ROOT = Path(moalign.core.errors.__file__).parents[2]


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((4, 3), value), "rng": torch.get_rng_state()}


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def loaded(folder: Path) -> checkpoint.Checkpoint:
    found = checkpoint.load(folder)
    assert found is not None
    return found


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "missing") is None


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    parameter = torch.nn.Parameter(torch.tensor([1.0, math.nan, -math.inf, -0.0]))
    saved = {
        "parameter": parameter,
        "half": torch.randn(3).bfloat16(),
        "ids": torch.tensor([[1, 2], [3, 4]]),
        "mask": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "other empty": torch.zeros(0),
        "turned": base.t(),
        "row": base[2],
        "tied": base,
    }
    checkpoint.save(tmp_path, 3, saved, {})
    step, found, state = loaded(tmp_path)
    assert (step, state, set(found)) == (3, {}, set(saved))
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        same = tensor.detach().contiguous().flatten().view(torch.uint8) if tensor.dim() else tensor.reshape(1)
        back = found[name].flatten().view(torch.uint8) if tensor.dim() else found[name].reshape(1)
        assert torch.equal(back, same), name
        assert not found[name].requires_grad


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    generator.random(3)
    state: dict[str, Any] = {
        "numpy": generator.bit_generator.state,
        "python": random.Random(3).getstate(),
        "loss": 0.1 + 0.2,
        "best": -math.inf,
        "mean": np.float64(1 / 3),
        "text": "é \ud800",
    }
    checkpoint.save(tmp_path, 1, {}, state)
    found = loaded(tmp_path).state
    again = np.random.default_rng(0)
    again.bit_generator.state = found["numpy"]
    assert again.random(4).tolist() == generator.random(4).tolist()
    assert found["python"][1] == list(random.Random(3).getstate()[1])
    assert (found["loss"], found["best"], found["mean"]) == (0.1 + 0.2, -math.inf, 1 / 3)
    assert found["text"] == "é \ud800"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: "x"}}, r"state\.a: the key 1 is not text"),
        ({"a": [{"b": {(1, 2): 0}}]}, r"state\.a\[0\]\.b: the key \(1, 2\)"),
        ({"a": torch.zeros(2)}, "Tensor cannot be in a checkpoint's state"),
        ({"a": {1, 2}}, "set cannot be"),
    ],
)
def test_a_state_that_would_come_back_different_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        checkpoint.save(tmp_path, 1, {}, state)
    assert folders(tmp_path) == []


def test_negative_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        checkpoint.save(tmp_path, -1, {}, {})


def test_the_newest_wins_and_one_older_is_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, step, tensors(step), {"at": step})
    assert folders(tmp_path) == ["step-00000010", "step-00000011"]
    step, found, state = loaded(tmp_path)
    assert (step, state["at"], found["weight"][0, 0].item()) == (11, 11, 11.0)


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, tensors(1), {})
    checkpoint.save(tmp_path, 5, tensors(2), {})
    assert loaded(tmp_path).tensors["weight"][0, 0].item() == 2.0
    assert folders(tmp_path) == ["step-00000005"]


def test_steps_of_an_abandoned_future_go(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 10, tensors(), {})
    checkpoint.save(tmp_path, 20, tensors(), {})
    (tmp_path / "step-00000020" / "state.json").write_text("{")
    checkpoint.save(tmp_path, 15, tensors(), {})
    assert folders(tmp_path) == ["step-00000010", "step-00000015"]
    assert loaded(tmp_path).step == 15


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def change_state(path: Path) -> None:
    told = json.loads(path.read_text())
    told["content"] = told["content"].replace("20", "21")
    path.write_text(json.dumps(told))


DAMAGE = {
    "truncated tensors": lambda path: os.truncate(path / "tensors.safetensors", 40),
    "one bit of the tensors": lambda path: flip(path / "tensors.safetensors"),
    "no tensors": lambda path: (path / "tensors.safetensors").unlink(),
    "truncated state": lambda path: os.truncate(path / "state.json", 30),
    "changed state": lambda path: change_state(path / "state.json"),
    "no state": lambda path: (path / "state.json").unlink(),
    "state of another kind": lambda path: (path / "state.json").write_text("[]"),
    "null": lambda path: (path / "state.json").write_text("null"),
    "content that is no text": lambda path: (path / "state.json").write_text('{"content": 3, "sha256": {}}'),
    "nested deeply": lambda path: (path / "state.json").write_text("[" * 100_000),
    "a folder": lambda path: ((path / "state.json").unlink(), (path / "state.json").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path, 10, tensors(10), {"at": 10})
    checkpoint.save(tmp_path, 20, tensors(20), {"at": 20})
    DAMAGE[damage](tmp_path / "step-00000020")
    step, found, state = loaded(tmp_path)
    assert (step, state["at"], found["weight"][0, 0].item()) == (10, 10, 10.0)
    assert "step-00000020: damaged checkpoint passed over" in capsys.readouterr().err


def test_all_damaged_means_none(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 10, tensors(), {})
    flip(tmp_path / "step-00000010" / "tensors.safetensors")
    assert checkpoint.load(tmp_path) is None


def test_loaded_tensors_survive_the_pruning_of_their_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, tensors(1), {})
    found = loaded(tmp_path).tensors["weight"]
    for step in (2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {})
    assert not (tmp_path / "step-00000001").exists()
    assert torch.equal(found, torch.full((4, 3), 1.0))
    found += 1  # ours to change


@pytest.mark.slow
def test_sigkill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import torch
from moalign.runs import atomic, checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 10, {"weight": torch.ones(3)}, {"at": 10})
atomic._swap_in = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)  # tensors and state written, not yet renamed
checkpoint.save(folder, 20, {"weight": torch.zeros(3)}, {"at": 20})
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL
    assert len(folders(tmp_path)) == 2
    step, found, state = loaded(tmp_path)
    assert (step, state, found["weight"].tolist()) == (10, {"at": 10}, [1.0, 1.0, 1.0])


def test_tensor_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save_tensors(path, {"a": torch.arange(4)})
    assert checkpoint.load_tensors(path)["a"].tolist() == [0, 1, 2, 3]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(RequestError, match=r"a\.safetensors: truncated, or not a safetensors file"):
        checkpoint.load_tensors(path)
    with pytest.raises(RequestError, match=r"b\.safetensors: no such file"):
        checkpoint.load_tensors(tmp_path / "b.safetensors")

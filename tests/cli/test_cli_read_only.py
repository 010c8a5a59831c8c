"""A results folder that nobody may write to: what is in it can still be read, evaluated, asked, exported, compared."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moalign.rewards.store import Store

SMALL = [
    part
    for text in ("grid=3", "evaluation.prompts=8", "evaluation.samples=1", "evaluation.bootstrap=100")
    for part in ("--set", f"task.{text}")
]
_OVERRIDE, _OWNER = 1 << 1, 1 << 3
"""CAP_DAC_OVERRIDE and CAP_FOWNER, by which root writes where permissions forbid it."""


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Let permissions bind this thread, though it is root's: its two capabilities are taken away for a while."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, held) != 0:
        pytest.skip("this system does not tell a process's capabilities")
    less = (ctypes.c_uint32 * 6)(*held)
    less[0] &= ~(_OVERRIDE | _OWNER) & 0xFFFFFFFF  # of those in effect; they stay permitted, to be taken back
    if libc.capset(header, less) != 0:
        pytest.skip("this system does not let a process give up capabilities")
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away every right to write in a folder, and give it back."""
    paths = [folder, *folder.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        with without_roots_rights():
            with pytest.raises(PermissionError):
                (folder / "probe").touch()
            yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@pytest.fixture
def trained(moalign: Any, toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two finished, evaluated runs in ``results``, and an empty cache."""
    made = [json.loads(moalign("train", "toy", "--seed", str(k), "--json", *SMALL).out)["run_id"] for k in (0, 1)]
    gc.collect()  # a command's process would have ended here: until its score store is closed, SQLite writes to it
    assert not list(tmp_path.rglob("*.sqlite-*"))
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    return made


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_read_from_a_read_only_folder(moalign: Any, trained: list[str], tmp_path: Path) -> None:
    before = content(tmp_path / "results")
    prompt = ("how do i make soup ?", "--prefs", "1,0", "--json")
    commands = {
        "ls": ("ls", "runs", "--json"),
        "show": ("show", trained[0], "--json"),
        "eval": ("eval", trained[0], "--json"),
        "generate": ("generate", trained[0], *prompt),
        "compare": ("compare", *trained, "--json"),
        "suite": ("compare", "--methods", "toy", "--seeds", "2", *SMALL, "--json"),
        "train": ("train", "toy", "--seed", "1", *SMALL, "--json"),  # found finished
        "score": ("score", "--task", "sandbox", "--in", "rows.jsonl", *SMALL, "--json"),
    }
    Path("rows.jsonl").write_text(json.dumps({"prompt": "how do i make soup ?", "response": "you could ask ."}))
    with read_only(tmp_path / "results"):
        for name, command in commands.items():
            ended = moalign(*command)
            assert (ended.code, ended.errors) == (0, []), (name, ended.err)
            if name in ("compare", "suite"):
                assert Path(json.loads(ended.out)["json"]).is_relative_to(tmp_path / "cache" / "compare")
    assert content(tmp_path / "results") == before


def test_what_must_write_there_is_refused_at_once_with_the_folder(moalign: Any, trained: list[str]) -> None:
    new = ("--seed", "7", *SMALL)
    commands = (
        ("train", "toy", *new),
        ("eval", trained[0], "--grid", "2"),
        ("compare", "--methods", "toy", "--seeds", "3", *SMALL),
        ("compare", *trained, "--grid", "2"),
    )
    with read_only(Path("results")):
        for command in commands:
            ended = moalign(*command)
            assert (ended.code, ended.out, len(ended.errors)) == (2, "", 1), (command, ended.err)
            assert "cannot write here: Permission denied" in ended.errors[0]
            assert "results" in ended.errors[0] and "--results DIR" in ended.errors[0]
            assert "training 3/3" not in ended.err and "answering" not in ended.err


def test_a_normaliser_that_is_not_there_is_kept_in_the_users_cache(
    moalign: Any, toys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = json.loads(moalign("train", "toy", "--no-eval", "--json", *SMALL).out)["run_id"]
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    shutil.rmtree("results/tasks")  # as when the runs alone were copied
    with read_only(Path("results")):
        ended = moalign("generate", run, "how do i make soup ?", "--prefs", "1,0")
        assert (ended.code, ended.errors) == (0, [])
    assert len(list(Path("cache/tasks").rglob("normaliser.json"))) == 1


def test_an_export_leaves_the_results_alone(
    moalign: Any, picky: None, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    sets = [part for text in (*small_task, "policy.lora={r: 4, alpha: 8, dropout: 0.0}") for part in ("--set", text)]
    run = json.loads(moalign("train", "picky", "--prefs", "1,0", "--no-eval", "--json", *sets).out)["run_id"]
    with read_only(tmp_path / "results"):
        ended = moalign("export", run, "--prefs", "1,0", "--out", "out")
    assert (ended.code, ended.errors) == (0, [])
    assert Path("out/adapter_model.safetensors").is_file()


def test_scores_are_read_from_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    path, pair = tmp_path / "tasks" / "scores.sqlite", ("prompt", "response")
    with Store(path) as store:
        store.put_many("one", [pair], [0.25])
        with read_only(path.parent), Store(path) as beside:  # while another process has it open
            assert beside.get_many("one", [pair]) == [0.25]
    with read_only(path.parent), Store(path) as store:
        store.put_many("two", [pair], [0.5])
        assert (store.get_many("one", [pair]), store.get_many("two", [pair]), len(store)) == ([0.25], [None], 1)
    path.unlink()
    with read_only(path.parent), Store(path) as store:
        assert store.get_many("one", [pair]) == [None]

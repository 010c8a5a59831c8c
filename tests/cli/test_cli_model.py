"""``moalign model convert`` as typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(moalign: Any, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``old``: a base whose weights are pickled; the cache is the test's own."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    place = Path("old")
    place.mkdir()
    for path in random_base.iterdir():
        if path.suffix != ".safetensors":
            (place / path.name).write_bytes(path.read_bytes())
    torch.save(load_file(random_base / "model.safetensors"), place / "pytorch_model.bin")
    return place


def test_a_folder_is_converted_and_then_used_by_its_name(moalign: Any, folder: Path) -> None:
    use = ("preview", "--task", "sandbox", "--set", "task.model=old")
    ended = moalign(*use)
    assert ended.code == 2
    command = ended.errors[0].partition("without running any: moalign ")[2].partition(" (or")[0]
    assert command.startswith("model convert ")
    ended = moalign(*shlex.split(command))
    assert (ended.code, ended.err) == (0, "")
    assert "converted" in ended.out and "tensors" in ended.out
    assert moalign(*use).code == 0
    content = json.loads(moalign("model", "convert", "old", "--json").out)
    assert content["reused"] is True and Path(content["converted"], "model.safetensors").is_file()


def test_what_cannot_be_converted_is_one_message(moalign: Any, folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()
    for arguments, message in (
        (("old",), "has no weights"),
        (("nowhere",), "there is no such folder"),
        ((), "missing argument 'FOLDER'"),
    ):
        ended = moalign("model", "convert", *arguments)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (2, "", 1)
        assert message in ended.errors[0]

"""Tensors and checkpoints on disk: safetensors and JSON, never pickle.

A checkpoint is a folder ``step-00000050`` with ``tensors.safetensors`` and ``state.json``, which carries the checksums
of both. It appears by one rename; a damaged one is passed over in favour of the one before it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moalign.core.errors import RequestError
from moalign.core.text import visible
from moalign.runs import atomic

if TYPE_CHECKING:
    import torch

TENSORS = "tensors.safetensors"
STATE = "state.json"
KEPT = 2
"""Checkpoints kept per phase: the newest and, in case it is damaged, the one before."""


class Checkpoint(NamedTuple):
    """Where training stood after ``step`` steps."""

    step: int
    tensors: dict[str, torch.Tensor]
    """On the CPU, with the type and bits they were saved with."""
    state: dict[str, Any]
    """JSON values; tuples come back as lists."""


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of ``step`` below ``folder`` and prune older ones; return its folder.

    Checkpoints of later steps (of a future that a resume gave up) go as well.

    Raises:
        TypeError: ``state`` holds a key that is not text or a value that JSON cannot hold.
        RequestError: the disk is full or read-only.
    """
    if step < 0:
        raise ValueError(f"a checkpoint's step is at least 0; found {step}")
    _check_keys(state, "state")
    # NaN and infinity are kept: training must continue with the same numbers.
    content = json.dumps({"step": step, "state": dict(state)}, default=_number)
    target = folder / f"step-{step:08d}"
    with atomic.directory(target) as temporary:
        _write_tensors(tensors, temporary / TENSORS)
        sums = {"content": hashlib.sha256(content.encode()).hexdigest(), "tensors": file_sum(temporary / TENSORS)}
        text = f'{{"format": 1, "sha256": {json.dumps(sums)}, "content": {json.dumps(content)}}}\n'
        (temporary / STATE).write_text(text, encoding="utf-8")
    older = [saved for saved in _steps(folder) if saved < step]
    later = [saved for saved in _steps(folder) if saved > step]
    for stale in later + older[KEPT - 1 :]:
        atomic.remove_directory(folder / f"step-{stale:08d}")
    return target


def load(folder: Path) -> Checkpoint | None:
    """Return the newest undamaged checkpoint below ``folder``, or None; a damaged one is named on stderr."""
    for step in _steps(folder):
        path = folder / f"step-{step:08d}"
        try:
            return _read(path)
        except Exception as error:  # whatever the content of a damaged file leads to
            print(visible(f"warning: {path}: damaged checkpoint passed over ({error})"), file=sys.stderr)
    return None


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file atomically."""
    with atomic.file(path) as temporary:
        _write_tensors(tensors, temporary)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises RequestError naming the file when it is missing, truncated or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RequestError(f"{path}: no such file; the run is not finished or its folder is not whole")
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path}: truncated, or not a safetensors file ({error}); train the run again") from error


def _read(path: Path) -> Checkpoint:
    """Read one checkpoint; raises some Exception when it is damaged."""
    from safetensors.torch import load_file

    stored = atomic.parsed_json((path / STATE).read_bytes())
    content = stored["content"]
    if hashlib.sha256(content.encode()).hexdigest() != stored["sha256"]["content"]:
        raise ValueError(f"{STATE} does not match its checksum")
    if file_sum(path / TENSORS) != stored["sha256"]["tensors"]:
        raise ValueError(f"{TENSORS} does not match its checksum")
    parsed = json.loads(content)
    return Checkpoint(int(parsed["step"]), dict(load_file(path / TENSORS)), dict(parsed["state"]))


def _steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints below ``folder``, newest first."""
    names = [path.name for path in folder.glob("step-*") if path.is_dir()]
    return sorted((int(name[5:]) for name in names if name[5:].isdecimal()), reverse=True)


def _number(value: Any) -> Any:
    if type(value).__module__.split(".")[0] == "numpy":
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be in a checkpoint's state; tensors go into `tensors`")


def _check_keys(value: Any, where: str) -> None:
    """Refuse keys that JSON would silently turn into text: they would come back different."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: the key {key!r} is not text and would not come back the same")
            _check_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_keys(item, f"{where}[{index}]")


def _write_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    ready: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses two names for the same memory
        storages.add(tensor.untyped_storage().data_ptr())
        ready[name] = tensor
    save_file(ready, path)


def file_sum(path: Path | str) -> str:
    """Return the SHA-256 of a file's content, in hex digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Reads pickled weights in a process of its own and writes them as safetensors; the only place that unpickles.

Run as a file, ``python unpickle.py FILE TARGET [FILE TARGET]...``, it prints one JSON object: ``tensors`` (how many) or
``problem``.

What guards it: torch's restricted unpickler (``weights_only=True``) builds tensors and calls nothing that a file names.
Should a file get around that, an audit hook that cannot be taken away refuses sockets, processes, libraries and writing
files to whatever is run as Python. It does not hold native code, as of a flaw in torch's own reader: for files of
somebody you don't trust, use a machine or container without a network.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CLOSED = {"socket", "subprocess", "os", "shutil", "pty", "winreg", "urllib", "http", "ftplib", "smtplib", "webbrowser"}
_OPEN = {"os.listdir", "os.scandir", "os.walk"}
"""What finding a module needs."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what reading weights does not need."""
    closed = event.partition(".")[0] in _CLOSED and event not in _OPEN
    writes = event == "open" and bool((arguments[2] or 0) & _WRITING)
    if closed or writes or event == "ctypes.dlopen":
        raise RuntimeError(f"it tried {event}")


def read(file: Path) -> dict[str, Any]:
    """Return the tensors of a file by name, each contiguous and with memory of its own, as safetensors needs them.

    Tensors that share memory (tied weights) become copies: whoever loads them ties them again. Raises ValueError for
    anything that is no plain tensor.
    """
    import torch

    content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by name")
    tensors = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"it holds a {type(tensor).__name__} called {str(name)[:100]!r}, not tensors by name")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"{name[:100]!r} is no plain tensor ({tensor.layout}, {tensor.device})")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name[:100]!r} repeats its numbers: {list(tensor.shape)} of fewer in the file")
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def _why(error: Exception) -> str:
    """Return the reason in a few words: torch writes a page, with advice to load the file all the same."""
    text = str(error)
    if named := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it needs {named[1]}, which is no part of weights and may run code"
    lines = [line.strip() for line in text.splitlines() if not re.search("(?i)weights.only|documentation", line)]
    why = next(filter(None, lines), "").partition(". This is")[0][:200]
    return (
        why if type(error) is ValueError else f"it is damaged or was not saved by torch ({type(error).__name__}: {why})"
    )


def main(arguments: Sequence[str]) -> int:
    """Convert each FILE to its TARGET; return 0, or 1 after a problem."""
    import safetensors.torch
    import torch

    torch.set_num_threads(1)
    sys.addaudithook(_guard)
    count = 0
    for file, target in zip(arguments[::2], arguments[1::2], strict=True):
        try:
            tensors = read(Path(file))
        except Exception as error:  # whatever a hostile or damaged file leads to
            print(json.dumps({"problem": f"{file}: {_why(error)}"}))
            return 1
        safetensors.torch.save_file(tensors, target, metadata={"format": "pt"})
        count += len(tensors)
        del tensors
    print(json.dumps({"tensors": count}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

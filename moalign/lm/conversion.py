"""Pickled weights of a model folder to safetensors, once, on request: ``moalign model convert FOLDER``.

The converted folder stands in the cache under the content of the files that it was made of; where the folder is named,
:func:`moalign.lm.model_folder.local_folder` takes the converted one. Moving the folder keeps it, a change of any of its
files needs a new conversion.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError, WorkError
from moalign.core.paths import CACHE_REMEDY
from moalign.lm import model_folder, unpickle
from moalign.runs import atomic

_PASSED = "PATH HOME LANG LC_ALL TMPDIR LD_LIBRARY_PATH PYTHONHOME PYTHONPATH VIRTUAL_ENV OMP_NUM_THREADS SYSTEMROOT"
"""What the process that unpickles is given of the environment: no tokens."""


@dataclass(frozen=True)
class Conversion:
    """A converted model folder."""

    folder: str
    """As it was named; goes on being the name of the model."""
    converted: str
    """The folder in the cache."""
    fingerprint: str
    tensors: int
    bytes: int
    """Size of the weights."""
    reused: bool
    """It had been converted before."""


def convert(name: str) -> Conversion:
    """Convert a folder's pickled weights and return where they are; finds what was converted before.

    Raises RequestError for a folder that is not there, needs no conversion or lacks config or tokenizer; for weights
    that are damaged, hold more than tensors or would run code; for a cache that cannot be written. Of two processes
    that call this at once, one converts and the other waits.
    """
    from filelock import FileLock

    folder, where = Path(name).expanduser().resolve(), f"FOLDER {name}"
    weights = _weights(folder, where)
    try:
        place = model_folder.conversion(folder, weights)
    except OSError as error:
        raise RequestError(f"{where}: its files cannot be read: {error}") from error
    reused = place.is_dir()
    with atomic.refusals(place.parent, CACHE_REMEDY):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not place.is_dir():
                with atomic.directory(place, remedy=CACHE_REMEDY) as target:
                    _fill(folder, weights, target, where)
    files = model_folder.weight_files(place, where)
    return Conversion(
        folder=name,
        converted=str(place),
        fingerprint=model_folder.fingerprint(place, where),
        tensors=len(model_folder.shapes(place, where)),
        bytes=sum(file.stat().st_size for file in files),
        reused=reused,
    )


def _weights(folder: Path, where: str) -> list[Path]:
    """Return the pickled weights of a folder that can be converted, led by their index where there are several."""
    if not os.path.isdir(folder):
        raise RequestError(
            f"{where}: there is no such folder; a hub model is fetched first: hf download OWNER/NAME --local-dir FOLDER"
        )
    model_folder.read_config(folder, where)
    try:
        weights = model_folder.pickled(folder)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from error
    if not weights:
        model_folder.weight_files(folder, where)  # its messages say what is missing
        raise RequestError(f"{where}: its weights are safetensors already; there is nothing to convert")
    model_folder.require_tokenizer(folder, where)
    return weights


def _fill(folder: Path, weights: list[Path], target: Path, where: str) -> None:
    """Write the converted folder: what stands beside the weights as it is, weights as safetensors, their origin."""
    for path in model_folder.beside(folder):
        shutil.copyfile(path, target / path.name)
    pickles = [path for path in weights if path.suffix == ".bin"]  # without their index
    numbers = [f"-{number:05d}-of-{len(pickles):05d}" for number in range(1, len(pickles) + 1)]
    names = [f"model{number if len(pickles) > 1 else ''}.safetensors" for number in numbers]
    _unpickle(dict(zip(pickles, (target / name for name in names), strict=True)), where)
    shapes = {name: model_folder.header(target / name, where) for name in names}
    if len(names) > 1:
        size = sum((target / name).stat().st_size for name in names)
        index = {
            "metadata": {"total_size": size},
            "weight_map": {tensor: name for name, held in shapes.items() for tensor in sorted(held)},
        }
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    source = {"files": [path.name for path in weights], "changes": "pickled weights saved as safetensors by moalign"}
    (target / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def _unpickle(files: dict[Path, Path], where: str) -> None:
    """Have each file written to its target by a process of its own: :mod:`moalign.lm.unpickle` says what guards it."""
    environment = {name: os.environ[name] for name in _PASSED.split() if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # -P and -B: neither the current folder nor a cache of bytecode takes part.
    command = [sys.executable, "-P", "-B", unpickle.__file__, *(str(path) for pair in files.items() for path in pair)]
    ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    answer: dict[str, Any] = {}
    lines = ended.stdout.splitlines()
    if lines and lines[-1].startswith("{"):
        answer = json.loads(lines[-1])
    if "problem" in answer:
        raise RequestError(
            f"{where}: its weights cannot be converted: {answer['problem']}; copy the file again, or get the model as "
            "safetensors"
        )
    if ended.returncode != 0 or "tensors" not in answer:
        why = f"failed: {(ended.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
        if ended.returncode < 0:
            why = f"was ended by signal {-ended.returncode} (no memory left?)"
        raise WorkError(f"{where}: the process that reads its weights {why}")

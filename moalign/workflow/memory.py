"""A simple estimate of GPU memory: frozen weights, and LoRA adapters with what training them needs.

Shapes are read from the headers of the safetensors files, so that nothing is loaded.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moalign import model_folder
from moalign.config.recipe import LoraSpec

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2}
TRAINED = 16
"""Bytes per adapter parameter: float32 weight, gradient and Adam's two moments."""
_NOT_ADAPTED = re.compile(r"(embed|wte|wpe|lm_head|score|norm)", re.IGNORECASE)
"""peft's ``all-linear`` leaves out the output layer; embeddings and norms are not linear layers."""


@dataclass(frozen=True)
class Estimate:
    """Memory in GiB, without activations, rollouts and reward models."""

    parameters: int
    adapted: int
    dtype: str

    @property
    def weights_gib(self) -> float:
        """The frozen base."""
        return self.parameters * WIDTH[self.dtype] / GIB

    @property
    def adapters_gib(self) -> float:
        """Adapters with gradients and optimiser state."""
        return self.adapted * TRAINED / GIB

    @property
    def total_gib(self) -> float:
        """Both."""
        return self.weights_gib + self.adapters_gib

    def told(self) -> dict[str, Any]:
        """Return the estimate for ``--json``."""
        return {
            "parameters": self.parameters,
            "adapter_parameters": self.adapted,
            "weights_gib": self.weights_gib,
            "adapters_gib": self.adapters_gib,
            "total_gib": self.total_gib,
        }

    def sentence(self) -> str:
        """Return the estimate in words."""
        return (
            f"{self.total_gib:.2f} GiB: weights {self.weights_gib:.2f} ({self.parameters / 1e6:.1f} M parameters in "
            f"{self.dtype}), adapters with gradients and optimiser {self.adapters_gib:.2f} "
            f"({self.adapted / 1e6:.1f} M parameters)"
        )


def estimate(folder: Path, dtype: str, lora: LoraSpec) -> Estimate:
    """Estimate a run's memory from a checked model folder (:func:`moalign.model_folder.check`)."""
    files = model_folder.weight_files(folder, "model")
    shapes = {name: shape for file in files for name, shape in _shapes(file).items()}
    adapted = sum(lora.r * sum(shape) for name, shape in shapes.items() if _is_adapted(name, shape, lora.targets))
    return Estimate(sum(prod(shape) for shape in shapes.values()), adapted, dtype)


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _is_adapted(name: str, shape: list[int], targets: list[str] | str) -> bool:
    """Whether LoRA's ``targets`` adapt this tensor: two matrices ``[r, in]`` and ``[out, r]`` beside ``[out, in]``."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    module = name.removesuffix(".weight")
    if targets == "all-linear":
        return _NOT_ADAPTED.search(module) is None
    if isinstance(targets, str):  # peft reads a text as a regular expression over the whole name
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)

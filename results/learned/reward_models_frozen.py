"""The lower layers of a Llama, which adapters above them leave as they are, read every text once and for all.

With adapters on the last four of thirty layers, the first twenty-six answer a text alike in every step of every
training, and to every judge: for each loss, and each seed. What they say is kept, a file for each text.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def read_once(frozen: int, folder: Path) -> Iterator[None]:
    """Let the first ``frozen`` layers of every Llama read a text only if ``folder`` has no states of it yet.

    All Llamas that run meanwhile must have these layers in common, without adapters, in float32 on a CPU; rows are
    padded on the right. ``folder`` belongs to one set of weights; several processes may use it at once.
    """
    from transformers.models.llama.modeling_llama import LlamaModel

    whole = LlamaModel.forward

    def forward(model: Any, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        """Run the layers above on what those below say of each row."""
        with torch.no_grad():
            states = _states(model, whole, input_ids, attention_mask, frozen, folder)
        with _only(model, slice(frozen, None), model.norm):
            return whole(model, attention_mask=attention_mask, **more | {"inputs_embeds": states})

    LlamaModel.forward = forward
    try:
        yield
    finally:
        LlamaModel.forward = whole


@contextlib.contextmanager
def _only(model: Any, layers: slice, norm: torch.nn.Module) -> Iterator[None]:
    """Let a model have some of its layers only, and another last norm."""
    before = model.layers, model.norm
    model.layers, model.norm = model.layers[layers], norm
    try:
        yield
    finally:
        model.layers, model.norm = before


def _states(model: Any, whole: Any, ids: Any, mask: Any, frozen: int, folder: Path) -> torch.Tensor:
    """Return the states ``[rows, tokens, width]`` after the frozen layers; 0 where a row is padded."""
    lengths = mask.sum(1).tolist()
    if not bool(mask[:, 0].all() and (mask[:, 1:] <= mask[:, :-1]).all()):
        raise ValueError("rows must be padded on the right")
    names = [_name(row[:length].tolist()) for row, length in zip(ids, lengths, strict=True)]
    new = [at for at, name in enumerate(names) if not (folder / name).is_file()]
    if new:
        with _only(model, slice(frozen), torch.nn.Identity()):
            read = whole(model, input_ids=ids[new], attention_mask=mask[new]).last_hidden_state
        for row, at in enumerate(new):
            _write(folder / names[at], read[row, : lengths[at]].numpy())
    states = torch.zeros(*ids.shape, model.config.hidden_size)
    for at, name in enumerate(names):
        states[at, : lengths[at]] = torch.from_numpy(np.load(folder / name))
    return states


def _name(ids: list[int]) -> str:
    """Return the name of the file of a text's states."""
    return hashlib.sha256(np.asarray(ids, np.int64).tobytes()).hexdigest() + ".npy"


def _write(path: Path, states: np.ndarray) -> None:
    """Write a text's states, all of them or none."""
    from moalign.runs import atomic

    with atomic.file(path) as place, place.open("wb") as file:
        np.save(file, states)

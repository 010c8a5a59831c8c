"""Several adapters of one base in one forward pass: rows ``[n * rows, ...]``, those of the first adapter first.

peft's own way (``adapter_names``, one a row) takes the adapters of a layer one after another and needs a list as long
as the batch. Here the adapters of a layer are stacked, so that each layer is one product more for all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from moalign.core.errors import RequestError
from moalign.lm.adapters import MERGE_BELOW, changes, lora_layers, with_change
from moalign.lm.language_model import LanguageModel


class SideBySide:
    """A model that reads ``len(names)`` equal parts of its rows, each with its own adapter.

    Small models fold the adapters into stacked copies of the weights that they change, which costs no more per token
    than the base; for large ones the stacked factors alone are kept, and the base stays the only one. No other adapter
    has a say, whichever is active; one that is attached later may bring layers of its own, and needs a new object.
    """

    def __init__(self, lm: LanguageModel, names: Sequence[str]) -> None:
        """Stack the adapters ``names`` of ``lm``; the model itself stays as it is.

        Raises RequestError for DoRA adapters, which change a layer by more than a product of two matrices.
        """
        layers = lora_layers(lm)
        if any(name in layer.lora_magnitude_vector for layer in layers for name in names):
            raise RequestError("experts cannot be read side by side: one of their adapters is a DoRA adapter")
        linear = _folded if not lm.in_4bit and lm.model.num_parameters() <= MERGE_BELOW else _stacked
        self.lm, self.names = lm, list(names)
        self._forwards = [(layer, _forward(layer, names, linear)) for layer in layers]

    @property
    def config(self) -> Any:
        """The model's own."""
        return self.lm.model.config

    def __call__(self, **inputs: Any) -> Any:
        """Call the model with ``n`` parts of rows."""
        with self.on():
            return self.lm.model(**inputs)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Within the block the model itself reads n parts of rows."""
        try:
            for layer, forward in self._forwards:
                layer.forward = forward
            yield
        finally:
            for layer, _ in self._forwards:
                layer.__dict__.pop("forward", None)  # the class's own again


Forward = Callable[..., Tensor]
"""What a layer makes of n parts of rows."""


def _forward(layer: Any, names: Sequence[str], linear: Callable[[Any, Sequence[str]], Forward]) -> Forward:
    """Return a layer's; ``linear`` makes those of linear layers."""
    if not any(changes(layer, name) for name in names):
        base: Forward = layer.get_base_layer().__call__  # the layer's own would add the active adapter
        return base
    return (_embedded if layer.lora_embedding_A else linear)(layer, names)


def _embedded(layer: Any, names: Sequence[str]) -> Forward:
    base, tables = layer.get_base_layer(), [{"weight": with_change(layer, name)} for name in names]

    def forward(ids: Tensor, *_: Any, **__: Any) -> Tensor:
        parts = zip(ids.chunk(len(tables)), tables, strict=True)
        return torch.cat([functional_call(base, table, (part,)) for part, table in parts])  # some scale what they find

    return forward


def _folded(layer: Any, names: Sequence[str]) -> Forward:
    base = layer.get_base_layer()
    weights = torch.stack([with_change(layer, name) for name in names])  # [n, out, in]
    if layer.fan_in_fan_out:  # GPT-2's layers keep [in, out]
        weights = weights.mT

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        out = torch.bmm(x.reshape(len(weights), -1, x.shape[-1]), weights.mT)
        return (out if base.bias is None else out + base.bias).reshape(*x.shape[:-1], -1)

    return forward


def _stacked(layer: Any, names: Sequence[str]) -> Forward:
    base = layer.get_base_layer()
    down, up = _factors(layer, names)
    return partial(_with_factors, base, down, up)


def _with_factors(base: Any, down: Tensor, up: Tensor, x: Tensor, *_: Any, **__: Any) -> Tensor:
    out: Tensor = base(x)
    parts = x.reshape(len(down), -1, x.shape[-1]).to(down.dtype)
    return out + torch.bmm(torch.bmm(parts, down), up).reshape(out.shape).to(out.dtype)


def _factors(layer: Any, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return A's ``[n, in, rank]`` and scaled B's ``[n, rank, out]``; smaller ranks are filled up with zeros."""
    known = [name for name in names if name in layer.lora_A]
    rank = max(layer.lora_A[name].weight.shape[0] for name in known)
    first = layer.lora_A[known[0]].weight
    outputs = layer.lora_B[known[0]].weight.shape[0]
    down = first.new_zeros(len(names), first.shape[1], rank)
    up = first.new_zeros(len(names), rank, outputs)
    for index, name in enumerate(names):
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight.data, layer.lora_B[name].weight.data
            down[index, :, : a.shape[0]] = a.T
            up[index, : a.shape[0]] = layer.scaling[name] * b.T
    return down, up

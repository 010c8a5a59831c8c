"""Training that gives the same weights, bit for bit, on every machine; for models of the sandbox's size.

Processors add in different orders, and training turns the last bit of a sum into other weights within a few hundred
steps (measured on the sandbox's base: a difference of 1e-12 at step 100 is 0.17 at step 200). So it computes in double
precision (:func:`in_double`) and after every step rounds each weight to a multiple of 1 / :data:`GRID`
(:func:`to_grid`), far coarser than such differences, which thereby vanish before they grow. Tried with the code that
PyTorch and MKL have for two kinds of processors; not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moalign.core.errors import RequestError

if TYPE_CHECKING:
    import torch

GRID = 2.0**17
"""Weights are multiples of 1 / GRID. Sums in another order move a weight by about 1e-15 in a step, so that one of
100,000 falls on the other side of a border about once in 100,000 steps. The weights stay the same numbers in single
precision."""


def in_double(model: Any) -> Any:
    """Change a Llama model, with any head, to compute in double precision throughout; returns it.

    Raises RequestError for another kind of model.
    """
    if model.config.model_type != "llama":
        raise RequestError(f"reproducible: found a model of type {model.config.model_type}; allowed: llama")
    import torch

    def norm(old: Any) -> torch.nn.RMSNorm:
        new = torch.nn.RMSNorm(old.weight.shape, eps=old.variance_epsilon)
        new.load_state_dict(old.state_dict())
        return new

    trunk = model.model
    trunk.rotary_emb = _rotation(model.config)
    trunk.norm = norm(trunk.norm)
    for layer in trunk.layers:
        layer.input_layernorm = norm(layer.input_layernorm)
        layer.post_attention_layernorm = norm(layer.post_attention_layernorm)
    return model.double()


def draw(weights: Iterable[torch.Tensor], std: float, seed: int) -> None:
    """Draw weights from a normal distribution, in place; in single precision processors draw other last bits."""
    import torch

    weights = list(weights)
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        torch.nn.init.normal_(weight, std=std, generator=generator)
    to_grid(weights)


def to_grid(weights: Iterable[torch.Tensor]) -> None:
    """Round weights to the nearest multiple of 1 / GRID, in place."""
    for weight in weights:
        weight.detach().mul_(GRID).round_().div_(GRID)


def _rotation(config: Any) -> torch.nn.Module:
    """Return a module of rotary angles in the states' own precision; transformers computes them in single."""
    import torch

    size = config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]

    class Rotation(torch.nn.Module):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Return cosines and sines ``[rows, places, size]``."""
            steps = torch.arange(0, size, 2, dtype=x.dtype, device=x.device)
            angles = position_ids[..., None] * theta ** -(steps / size)
            angles = torch.cat([angles, angles], dim=-1)
            return angles.cos(), angles.sin()

    return Rotation()

"""Whether a model can be read token by token, as the sampler does: it is tried where layers keep a state.

Attention remembers all tokens, or a window of them, in a cache that the model is given. Recurrent layers keep a state,
and each kind of model has its own way to keep it: some take a cache under another name, so that the sampler's would
vanish without a word, and some keep it where rows cannot be repeated or leave.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moalign.core.errors import RequestError
from moalign.lm.loading import first_line
from moalign.lm.log_probs import positions
from moalign.lm.sampler import NextToken

FAR, FAR_IN_HALF = 0.01, 0.2
"""How far logits may be from those of whole rows, as a share of what these vary by over the vocabulary; both are root
mean squares. Rounding makes 0.0001 in single precision and 0.03 in bfloat16 (tiny models of random weights)."""


def require(model: Any, where: str) -> None:
    """Raise RequestError unless the sampler draws from what ``model`` makes of whole rows.

    A model that takes the cache and has layers of attention alone is not tried, nor is one on the meta device.
    """
    cannot = f"{where}: a {model.config.model_type} model cannot be sampled"
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        raise RequestError(
            f"{cannot}: {type(model).__name__} takes no past_key_values, in which the sampler keeps what was read, so "
            "each token would be drawn knowing the one before it alone; take a model that does"
        )
    try:
        layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if layers <= {DynamicLayer, DynamicSlidingWindowLayer} or model.device.type == "meta":
            return
        apart, spread = _apart(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # caches refuse in many ways
        raise RequestError(f"{cannot} token by token ({type(error).__name__}: {first_line(error)})") from None
    if not apart <= (FAR if model.dtype in (torch.float32, torch.float64) else FAR_IN_HALF) * spread:
        raise RequestError(
            f"{cannot}: read token by token, padded and beside other rows, its logits differ by {apart:.2g} from those "
            f"of whole rows, of {spread:.2g} that they vary by; take another model"
        )


@torch.no_grad()
def _apart(model: Any) -> tuple[float, float]:
    """Return how far logits of made-up rows are from those of each row alone, and how much these vary themselves.

    Two prompts, one of them padded, become four rows, of which three go on: all that the sampler does to rows.
    """
    words, prompt, new = int(model.get_input_embeddings().weight.shape[0]), 6, 3
    ids = (torch.arange(3 * (prompt + new), device=model.device).reshape(3, -1) * 31 + 7) % words
    ids[1, :prompt] = ids[0, :prompt]
    mask = torch.ones_like(ids)
    mask[2, : prompt - 2] = 0
    place, source, found = positions(mask), NextToken(model), []
    first = [0, 2]
    source.read(ids[first, :prompt], mask[first, :prompt], place[first, :prompt])
    source.repeat(2)
    source.keep(torch.tensor([0, 1, 3], device=model.device))
    for end in range(prompt + 1, prompt + new + 1):
        found.append(source.read(ids[:, end - 1 : end], mask[:, :end], place[:, end - 1 : end]).float())
    expected = torch.stack([_alone(model, row[known.bool()])[-new:] for row, known in zip(ids, mask, strict=True)], 1)
    return _size(torch.stack(found) - expected), _size(expected - expected.mean(-1, keepdim=True))


def _alone(model: Any, row: Tensor) -> Tensor:
    """Return the logits after each token of a row, ``[length, vocabulary]``, read at once."""
    logits: Tensor = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0]
    return logits.float()


def _size(values: Tensor) -> float:
    return float(values.square().mean().sqrt())

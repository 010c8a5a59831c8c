"""Sampling in parts that fit: the same draws as all at once, since each row has random numbers of its own.

The same but for rounding: about one token in a million is drawn so close to the edge between two words that the order
of a sum, which goes by the number of rows, decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from moalign.lm.sampler import Samples


class Draw(Protocol):
    """Samples ``repeat`` responses to each of the ``prompts``; ``rows`` are theirs among all rows."""

    def __call__(self, prompts: slice, rows: slice, repeat: int) -> Samples: ...


def in_parts(draw: Draw, prompts: int, repeat: int, most: int | None, pad_id: int) -> Samples:
    """Return the samples of all ``prompts``, at most ``most`` rows sampled at once; None: all.

    Row ``i * repeat + j`` is response ``j`` to prompt ``i``, whatever the parts.
    """
    if most is None or prompts * repeat <= most:
        return draw(slice(0, prompts), slice(0, prompts * repeat), repeat)
    return joined([draw(*part) for part in _parts(prompts, repeat, most)], pad_id)


def _parts(prompts: int, repeat: int, most: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield parts of whole prompts, or of one prompt's responses where these are more than ``most`` already."""
    together, at_once = max(1, most // repeat), min(repeat, most)
    for first in range(0, prompts, together):
        last = min(first + together, prompts)
        for begin in range(0, repeat, at_once):
            end = min(begin + at_once, repeat)
            # Several prompts come with all their responses.
            yield slice(first, last), slice(first * repeat + begin, (last - 1) * repeat + end), end - begin


def joined(parts: Sequence[Samples], pad_id: int) -> Samples:
    """Return samples one after another, with the padding of the longest prompt and the longest response."""
    widths = [part.response_mask.shape[1] for part in parts]
    width, prompt = max(widths), max(part.input_ids.shape[1] - own for part, own in zip(parts, widths, strict=True))

    def around(whole: Tensor, own: int, value: int) -> Tensor:
        return pad(whole, (prompt - (whole.shape[1] - own), width - own), value=value)

    each = list(zip(parts, widths, strict=True))
    states = [pad(part.hidden, (0, 0, 0, width - own)) for part, own in each if part.hidden is not None]
    return Samples(
        input_ids=torch.cat([around(part.input_ids, own, pad_id) for part, own in each]),
        attention_mask=torch.cat([around(part.attention_mask, own, 0) for part, own in each]),
        response_mask=torch.cat([pad(part.response_mask, (0, width - own)) for part, own in each]),
        logps=torch.cat([pad(part.logps, (0, width - own)) for part, own in each]),
        finished=torch.cat([part.finished for part in parts]),
        hidden=torch.cat(states) if states else None,
    )

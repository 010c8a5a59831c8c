"""Stop texts in sampled tokens: what follows them is no part of the response, and must not be trained on."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.lm.sampler import Samples


def trim(lm: LanguageModel, samples: Samples, stop: Sequence[str]) -> Samples:
    """Return the samples with each response ending at the token that completes its first stop text.

    The judge never sees what follows a stop text; a loss that sums over those tokens would learn from noise.
    Responses without a stop text stay as they are; those with one are finished.
    """
    if not stop:
        return samples
    width = samples.response_mask.shape[1]
    ids, counts = samples.input_ids[:, -width:].tolist(), samples.response_mask.sum(-1).tolist()
    rows = [row[:count] for row, count in zip(ids, counts, strict=True)]
    stopped = _holds(lm, rows, stop)
    kept = [length(lm, row, stop) if has_stop else len(row) for row, has_stop in zip(rows, stopped, strict=True)]
    inside = torch.arange(width)[None, :] < torch.tensor(kept)[:, None]
    mask = samples.response_mask & inside.to(samples.response_mask.device)
    attention, input_ids = samples.attention_mask.clone(), samples.input_ids.clone()
    attention[:, -width:] = mask.to(attention.dtype)
    input_ids[:, -width:] = torch.where(mask, input_ids[:, -width:], lm.pad)
    return replace(
        samples,
        input_ids=input_ids,
        attention_mask=attention,
        response_mask=mask,
        logps=torch.where(mask, samples.logps, torch.zeros_like(samples.logps)),
        finished=samples.finished | torch.tensor(stopped, device=samples.finished.device),
    )


def _holds(lm: LanguageModel, rows: Sequence[Sequence[int]], stop: Sequence[str]) -> list[bool]:
    """Return which rows' text holds a stop text."""
    texts = lm.tokenizer.batch_decode(list(rows), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [any(marker in text for marker in stop) for text in texts]


def length(lm: LanguageModel, row: Sequence[int], stop: Sequence[str]) -> int:
    """Return how many tokens of a row that holds a stop text it takes until the first one is complete.

    By bisection: a stop text stays complete.
    """
    return 1 + bisect.bisect_left(range(1, len(row)), True, key=lambda count: _holds(lm, [row[:count]], stop)[0])

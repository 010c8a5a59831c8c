"""How likely the base gives every well-formed response: all 15,625 of them, token by token.

Responses that begin alike share their beginnings. A row of one forward pass holds the prompt, the phrases of the first
four slots, and behind them the tree of the two slots that are left: 5 phrases, and behind each of them 5 others, where
a token attends to its own ancestors only. So a prompt takes 625 rows instead of 15,625.

The result depends on the base, the prompt's text and the temperature alone, so it is kept beside the cached base, one
file a prompt, for all tasks and results folders: a second of one core and 61 KB each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.tasks.sandbox import world

if TYPE_CHECKING:
    import torch

    from moalign.lm.language_model import LanguageModel

LONGEST = 1 + sum(max(len(text.split()) for text, _ in slot) for slot in world.SLOTS)
"""Tokens of the longest response: its words, and the end token."""
SPELT_OUT = 4
"""Slots that every row spells out; the rest is its tree."""
ROWS = 125
"""Rows in one forward pass."""
VERSION = 1
"""Raise it when the numbers change: it is part of the files' names."""


def kept_log_probs(
    lm: LanguageModel, texts: Sequence[str], max_tokens: int, temperature: float, progress: Progress = silent
) -> list[NDArray[np.float32]]:
    """Return :func:`log_probs` of rendered prompts, read from beside the folder of a built-in base, or kept there."""
    from moalign.runs import atomic

    base = Path(lm.source)
    folder = base.parent / f"{base.name}-answers"
    tables = []
    for done, prompt in enumerate(lm.encode(texts, max_tokens), start=1):
        key = hashlib.sha256(repr((VERSION, lm.fingerprint, prompt, temperature)).encode()).hexdigest()[:16]
        path = folder / f"{key}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged
            tables.append(np.load(path, allow_pickle=False))
            continue
        tables.append(log_probs(lm, prompt, temperature))
        with contextlib.suppress(RequestError), atomic.file(path) as place:  # a full cache costs time, nothing else
            np.save(place, tables[-1])
        progress("the base's probability of all answers", done, len(texts))
    return tables


def log_probs(lm: LanguageModel, prompt: Sequence[int], temperature: float) -> NDArray[np.float32]:
    """Return the base's log-probability of every well-formed response and an end token behind it, ``[15625]``.

    Args:
        prompt: token ids; a phrase's tokens must not depend on what stands before it, as with the sandbox's tokenizer.
        temperature: above 0.
    """
    import torch

    from moalign.lm.language_model import reference_mode

    phrases = [lm.tokenizer([text for text, _ in slot], add_special_tokens=False).input_ids for slot in world.SLOTS]
    tree = _tree(tuple(tuple(map(tuple, slot)) for slot in phrases))
    ends = sorted(lm.end_ids)
    parts = []
    lm.model.eval()
    with torch.no_grad(), reference_mode(lm):
        for first in range(0, len(tree.tokens), ROWS):
            rows = slice(first, first + ROWS)
            tokens, parents, upwards = tree.tokens[rows], tree.parents[rows], tree.upwards[rows]
            ids = torch.cat([torch.tensor([*prompt]).expand(len(tokens), -1), tokens], dim=1)
            below = len(prompt) - 1 + upwards.sum(-1)
            places = torch.cat([torch.arange(len(prompt)).expand(len(tokens), -1), below], dim=1)
            mask = _mask(upwards, len(prompt), lm.model.dtype)
            logits = lm.model(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                position_ids=places.to(lm.device),
                use_cache=False,
            ).logits
            logs = (logits[:, len(prompt) - 1 :].float() / temperature).log_softmax(-1).cpu()
            own = logs[torch.arange(len(tokens))[:, None], parents + 1, tokens]  # column 0 is the prompt's last token
            ended = logs[:, [leaf + 1 for leaf in tree.leaves]][..., ends].logsumexp(-1)
            parts.append(torch.einsum("rc,rlc->rl", own, upwards[:, tree.leaves].float()) + ended)
    return torch.cat(parts).flatten().numpy()


def _mask(upwards: torch.Tensor, prompt: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to attention scores, ``[rows, 1, length, length]``: every token sees the prompt up to
    itself and the tokens of ``upwards``."""
    import torch

    rows, columns, _ = upwards.shape
    seen = torch.ones(prompt + columns, prompt + columns, dtype=torch.bool).tril().repeat(rows, 1, 1)
    seen[:, prompt:, prompt:] = upwards
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


@dataclass(frozen=True)
class _Tree:
    """All responses behind a prompt, in ``[rows, columns]``; together they have every response once, in order."""

    tokens: torch.Tensor
    parents: torch.Tensor
    """Column of the token before; -1: the prompt's last. Columns that fill up have it too, and no children."""
    upwards: torch.Tensor
    """Whether the second column is the first or stands before it in a response, ``[rows, columns, columns]``."""
    leaves: list[int]
    """Columns of the last tokens of a row's 25 responses."""


@functools.lru_cache(maxsize=2)
def _tree(phrases: tuple[tuple[tuple[int, ...], ...], ...]) -> _Tree:
    """Return the tree of phrases, given by their token ids ``[slots][phrases]``."""
    import torch

    width = sum(max(map(len, slot)) for slot in phrases[:SPELT_OUT])
    rows: list[tuple[list[int], list[int]]] = []
    leaves: list[int] = []
    for spelt_out in itertools.product(*phrases[:SPELT_OUT]):
        tokens: list[int] = []
        parents: list[int] = []
        (last,) = _grow([(phrase,) for phrase in spelt_out], -1, tokens, parents)
        parents += [-1] * (width - len(tokens))
        tokens += [0] * (width - len(tokens))
        leaves = _grow(phrases[SPELT_OUT:], last, tokens, parents)
        rows.append((tokens, parents))
    above = torch.tensor([parents for _, parents in rows])
    upwards = torch.eye(above.shape[1], dtype=torch.bool).repeat(len(rows), 1, 1)
    for column in range(above.shape[1]):  # parents stand to the left of their children
        inner = above[:, column] >= 0
        upwards[inner, column] |= upwards[inner, above[inner, column]]
    return _Tree(torch.tensor([tokens for tokens, _ in rows]), above, upwards, leaves)


def _grow(slots: Sequence[Sequence[Sequence[int]]], parent: int, tokens: list[int], parents: list[int]) -> list[int]:
    """Append the phrases of the slots behind column ``parent``, each behind each; return the columns they end in."""
    if not slots:
        return [parent]
    ends = []
    for phrase in slots[0]:
        last = parent
        for token in phrase:
            parents.append(last)
            last = len(tokens)
            tokens.append(token)
        ends += _grow(slots[1:], last, tokens, parents)
    return ends

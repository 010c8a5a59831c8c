"""Log-probabilities for trl's trainers without the logits of every token, where trl itself makes them.

trl's fused output layer scores marked tokens alone on a GPU, and everywhere else all tokens of a batch, in tiles of
4,096 of them by up to 32,768 words, nine copies at a time: gigabytes for a vocabulary of 49,152. Here
:mod:`moalign.lm.log_probs` makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from moalign.core import processes
from moalign.lm.log_probs import AT_ONCE, token_outputs


def log_probs(model: Any, ids: Tensor, mask: Tensor, marked: Tensor) -> Tensor:
    """Return what trl's fused layer does of each token but the first, ``[rows, length - 1]``; 0 where not ``marked``.

    Args:
        model: patched by a trainer of trl.
        ids: ``[rows, length]``, padded on the right, as are ``mask`` and ``marked``.
    """
    if trl_is_lean(model, ids):
        labels = ids.masked_fill(~marked, -100)
        fused = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True)
        result: Tensor = fused.log_probs
        return result
    first = max(1, int(marked.any(0).long().argmax())) if marked.any() else ids.shape[1] - 1
    logps = token_outputs(model, ids, mask, marked[:, first:]).logps
    return torch.nn.functional.pad(logps, (first - 1, 0))


def trl_is_lean(model: Any, ids: Tensor) -> bool:
    """Whether trl's own layer needs little memory: on a GPU, or as all logits of the batch are few."""
    return ids.device.type == "cuda" or ids.numel() * int(model.config.get_text_config().vocab_size) <= AT_ONCE


class RowTrainer(SFTTrainer):  # type: ignore[misc,unused-ignore]
    """trl's SFTTrainer with :func:`log_probs`; the loss is the same mean over the labelled tokens of a step."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch: of several processes, this one's summand."""
        loss = self._own_loss(model, inputs, return_outputs, _of_all(num_items_in_batch))
        alone = processes.count() == 1 or num_items_in_batch is not None or return_outputs
        return loss if alone else loss / processes.count()

    def _own_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool, num_items_in_batch: Any) -> Any:
        ids, marked = inputs["input_ids"], inputs["labels"] != -100
        if return_outputs or trl_is_lean(model, ids):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total = marked[:, 1:].sum() if num_items_in_batch is None else num_items_in_batch
        return -log_probs(model, ids, inputs["attention_mask"], marked).sum() / total


def _of_all(tokens: Any) -> Any:
    """Return the labelled tokens of a step in all processes; None where the trainer does not count them."""
    alone = tokens is None or processes.count() == 1
    return tokens if alone else torch.tensor(sum(processes.gather(int(tokens))), device=tokens.device)

"""DPO on pairs with an anchor: beside each pair a response of the base's own is read, and kept likely (BAPO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.losses.anchor import Form, anchor_losses
from moalign.training.callbacks import order
from moalign.training.offline_dpo import Batches, PairTrainer
from moalign.training.reference import Row, reference_log_probs, rows_of

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

NAMES = ("input_ids", "attention_mask", "completion_mask")


@dataclass(frozen=True)
class Anchors:
    """Responses of the base to prompts of its own, as tokens."""

    rows: list[Row]
    reference: NDArray[np.float32]
    """``log pi_ref`` of each, ``[rows]``."""
    seed: int
    """Of the order in which they are read."""


def encode_anchors(
    job: Job, lm: LanguageModel, texts: Sequence[str], responses: Sequence[Response], max_tokens: int
) -> Anchors:
    """Tokenise rendered prompts with the base's responses and look up the reference; empty responses are left out."""
    rows = [row for row in rows_of(lm, texts, responses, max_tokens) if row[1]]
    return Anchors(rows, reference_log_probs(job, lm, rows), derive(job.seed, "anchors", "order"))


class AnchoredBatches(Batches):
    """Batches with as many anchors as pairs, each read in reshuffled passes of its own."""

    def __init__(self, anchors: Anchors, *rest: Any, **arguments: Any) -> None:
        """As :class:`Batches`."""
        super().__init__(*rest, **arguments)
        self.anchors = anchors
        self.anchor_places = order(len(anchors.rows), len(self.places), 1, anchors.seed)
        self.anchor_reference = torch.from_numpy(anchors.reference)

    def tokens(self) -> list[int]:
        """Return the tokens read at each place, those of the anchor included."""
        lengths = [len(ids) for ids, _ in self.anchors.rows]
        return [own + lengths[at] for own, at in zip(super().tokens(), self.anchor_places.tolist(), strict=True)]

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Tensor]:
        """Return a batch with its anchors, whose entries are named ``anchor_*``."""
        at = self.anchor_places[[row["place"] for row in rows]].tolist()
        padded = self.padded([self.anchors.rows[i] for i in at], self.pad)
        own = {f"anchor_{name}": padded[name] for name in NAMES}
        return {**super().__call__(rows), **own, "anchor_logps": self.anchor_reference[at]}


class Anchored(PairTrainer):
    """Adds to each pair's loss ``weight`` times that of its anchor; pairs count by preference, anchors all alike."""

    def __init__(self, weight: float, form: Form, *rest: Any, **arguments: Any) -> None:
        """As :class:`PairTrainer`, of :class:`AnchoredBatches`."""
        super().__init__(*rest, **arguments)
        self.weight, self.form = weight, form

    def losses(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return the losses of a batch's pairs with their anchors', ``[pairs]``."""
        of_pairs = super().losses(model, inputs)
        own = {name: inputs[f"anchor_{name}"] for name in NAMES}
        logps = self._log_probs(model, own)
        of_anchors, d = anchor_losses(logps, inputs["anchor_logps"], own["completion_mask"], self.form)
        self.seen[-1] |= {"anchor": of_anchors.detach().mean(), "anchor_log_ratio": d.mean()}
        return of_pairs + self.weight * of_anchors

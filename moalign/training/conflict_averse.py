"""Trainers of DPO on the pairs of several objectives: conflict-averse steps, and AMoPO's losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moalign.losses.cagrad import step_weights
from moalign.training.offline_dpo import Batches, PairTrainer
from moalign.training.settings import DpoStage


class PerToken(PairTrainer):
    """Compares mean log-probabilities of tokens, without a reference (AMoPO)."""

    per_token = True


class ConflictAverse(PairTrainer):
    """Takes the gradient of each objective's loss, and the conflict-averse step of :mod:`moalign.losses.cagrad`.

    The trainer differentiates what :meth:`compute_loss` returns: it has the loss's value and that step for a gradient.
    So clipping, optimizer, schedule and accumulation are the trainer's own, and no other hook is overridden.
    """

    def __init__(
        self,
        weights: Sequence[float],
        names: Sequence[str],
        c: float,
        stage: DpoStage,
        batches: Batches,
        *rest: Any,
        **arguments: Any,
    ) -> None:
        """As :class:`PairTrainer` of pairs that were joined; their places' weights hold those of the objectives.

        Args:
            weights: of the objectives, in the order of the joined parts, ``[parts]``, above 0.
            names: the objectives', for the metrics.
            c: see :func:`moalign.losses.cagrad.step_weights`.
        """
        super().__init__(stage, batches, *rest, **arguments)
        self.weights, self.names, self.c = np.asarray(weights), list(names), c
        self.read = 0
        """Parts of the batch in hand that were read."""
        self.gradients: list[list[Tensor]] = []
        """Of each objective's loss, ``[parameters]``, summed over those."""
        self.steps: list[dict[str, float]] = []
        """Metrics of the steps since the last line of the log."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a part of a batch; with the last one comes the gradient of the whole batch."""
        losses = self.losses(model, inputs)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.read == 0:
            self.gradients = [[torch.zeros_like(p) for p in learned] for _ in self.weights]
        self._add_gradients(losses / self.stage.accumulate, inputs["part"], learned)
        self.read = (self.read + 1) % self.stage.accumulate
        if self.read:
            nothing = 0.0 * learned[0].sum()
        else:
            # The trainer divides each part's loss by their number.
            step = [self.stage.accumulate * g for g in self._step()]
            nothing = torch.stack([(p * g).sum() for p, g in zip(learned, step, strict=True)]).sum()
        value: Tensor = losses.mean().detach() + (nothing - nothing.detach())
        return value

    def _add_gradients(self, losses: Tensor, part: Tensor, learned: Sequence[Tensor]) -> None:
        """Add the gradients of what a part of the batch adds to each objective's mean loss."""
        present = sorted(set(part.tolist()))
        with torch.autocast(losses.device.type, enabled=False):
            for k in present:
                own = torch.where(part == k, losses, torch.zeros_like(losses)).mean() / float(self.weights[k])
                found = torch.autograd.grad(own, learned, retain_graph=k != present[-1], allow_unused=True)
                for total, gradient in zip(self.gradients[k], found, strict=True):
                    if gradient is not None:
                        total += gradient

    def _step(self) -> list[Tensor]:
        """Return the step, ``[parameters]``, and note how the objectives' gradients lie to each other."""
        count = len(self.weights)
        gram = np.array(
            [[sum(float((a * b).sum()) for a, b in zip(self.gradients[i], self.gradients[j], strict=True))
              for j in range(count)] for i in range(count)]
        )  # fmt: skip
        a = self.weights
        if np.isfinite(gram).all():  # else training has diverged, and the loss's own check says so
            a, shares = step_weights(gram, self.weights, self.c)
            lengths = np.sqrt(np.diag(gram).clip(min=np.finfo(float).tiny))
            cosines = (gram / np.outer(lengths, lengths))[np.triu_indices(count, 1)]
            self.steps.append({"cosine": float(cosines.min()), **_by_name("share", self.names, shares)})
        rows = zip(*self.gradients, strict=True)
        return [sum((float(x) * g for x, g in zip(a, row, strict=True)), torch.zeros_like(row[0])) for row in rows]

    def mean_metrics(self) -> dict[str, float]:
        """Return means since the last call.

        ``cosine`` is the least between two objectives' gradients, below 0 where they conflict; ``share/NAME`` the
        clipped weight of an objective's in the part of the step that averts it.
        """
        steps, self.steps = self.steps, []
        own = {name: sum(step[name] for step in steps) / len(steps) for name in (steps[0] if steps else ())}
        return {**super().mean_metrics(), **own}


def _by_name(what: str, names: Sequence[str], values: Any) -> dict[str, float]:
    return {f"{what}/{name}": float(value) for name, value in zip(names, values, strict=True)}

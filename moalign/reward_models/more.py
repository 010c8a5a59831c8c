"""MORE: weights of several annotator groups' losses by the min-norm point of their gradients on the reward head.

Source: "On Diversified Preferences of Large Language Model Alignment", arXiv 2312.07401 v5; facts of the public code
dunzeng/MORE are marked "code". ``L = sum_i lambda_i L_i`` with ``L_i`` the mean Bradley-Terry loss of group i and
``lambda = argmin || sum_i lambda_i g_i ||^2`` over the simplex. The head is linear, so that the gradient of ``L_i`` on
it is known without a backward pass:

    g_i = -(1/|B_i|) sum_b sigma(-delta_b) (z_w,b - z_l,b)

with z the head's input for the winner and the loser. One backward pass of L follows. Momentum (code): the solver gets
``0.01 * old + 0.99 * new``, then scaled to length 1.

Deviation: the first step's momentum starts from its own gradient; in the code it starts from random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moalign.losses.min_norm import min_norm


def head_gradients(winner: Tensor, loser: Tensor, delta: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return every group's gradient of its mean loss on the head's weight, ``[groups, width]``, float32.

    ``winner`` and ``loser`` are the head's inputs ``[pairs, width]``, ``delta`` is the difference of their rewards and
    ``group`` the pair's group, ``[pairs]``; a group without pairs gets zeros.
    """
    pull = torch.sigmoid(-delta.float()).unsqueeze(1) * (winner.float() - loser.float())
    member = F.one_hot(group, groups).float()
    return -(member.T @ pull) / member.sum(0).clamp_min(1).unsqueeze(1)


@dataclass
class Balancer:
    """The weights of the groups, with their smoothed gradients."""

    groups: int
    normalise: bool
    momentum: float
    """The new gradient's share."""
    memory: Tensor | None = None
    """Smoothed gradients ``[groups, width]``."""

    @torch.no_grad()
    def weights(self, winner: Tensor, loser: Tensor, delta: Tensor, group: Tensor) -> Tensor:
        """Return lambda ``[groups]``, on the simplex; arguments as :func:`head_gradients`."""
        smoothed = head_gradients(winner, loser, delta, group, self.groups)
        if self.memory is not None:
            smoothed = (1 - self.momentum) * self.memory.to(smoothed.device) + self.momentum * smoothed
        self.memory = smoothed
        gradients = (F.normalize(smoothed, dim=1) if self.normalise else smoothed).double().cpu()
        gram = (gradients @ gradients.T).numpy()  # of float32 it is not symmetric enough to be one
        return torch.as_tensor(min_norm(gram), dtype=torch.float32, device=delta.device)


class HeadWatch:
    """Records the input of a classifier's head in every forward pass."""

    def __init__(self, model: Any) -> None:
        """Find the head, the last linear layer with one output per label; raises ValueError when there is none."""
        labels = model.config.num_labels
        linear = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module.out_features == labels and module.weight.requires_grad
        ]
        if not linear:
            raise ValueError(f"{type(model).__name__} has no trainable linear layer with {labels} outputs")
        self.layer = linear[-1]
        self.seen = torch.empty(0)
        self.layer.register_forward_pre_hook(self._keep)

    def _keep(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        self.seen = inputs[0].detach()

    def states(self, input_ids: Tensor, pad: int) -> Tensor:
        """Return the head's input per row, ``[rows, width]``; no gradient.

        A decoder's head reads every token; the last one that is not padding counts.
        """
        seen = self.seen
        if seen.ndim == 2:
            return seen
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (places * (input_ids != pad)).argmax(-1)
        return seen[torch.arange(len(seen), device=seen.device), last]


def weighted(delta: Tensor, group: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_i weights_i * mean_{pairs of i} -log sigma(delta)``, a scalar; a group without pairs adds 0."""
    member = F.one_hot(group, len(weights)).to(delta.dtype)
    share = member / member.sum(0).clamp_min(1)
    return -(F.logsigmoid(delta) * (share @ weights.to(delta.dtype))).sum()

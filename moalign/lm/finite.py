"""Divergence: a number of training that is not finite stops the run, before anything of it is saved.

The same request resumes at a checkpoint from before, and stops at the same step again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moalign.core.errors import WorkError

Modules = Mapping[str, Mapping[str, Tensor]]
"""Tensors by module and name."""


@dataclass
class FiniteCheck:
    """Stops one phase of a run when its training diverges; numbers are given to it where they are read anyway."""

    method: str
    phase: str
    lr: float
    clip: float
    step: int = 0
    """The step in hand, from 1; whoever trains sets it."""

    def number(self, name: str, value: float) -> float:
        """Return a number of the step; raises WorkError when it is NaN or infinite."""
        if not math.isfinite(value):
            raise self._error(f"the {name} is {value}")
        return value

    def norm(self, trained: Sequence[Tensor]) -> None:
        """Raise WorkError when what is trained has no finite norm after a step.

        A loss need not show it: a softmax of logits of 1e30 is as finite as any.
        """
        self.number("norm of the weights", float(_squares(trained).sum().sqrt()))

    def weights(self, modules: Modules) -> Modules:
        """Return what is trained; raises WorkError when a tensor's sum of squares is not finite in single precision.

        Weights of 1e19 and more are still numbers, but every norm and product of them overflows.
        """
        tensors = {f"{module}.{name}": value for module, named in modules.items() for name, value in named.items()}
        finite = _squares(list(tensors.values())).isfinite().tolist()
        bad = [name for name, good in zip(tensors, finite, strict=True) if not good]
        if bad:
            found = f"{len(bad)} of {len(tensors)} tensors of weights are not finite or have no finite norm"
            raise self._error(f"{found} (first {bad[0]})")
        return modules

    def _error(self, found: str) -> WorkError:
        return WorkError(
            f"{self.method}: phase {self.phase}, step {self.step}: {found}, so training has diverged; try a smaller lr "
            f"(now {self.lr:g}), more warmup steps or a smaller clip (the largest gradient norm, now {self.clip:g}); "
            "with these settings it ends here again"
        )


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return each tensor's sum of squares, in single precision."""
    device = tensors[-1].device  # some of a run's state may be on the CPU: a few numbers travel to the others
    return torch.stack([value.detach().float().square().sum().to(device) for value in tensors])

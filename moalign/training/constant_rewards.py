"""Rewards that stop varying: a rollout whose responses all score alike teaches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moalign.core.arrays import Matrix

STEPS_ON_END = 10
"""So many steps on end without any difference are worth a warning; in a few, small rollouts may agree by chance."""


class ConstantRewards:
    """Counts on how many steps on end each objective gave all responses of a rollout the same reward."""

    def __init__(self, names: Sequence[str]) -> None:
        """``names`` are the objectives'."""
        self.state = {name: [0, 0, 0] for name in names}
        """By objective: steps on end up to now, the most ever, and the step that these ended with. Plain, for
        checkpoints."""

    def load(self, state: Mapping[str, list[int]]) -> None:
        """Take over the ``state`` of a checkpoint."""
        self.state.update(state)

    def add(self, step: int, z: Matrix) -> None:
        """Look at the rewards of a step, ``[rows, objectives]``; a single row cannot differ."""
        for (name, (now, most, end)), spread in zip(self.state.items(), np.ptp(z, axis=0), strict=True):
            now = now + 1 if len(z) > 1 and spread == 0 else 0
            self.state[name] = [now, now, step] if now > most else [now, most, end]

    def warnings(self, phase: str) -> list[str]:
        """Return a sentence for each objective that was constant too long."""
        return [
            f"phase {phase}: {name} scored all responses of a step alike in {most} steps on end (up to step {end}); "
            "nothing could be learnt from it there"
            for name, (_, most, end) in self.state.items()
            if most >= STEPS_ON_END
        ]

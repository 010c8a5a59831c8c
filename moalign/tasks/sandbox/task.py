"""The sandbox as a task: exact scorers, data drawn from its world, the built-in base, the known optimum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moalign.preferences import Preference
from moalign.tasks.sandbox import base, world
from moalign.tasks.task import Matrix, Task, fingerprint

PER_PROMPT = 16
"""Data responses per prompt, drawn from the corpus without preference: a logged data set of mixed quality."""


class SandboxTask(Task):
    """See :mod:`moalign.tasks.sandbox`."""

    @property
    def _spec(self) -> Any:
        return self.card.sandbox

    @property
    def identity(self) -> dict[str, str]:
        """The base's content address; a user's own base counts by its path."""
        if self.card.model is not None:
            return {"model": fingerprint(self.card.model, self.card.model_revision)}
        return {"model": base.identity(self.names, self._spec.base, self._spec.seed)}

    def _all_prompts(self) -> list[str]:
        return world.prompts()

    def _data_responses(self, split: str) -> tuple[list[str], list[str]]:
        rng = np.random.default_rng([self._spec.seed, {"train": 0, "calibration": 1, "eval": 2}[split]])
        prompts = [prompt for prompt in self.prompts[split] for _ in range(PER_PROMPT)]
        chances = np.stack([world.prior(world.context_of(prompt)) for prompt in prompts])
        choices = (chances.cumsum(axis=2) < rng.random((*chances.shape[:2], 1))).sum(axis=2)
        choices = choices.clip(0, chances.shape[2] - 1)  # a cumulative sum may end just below 1
        return prompts, [world.response_text(tuple(choice)) for choice in choices.tolist()]

    def _model_folder(self) -> tuple[str, str | None]:
        if self.card.model is not None:
            return self.card.model, self.card.model_revision
        what = f"training the {self._spec.base} base (first use only)"
        folder = base.ensure(
            self.names, self._spec.base, self._spec.seed, lambda done, total: self.say(what, done, total)
        )
        return str(folder), None

    def optimum(self, wanted: Sequence[Preference], prompts: Sequence[str], beta: float = 0.0) -> Matrix:
        """Return the exact optimum's mean raw rewards ``[preferences, objectives]``; see :mod:`.optimum`."""
        from moalign.tasks.sandbox.optimum import optimum

        columns = [world.OBJECTIVES.index(name) for name in self.names]
        mean, sd = np.array(self.normaliser.mean), np.array(self.normaliser.sd)
        return optimum(prompts, wanted, columns, mean, sd, beta)

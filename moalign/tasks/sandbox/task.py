"""The sandbox as a task: exact scorers, data drawn from its world, the built-in base, the known optimum."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moalign.config.card import AnnotatorSpec
from moalign.core.preferences import Preference
from moalign.rewards.normaliser import Normaliser
from moalign.rewards.panel import RewardPanel
from moalign.tasks.sandbox import base, world
from moalign.tasks.task import Matrix, Task, fingerprint

if TYPE_CHECKING:
    from moalign.reward_models.pairs import PairSet

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
            content = {"model": fingerprint(self.card.model, self.card.model_revision)}
        else:
            content = {"model": base.identity(self.names, self._spec.base, self._spec.seed)}
        if self.card.rewards == "learned":
            from moalign.tasks.sandbox import learned

            content["rewards"] = learned.VERSION
        return content

    def _all_prompts(self) -> list[str]:
        return world.prompts()

    def _data_responses(self, split: str) -> tuple[list[str], list[str]]:
        rng = np.random.default_rng([self._spec.seed, {"train": 0, "calibration": 1, "eval": 2}[split]])
        prompts = [prompt for prompt in self.prompts[split] for _ in range(PER_PROMPT)]
        return prompts, world.draw_responses(prompts, rng)

    # -- annotators and what is learned from them ----------------------------------------------------------

    @property
    def annotators(self) -> AnnotatorSpec:
        """Who labels pairs."""
        return self._spec.annotators or AnnotatorSpec()

    reward_settings: ClassVar[Mapping[str, Any]] = {"template": "{prompt} {response}", "max_tokens": 128}
    """The longest text of the world has 76 tokens; a word stands apart from the next."""

    def pair_sets(self) -> list[PairSet]:
        """Return the annotators' pairs over all splits, one data set per group, with their true probabilities."""
        from moalign.tasks.sandbox.annotators import groups_of, label

        spec = self.annotators
        groups = groups_of(spec.groups, self.names, spec.sharpness)
        return label(groups, world.prompts(), spec.pairs, spec.seed)

    @functools.cached_property
    def judge_panel(self) -> RewardPanel:
        """The exact scorers, whichever scorers methods see."""
        if self.card.rewards is None:
            return self.panel
        return RewardPanel.from_specs(self.card.objectives, Path.cwd(), self._store)

    @functools.cached_property
    def judge_normaliser(self) -> Normaliser:
        """The normaliser of the exact scores."""
        return self.normaliser if self.card.rewards is None else self._fitted("truth.json", self.judge_panel)

    @functools.cached_property
    def panel(self) -> RewardPanel:
        """The scorers that methods see: the exact ones, or reward models, trained on first use."""
        if self.card.rewards is None:
            return RewardPanel.from_specs(self.card.objectives, Path.cwd(), self._store)
        from moalign.tasks.sandbox import learned

        specs = learned.objectives(self, lambda what, done, total: self.progress(what, done, total))
        return RewardPanel.from_specs(specs, Path.cwd(), self._store)

    # -- the base ------------------------------------------------------------------------------------------

    @property
    def base_folder(self) -> str:
        """The base's folder, trained first when it is built in and not there yet."""
        return self.base_source()[0]

    def base_source(self) -> tuple[str, str | None]:
        """Return the base's folder, having trained it first when it is built in and not there yet."""
        if self.card.model is not None:
            return self.card.model, self.card.model_revision
        what = f"training the {self._spec.base} base (first use only)"
        folder = base.ensure(
            self.names, self._spec.base, self._spec.seed, lambda done, total: self.progress(what, done, total)
        )
        return str(folder), None

    def optimum(self, prefs: Sequence[Preference], prompts: Sequence[str], beta: float = 0.0) -> Matrix:
        """Return the exact optimum's mean raw rewards ``[preferences, objectives]``; see :mod:`.optimum`."""
        from moalign.tasks.sandbox.optimum import optimum

        columns = [world.OBJECTIVES.index(name) for name in self.names]
        truth = self.judge_normaliser
        mean, sd = np.array(truth.mean), np.array(truth.sd)
        return optimum(prompts, prefs, columns, mean, sd, beta)

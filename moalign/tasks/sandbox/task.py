"""The sandbox as a task: exact scorers, data drawn from its world, the built-in base, the known optimum."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moalign.config.card import AnnotatorSpec, RewardModelSpec, SandboxSpec
from moalign.config.recipe import LoraSpec
from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.core.records import Response
from moalign.rewards.normaliser import Normaliser
from moalign.rewards.panel import RewardPanel
from moalign.tasks.responses import Responses
from moalign.tasks.sandbox import base, world
from moalign.tasks.task import Task, fingerprint

if TYPE_CHECKING:
    from moalign.lm.chat import Codec
    from moalign.reward_models.pairs import PairSet

PER_PROMPT = 16
"""Data responses per prompt, drawn from the corpus without preference: a logged data set of mixed quality."""


class SandboxTask(Task):
    """See :mod:`moalign.tasks.sandbox`."""

    @property
    def _spec(self) -> SandboxSpec:
        assert self.card.sandbox is not None  # the card's own check
        return self.card.sandbox

    @property
    def identity(self) -> dict[str, str]:
        """The base's content address (of a user's own base its fingerprint), and what the rewards are learned with."""
        if self.card.model is not None:
            content = {"model": fingerprint(self.card.model, self.card.model_revision)}
        else:
            content = {"model": base.identity(self.names, self._spec.base, self._spec.seed)}
        if self.card.rewards == "learned":
            from moalign.tasks.sandbox import learned

            content["rewards"] = learned.version(self.annotators)
        return content

    def base_source(self) -> tuple[str, str | None]:
        """Return the base's folder, having trained it first when it is built in and not there yet."""
        if self.card.model is not None:
            return self.card.model, self.card.model_revision
        return str(base.ensure(self.names, self._spec.base, self._spec.seed, self.progress)), None

    def all_prompts(self) -> list[str]:
        """Return the world's 720 prompts."""
        return world.prompts()

    def data_responses(self, split: str) -> Responses:
        """Return :data:`PER_PROMPT` responses of the corpus to every prompt of a split."""
        rng = np.random.default_rng([self._spec.seed, ("train", "calibration", "eval").index(split)])
        prompts = [prompt for prompt in self.prompts[split] for _ in range(PER_PROMPT)]
        return Responses(prompts, [Response(text) for text in world.draw_responses(prompts, rng)])

    def known_response(self, prompt: str) -> Response | None:
        """Return what the corpus says to one of the world's prompts."""
        if prompt not in world.prompts():
            return None
        return Response(world.draw_responses([prompt], np.random.default_rng(0))[0])

    def examine(self, lora: LoraSpec | None) -> str:
        """See :meth:`Task.examine`; needs no trained base."""
        import torch

        from moalign.lm import architecture

        if not self.card.built_in_base:
            return super().examine(lora)
        with torch.device("meta"):
            return architecture.with_lora(base.untrained(base.make_tokenizer()), lora)

    def untrained_codec(self) -> Codec:
        """Return what turns text into the base's tokens; needs no base."""
        from moalign.lm.chat import Codec

        if not self.card.built_in_base:
            return self.codec
        return Codec(base.make_tokenizer(), self.card.template, source="the sandbox's base")

    def optimum(self, prefs: Sequence[Preference], prompts: Sequence[str], beta: float = 0.0) -> Matrix:
        """Return the exact optimum's mean raw rewards ``[preferences, objectives]``; see :mod:`.optimum`."""
        from moalign.tasks.sandbox.optimum import optimum

        columns = [world.OBJECTIVES.index(name) for name in self.names]
        truth = self.judge_normaliser
        return optimum(prompts, prefs, columns, np.array(truth.mean), np.array(truth.sd), beta)

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
        return label(groups, world.prompts(), spec.pairs, spec.seed, spec.flipped)

    @property
    def reward_model(self) -> RewardModelSpec:
        """What learned rewards are made of."""
        return self._spec.reward_model

    @functools.cached_property
    def judge_panel(self) -> RewardPanel:
        """The exact scorers, whichever scorers methods see."""
        return self.panel if self.card.rewards is None else self._panel_of(self.card.objectives)

    @functools.cached_property
    def judge_normaliser(self) -> Normaliser:
        """The normaliser of the exact scores."""
        return self.normaliser if self.card.rewards is None else self._fitted("truth.json", self.judge_panel)

    @functools.cached_property
    def panel(self) -> RewardPanel:
        """The scorers that methods see: the exact ones, or reward models, trained on first use."""
        if self.card.rewards is None:
            return self._panel_of(self.card.objectives)
        from moalign.tasks.sandbox import learned

        return self._panel_of(learned.objectives(self))

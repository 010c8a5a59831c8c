"""The sandbox as a task: exact scorers, data drawn from its world, the built-in base, the known optimum."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moalign.config.card import AnnotatorSpec, RewardModelSpec, SandboxSpec
from moalign.config.objectives import TASTED
from moalign.config.recipe import LoraSpec
from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.core.records import Response
from moalign.rewards import scorer
from moalign.rewards.panel import RewardPanel
from moalign.runs.checkpoint import file_sum
from moalign.tasks.responses import Responses
from moalign.tasks.sandbox import base, world
from moalign.tasks.task import Task, fingerprint

if TYPE_CHECKING:
    from moalign.lm.chat import Codec
    from moalign.reward_models.pairs import PairSet
    from moalign.tasks.frontier import Frontier
    from moalign.tasks.sandbox.annotators import Group

PER_PROMPT = 16
"""Data responses per prompt, drawn from the corpus without preference: a logged data set of mixed quality."""
WELL_FORMED = 0.95
"""Least probability that the base gives some well-formed response for :meth:`SandboxTask.frontier` to be known."""


class SandboxTask(Task):
    """See :mod:`moalign.tasks.sandbox`."""

    @property
    def _spec(self) -> SandboxSpec:
        assert self.card.sandbox is not None  # the card's own check
        return self.card.sandbox

    @property
    def identity(self) -> dict[str, str]:
        """The base's content address (a user's own: its fingerprint), how rewards are learned, and what scores."""
        if self.card.model is not None:
            content = {"model": fingerprint(self.card.model, self.card.model_revision)}
        else:
            content = {"model": base.identity(self.names, self._spec.base, self._spec.seed)}
        if self.card.rewards == "learned":
            from moalign.tasks.sandbox import learned

            content["rewards"] = learned.VERSION
        return content | scorer.fingerprints(self.card, Path.cwd())

    def base_source(self) -> tuple[str, str | None]:
        """Return the base's folder, having trained it first when it is built in and not there yet."""
        if self.card.model is not None:
            return self.card.model, self.card.model_revision
        folder = base.ensure(self.names, self._spec.base, self._spec.seed, self.progress)
        self.base_sum = file_sum(folder / "model.safetensors")[:16]
        return str(folder), None

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

    def examine(self, lora: LoraSpec | None, setting: str = "policy.lora") -> str:
        """See :meth:`Task.examine`; needs no trained base."""
        import torch

        from moalign.lm import architecture

        if not self.card.built_in_base:
            return super().examine(lora, setting)
        with torch.device("meta"):
            return architecture.with_lora(base.untrained(base.make_tokenizer(self.names)), lora, setting)

    def untrained_codec(self) -> Codec:
        """Return what turns text into the base's tokens; needs no base."""
        from moalign.lm.chat import Codec

        if not self.card.built_in_base:
            return self.codec
        return Codec(base.make_tokenizer(self.names), self.card.template, source="the sandbox's base")

    @property
    def _judged_exactly(self) -> bool:
        """Whether the judge's scorers are the sandbox's own, so that the best there is can be enumerated."""
        gold = {spec.name: spec for spec in self.card.gold_objectives or ()}
        return all(gold.get(spec.name, spec).kind == "sandbox" for spec in self.card.objectives)

    def optimum(self, prefs: Sequence[Preference], prompts: Sequence[str], beta: float = 0.0) -> Matrix | None:
        """Return the exact optimum's mean raw rewards ``[preferences, objectives]``; see :mod:`.optimum`.

        None where the judge's scorers are not the sandbox's own.
        """
        from moalign.tasks.sandbox.optimum import optimum

        if not self._judged_exactly:
            return None
        columns = [world.OBJECTIVES.index(name) for name in self.names]
        truth = self.judge_normaliser
        return optimum(prompts, prefs, columns, np.array(truth.mean), np.array(truth.sd), beta)

    def frontier(self, prefs: Sequence[Preference]) -> list[Frontier] | None:
        """See :meth:`Task.frontier`; known for the built-in base, sampled whole, with hardly any malformed responses.

        The base's probability of a malformed response (.0015 at temperature 1) is the base's loss alone: the optimum
        gives none, which costs it as many nats, and at KL 0 the base counts without them.
        """
        from moalign.tasks.sandbox import optimum, reference

        limits = self.card.generation
        if not self._judged_exactly or not self.card.built_in_base:
            return None
        if limits.temperature <= 0 or limits.top_p < 1 or self.card.template.stop:  # what is sampled is another policy
            return None
        if limits.max_new_tokens < reference.LONGEST:
            return None

        def of_base(prompts: Sequence[str]) -> list[NDArray[np.float32]]:
            texts = [self.renderer.plain(prompt) for prompt in prompts]
            return reference.kept_log_probs(
                self.language_model, texts, limits.max_prompt_tokens, limits.temperature, self.progress
            )

        columns, truth = [world.OBJECTIVES.index(name) for name in self.names], self.judge_normaliser
        frontiers = optimum.frontier(
            self.eval_prompts, prefs, columns, np.array(truth.mean), np.array(truth.sd), of_base
        )
        return frontiers if np.exp(frontiers[0].log_reference).sum(axis=1).min() > WELL_FORMED else None

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

    @functools.cached_property
    def _by_user(self) -> tuple[list[PairSet], dict[str, str]]:
        from moalign.tasks.sandbox.annotators import by_user

        return by_user(self.pair_sets(), self.annotators.users or 1, self.annotators.seed)

    def labelled_by_user(self) -> list[PairSet]:
        """Return the annotators' pairs over all splits, one data set per user."""
        return self._by_user[0]

    @property
    def group_of_user(self) -> dict[str, str]:
        """The group of every annotator, by name."""
        return self._by_user[1]

    @property
    def _groups(self) -> list[Group] | None:
        """The annotator groups that the card asks for, where all that they look at is judged here."""
        from moalign.tasks.sandbox.annotators import groups_of

        given = self._spec.annotators
        if given is None or given.groups == "specialists" or not self._judged_exactly:
            return None
        if not set(TASTED) <= set(self.names):
            return None
        return groups_of(given.groups, self.names, given.sharpness)

    @property
    def user_groups(self) -> list[str] | None:
        """See :attr:`WithUsers.user_groups`; specialists are the objectives themselves."""
        return None if self._groups is None else [group.name for group in self._groups]

    def group_utilities(self, raw: Matrix) -> Matrix:
        """See :meth:`WithUsers.group_utilities`."""
        from moalign.tasks.sandbox.annotators import worth

        assert self._groups is not None  # user_groups says so
        order = [self.names.index(name) for name in TASTED]
        return worth(self._groups, np.asarray(raw)[..., order])

    @property
    def reward_model(self) -> RewardModelSpec:
        """What learned rewards are made of."""
        return self._spec.reward_model

    @functools.cached_property
    def gold_panel(self) -> RewardPanel | None:
        """The exact scorers where methods see reward models, else the card's gold ones."""
        return super().gold_panel if self.card.rewards is None else self._panel_of(self.card.objectives)

    @functools.cached_property
    def panel(self) -> RewardPanel:
        """The scorers that methods see: the exact ones, or reward models, trained on first use."""
        if self.card.rewards is None:
            return self._panel_of(self.card.objectives)
        from moalign.tasks.sandbox import learned

        return self._panel_of(learned.objectives(self))

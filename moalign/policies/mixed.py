"""Policies made of one expert per objective: their weights interpolated, or their next-token distributions mixed.

Weights (rewarded soups, arXiv 2306.04488): ``dW = sum_i w_i s_i B_i A_i``, one model per preference. Logits (MOD,
arXiv 2406.18853): ``log pi = sum_i w_i log pi_i + const`` for every token, as many models as experts at every token.
Both give an expert itself for its one-hot preference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.lm import adapters
from moalign.lm.generator import RESIDENT, LazyGenerator, ModelGenerator
from moalign.lm.language_model import LanguageModel
from moalign.lm.mixture import Constant, Mixture, Space
from moalign.lm.sampler import Generated, NextToken, Sampling, generate
from moalign.lm.side_by_side import SideBySide
from moalign.policies.policy import Policy, adapter_name
from moalign.training.experts import expert_folder

if TYPE_CHECKING:
    from moalign.policies.control import Control
    from moalign.training.job import RunContext


def interpolated(context: RunContext, *weights: Sequence[float]) -> Policy:
    """Return the policy whose weights are the experts' interpolated, given the bare prompt.

    ``weights``: one for each expert (a preference, say, but any numbers will do); several such vectors: one for each
    group of neighbouring layers. The weights are computed once, when the policy first answers, and make room for those
    of the next policy.
    """
    lm, cache = context.task.language_model, context.cache
    numbers = "_".join(f"{number:.9f}" for group in weights for number in group)
    name = adapter_name(context, f"at_{hashlib.sha256(numbers.encode()).hexdigest()[:16]}")

    def place() -> None:
        if "experts" not in cache:
            cache["experts"] = [adapters.read(lm, folder) for folder in _folders(context)]
        adapters.place(lm, adapters.interpolate_groups(cache["experts"], weights), name)

    return Policy(LazyGenerator(lm, name, place, cache), context.task.renderer.plain)


def put_away(context: RunContext) -> None:
    """Take the last interpolated adapter, if any, off the model: training that asked for some is done with them."""
    if RESIDENT in context.cache:
        adapters.drop(context.task.language_model, context.cache.pop(RESIDENT))


def mixed(context: RunContext, preference: Preference) -> Policy:
    """Return the policy that mixes the experts' next-token distributions, given the bare prompt."""
    names = experts_on_model(context)
    return Policy(MixedGenerator(context.task.language_model, names, preference), context.task.renderer.plain)


def experts_on_model(context: RunContext) -> list[str]:
    """Return the names of the adapters of the run's experts, which lie on the model together from then on."""
    lm, cache = context.task.language_model, context.cache
    if "experts on the model" not in cache:
        experts = {adapter_name(context, f"expert_{index}"): folder for index, folder in enumerate(_folders(context))}
        for name, folder in experts.items():
            adapters.load(lm, folder, name)
        cache["experts on the model"] = list(experts)
    on_model: list[str] = cache["experts on the model"]
    return on_model


def _folders(context: RunContext) -> list[Path]:
    return [context.run.path / expert_folder(index) for index in range(len(context.task.names))]


@dataclass(frozen=True)
class MixtureParts:
    """What a mixture is made of, for ``moalign export``."""

    lm: LanguageModel
    experts: list[str]
    """The names of their adapters on ``lm``."""
    space: Space
    weights: list[float]
    """Constant weights, one for each expert; with a control model, the preference."""
    control: Control | None = None


class MixedGenerator:
    """Several experts on one base that sample each token together: ``log pi = sum_i w_i log pi_i + const``.

    Temperature and nucleus apply to the mixture. Every expert keeps a cache of its own: memory for keys and values is
    theirs together. Experts of weight 0 are left out; a one-hot vector gives that expert, bit for bit.
    """

    def __init__(self, lm: LanguageModel, experts: Sequence[str], weights: Sequence[float]) -> None:
        """Mix adapters that are on ``lm``, by name, with ``weights``, one each, not all 0."""
        used = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight != 0]
        if not used:
            raise ValueError(f"at least one weight must not be 0; found {list(weights)}")
        self.lm = lm
        self.experts = [expert for expert, _ in used]
        self.weights = [weight for _, weight in used]

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        if self.weights == [1.0]:
            return self.as_model().generate(texts, rows, sampling)
        together, n = SideBySide(self.lm, self.experts), len(self.experts)
        weights = torch.tensor(self.weights, device=self.lm.device)

        def of_batch(places: Sequence[int]) -> Mixture:
            return Mixture(NextToken(together), n, Constant(weights.expand(len(places), n)), "logit")

        return generate(self.lm, texts, rows, sampling, of_batch)

    def as_mixture(self, preference: Preference) -> MixtureParts:
        """Return what it is made of, at its own weights."""
        return MixtureParts(self.lm, self.experts, "logit", self.weights)

    def as_model(self) -> ModelGenerator:
        """Return the expert itself for a one-hot vector; RequestError for any other: no one model says that."""
        if self.weights == [1.0]:
            return ModelGenerator(self.lm, self.experts[0])
        raise RequestError(
            f"its answers come from {len(self.experts)} experts that sample every token together; "
            "no adapter and no single model has that distribution"
        )

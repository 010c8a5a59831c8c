"""Toy temperature: the base asked with the preference in its prompt, sampled cooler.

Source: none; an example of the plugin contract, not a contribution. Nothing is trained. Dividing the base's logits by
a temperature below 1 sharpens ``pi(y | preference, x)`` to be proportional, token by token, to ``pi^(1/temperature)``:
whatever the base understands of a preference, its answers show more plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.lm.generator import Generator
    from moalign.lm.sampler import Generated, Sampling
    from moalign.policies.policy import Policy


class Config(Strict):
    """Settings of toy temperature."""

    temperature: float = Field(default=0.5, gt=0, le=2)
    """Multiplies the task's own sampling temperature."""


class ToyTemperature:
    """The base with the preference in its prompt, at another temperature."""

    name: ClassVar[str] = "toy-temperature"
    summary: ClassVar[str] = "example plugin: the base asked with the preference, sampled cooler"
    capabilities: ClassVar[Capabilities] = Capabilities(trains=False)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"temperature": 0.25}
    """Settings for a test of seconds."""

    def train(self, job: Job) -> None:
        """Nothing is trained; the normaliser is made ready, and the note shows what the run was asked for."""
        _ = job.task.normaliser
        job.notes["temperature"] = job.config.temperature

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the cooled base, asked with ``preference`` (one weight per objective)."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import base

        # Kept in the context: policies with the same generator are answered together, in batches.
        cooled = context.cache.setdefault("cooled", Cooled(base(context), context.config.temperature))
        return Policy(cooled, partial(context.task.renderer.preference, weights=preference))


class Cooled:
    """A generator that samples from another one at ``factor`` times the temperature."""

    def __init__(self, inner: Generator, factor: float) -> None:
        self.inner = inner
        self.factor = factor

    def generate(
        self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling
    ) -> Generated | tuple[list[str], int]:
        """Return what the other one answers; greedy sampling (temperature 0) stays greedy."""
        return self.inner.generate(texts, rows, replace(sampling, temperature=sampling.temperature * self.factor))

"""Preference prompting: the untrained base, asked with the preference in its prompt.

The baseline that tells a warm base from a cold one: whatever it steers, no training has paid for.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(Strict):
    """Settings of preference prompting."""

    style: Literal["percent", "fraction"] = "percent"
    """How weights are written: ``30.0%`` or ``0.3``."""


class Prompting:
    """The base with the preference in its prompt."""

    name: ClassVar[str] = "prompting"
    summary: ClassVar[str] = "the untrained base, asked with the preference in its prompt"
    capabilities: ClassVar[Capabilities] = Capabilities(family="prompted", trains=False, snapshots=False)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {}

    def train(self, job: Job) -> None:
        """Nothing is trained; the base and the normaliser are made ready, so that evaluation starts at once."""
        _ = job.task.normaliser

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the base asked with the preference."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import base

        render = partial(context.task.renderer.preference, weights=preference, style=context.config.style)
        return Policy(base(context), render)

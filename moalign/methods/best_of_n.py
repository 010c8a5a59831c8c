"""Best-of-n: sample n responses from the base, keep the best by ``w . r``.

The inference-time yardstick: nothing is trained, every answer costs n samples and n scorings. A trained method that
loses to best-of-4 has learnt little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.pareto.scalarisation import Scalarisation, scores
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(Strict):
    """Settings of best-of-n."""

    n: int = Field(default=4, ge=1)
    """Candidates per answer."""
    scalarisation: Scalarisation = "linear"
    """What they are ordered by: :mod:`moalign.pareto.scalarisation`."""


class BestOfN:
    """The best of n samples of the base, chosen by the reward panel."""

    name: ClassVar[str] = "best-of-n"
    summary: ClassVar[str] = "the best of n samples of the base by w.r; no training, n times the cost per answer"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="prompted", trains=False, needs_online_rewards=True, snapshots=False
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"n": 2}

    def train(self, job: Job) -> None:
        """Nothing is trained; the base and the normaliser are made ready, so that evaluation starts at once."""
        _ = job.task.normaliser

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy that draws n candidates (shared by all preferences) and keeps the best for this one."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import base

        panel = context.panel

        def choose(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[int]:
            flat = [text for row in candidates for text in row]
            repeated = [prompt for prompt, row in zip(prompts, candidates, strict=True) for _ in row]
            z = panel.z(panel.score(repeated, flat))
            utility = scores(z, np.array(preference), context.config.scalarisation)
            return [int(i) for i in utility.reshape(len(prompts), -1).argmax(axis=1)]

        return Policy(base(context), context.task.renderer.plain, samples=context.config.n, choose=choose)

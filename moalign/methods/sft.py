"""SFT: the base fine-tuned on the task's responses, unsteered. It anchors every table.

With ``steps: 0`` the base itself answers. A preference does not reach the policy: it answers every one alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.core.amounts import Amount, Amounts
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, SftConfig, Steps

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(SftConfig, CostHints):
    """Settings of the supervised stage."""

    steps: Steps = 0

    def reads(self, task: Amounts) -> Amount:
        """See :class:`CostHints`. Their texts alone are learned from, so their scores are no part of the cost."""
        return task.scored() if self.steps else Amount()


class Sft:
    """One unsteered policy."""

    name: ClassVar[str] = "sft"
    summary: ClassVar[str] = "the base fine-tuned on the task's responses (steps: 0: the base itself), unsteered"
    capabilities: ClassVar[Capabilities] = Capabilities(family="offline", steerable=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 3, "batch": 4, "max_tokens": 128}

    def train(self, job: Job) -> None:
        """Fine-tune on every scored response of the training split, as it is."""
        from moalign.training.grid import one_adapter
        from moalign.training.sft import train_sft

        _ = job.task.normaliser
        if job.config.steps == 0:
            return
        scored, render = job.task.scored(), job.task.renderer.plain
        with one_adapter(job) as lm:
            train_sft(job, lm, [render(prompt) for prompt in scored.prompts], scored.responses, job.config, "sft")

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy, whatever the preference."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import base, trained

        generator = trained(context) if context.config.steps else base(context)
        return Policy(generator, context.task.renderer.plain)

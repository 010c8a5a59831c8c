"""MOD: one expert per objective, mixed at every token.

Source: "Decoding-Time Language Model Alignment with Multiple Objectives", arXiv 2406.18853 (NeurIPS 2024).

For experts trained from one base under a reverse-KL penalty of equal strength, the policy that is optimal for
``sum_i w_i r_i`` has a closed form in theirs; token by token it is ``log pi = sum_i w_i log pi_i + const``. Nothing is
trained beyond the experts; every answer costs as many models as the preference has positive weights.

Choices of ours: the experts are runs of their own (``modpo`` at the corners of the simplex, where it is plain DPO),
shared with ``dpo-soups``; their cost is counted as this method's. Temperature and nucleus apply to the mixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy

EXPERTS = "modpo"
"""The method that trains the experts."""


class Config(Strict):
    """Settings of MOD."""

    experts: DpoConfig = DpoConfig()
    """How each expert is trained: the settings of ``modpo``, of which every corner of the simplex is one run."""


class Mod:
    """One expert per objective, whose next-token distributions are mixed by the preference."""

    name: ClassVar[str] = "mod"
    summary: ClassVar[str] = "DPO experts, next-token distributions mixed by the preference (arXiv 2406.18853)"
    capabilities: ClassVar[Capabilities] = Capabilities(needs_pairs=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"experts": {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}}

    def train(self, job: Job) -> None:
        """Obtain the experts, trained or found; nothing else is trained."""
        from moalign.training.experts import bring_experts

        bring_experts(job, EXPERTS, job.config.experts.model_dump(mode="json"))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy that samples every token from the experts' mixture."""
        from moalign.policies.mixed import mixed

        return mixed(context, preference)

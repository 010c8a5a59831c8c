"""Rewarded soups: one RL expert per objective, their weights interpolated.

Source: "Rewarded soups: towards Pareto-optimal alignment by interpolating weights fine-tuned on diverse rewards",
arXiv 2306.04488 (NeurIPS 2023).

Every expert is trained by RL on one objective from the same base (here: ``morlhf`` at the corners of the simplex); a
preference w is answered by the base with the change of weights ``dW = sum_i w_i s_i B_i A_i``, where s_i B_i A_i is
what expert i's adapter adds (s_i its LoRA scaling). A one-hot w is that expert, exactly. Averaging the A's and the B's
apart is another model and not what the paper interpolates.

Choices of ours: the experts are runs of their own, so that the same experts are never trained twice; their cost is
counted as this method's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, PpoConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(CostHints):
    """Settings of rewarded soups."""

    experts: PpoConfig = PpoConfig()
    """How each expert is trained: the settings of ``morlhf``, of which every corner of the simplex is one run."""

    def expert_runs(self) -> tuple[str, dict[str, Any]]:
        """See :class:`CostHints`."""
        from moalign.training.experts import rl_settings

        return "morlhf", rl_settings(self.experts)


class RewardedSoups:
    """One model per preference, made of one RL expert per objective without further training."""

    name: ClassVar[str] = "rewarded-soups"
    summary: ClassVar[str] = "one RL expert per objective, weights interpolated by the preference (arXiv 2306.04488)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="merged", needs_online_rewards=True, snapshots=False, interpolates=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"experts": {"steps": 2, "batch": 4, "warmup": 0}}

    def train(self, job: Job) -> None:
        """Obtain the experts, trained or found; nothing else is trained."""
        from moalign.training.experts import bring_experts

        bring_experts(job, *job.config.expert_runs())

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the model whose weights are the experts' interpolated at the preference."""
        from moalign.policies.mixed import interpolated

        return interpolated(context, preference)

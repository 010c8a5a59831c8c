"""DPO soups: one DPO expert per objective, their weights interpolated.

Source: the weight interpolation of rewarded soups, arXiv 2306.04488 (NeurIPS 2023), with experts trained by DPO
(arXiv 2305.18290) on the pairs of one objective each: the offline baseline that MODPO (arXiv 2310.03708) compares
with.

A preference w is answered by the base with the change of weights ``dW = sum_i w_i s_i B_i A_i``, where s_i B_i A_i is
what expert i's adapter adds (s_i its LoRA scaling). A one-hot w is that expert, exactly.

Choices of ours: the experts are runs of their own (``modpo`` at the corners of the simplex, where it is plain DPO), so
that the same experts are never trained twice, also when ``mod`` asks for them; their cost is counted as this method's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, DpoConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(CostHints):
    """Settings of DPO soups and of MOD."""

    experts: DpoConfig = DpoConfig()
    """How each expert is trained: the settings of ``modpo``, of which every corner of the simplex is one run."""

    def expert_runs(self) -> tuple[str, dict[str, Any]]:
        """See :class:`CostHints`."""
        return "modpo", self.experts.model_dump(mode="json")


class DpoSoups:
    """One model per preference, made of one DPO expert per objective without further training."""

    name: ClassVar[str] = "dpo-soups"
    summary: ClassVar[str] = "one DPO expert per objective, weights interpolated by the preference (arXiv 2306.04488)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="merged", needs_pairs=True, snapshots=False, interpolates=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"experts": {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}}

    def train(self, job: Job) -> None:
        """Obtain the experts, trained or found; nothing else is trained."""
        from moalign.training.experts import bring_experts

        bring_experts(job, *job.config.expert_runs())

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the model whose weights are the experts' interpolated at the preference."""
        from moalign.policies.mixed import interpolated

        return interpolated(context, preference)

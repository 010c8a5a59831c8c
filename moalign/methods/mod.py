"""MOD: one expert per objective, mixed at every token.

Source: "Decoding-Time Language Model Alignment with Multiple Objectives", arXiv 2406.18853 (NeurIPS 2024).

For experts trained from one base under a reverse-KL penalty of equal strength, the policy that is optimal for
``sum_i w_i r_i`` has a closed form in theirs; token by token it is ``log pi = sum_i w_i log pi_i + const``. Nothing is
trained beyond the experts; every answer costs as many models as the preference has positive weights.

Choices of ours: the experts, and the settings, are those of DPO soups (:mod:`moalign.methods.dpo_soups`). Temperature
and nucleus apply to the mixture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.dpo_soups import DpoSoups
from moalign.training.job import RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Mod(DpoSoups):
    """The experts of DPO soups, whose next-token distributions are mixed by the preference."""

    name: ClassVar[str] = "mod"
    summary: ClassVar[str] = "DPO experts, next-token distributions mixed by the preference (arXiv 2406.18853)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="mixed", needs_pairs=True, mixes=True, snapshots=False)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy that samples every token from the experts' mixture."""
        from moalign.policies.mixed import mixed

        return mixed(context, preference)

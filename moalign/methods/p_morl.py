"""P-MORL: PPO on the scalarised reward, one policy that reads its preference from the prompt.

Source: prompt-conditioned multi-objective RLHF, the baseline P-MORL of MO-ODPO, arXiv 2503.00295, section 4.

Every prompt carries a preference w; the reward of its response is ``w . r`` (normalised), with one value head that
sees w through the prompt. It is MORLHF with ``conditioned: true`` (:mod:`moalign.methods.morlhf`, whose training this
is), as a method that may be asked for any preference. Deviation: w is drawn from the grid (or ``--prefs``), ``groups``
different ones per rollout, as in MOC, so that the two differ in nothing but how the objectives are combined.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.morlhf import train_conditioned
from moalign.training.job import Job, RunContext
from moalign.training.settings import ConditionedPpoConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(ConditionedPpoConfig):
    """Settings of P-MORL; those of PPO and the engine are inherited."""


class PMorl:
    """One policy for every preference, trained by PPO on w . r."""

    name: ClassVar[str] = "p-morl"
    summary: ClassVar[str] = "PPO on w.r, one policy that reads w from its prompt (P-MORL, as in arXiv 2503.00295)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="online", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "groups": 2}

    def train(self, job: Job) -> None:
        """Train adapter and value head; resumes from the last checkpoint."""
        train_conditioned(job)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference, style=context.config.style)

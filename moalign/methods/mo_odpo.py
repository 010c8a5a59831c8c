"""MO-ODPO: multi-objective online DPO.

Source: "Robust Multi-Objective Preference Alignment with Online DPO", arXiv 2503.00295 (AAAI 2025).

For every prompt of a batch a preference ``w ~ Dirichlet(alpha * 1)`` is drawn and written in front of the prompt; two
responses are sampled from the policy, ordered by ``s = w . r`` (normalised rewards, bare prompt), and one gradient
step is made on ``-log sigma(beta * (D(y+) - D(y-)))``, ``D(y) = log pi(y|x~) - log pi_ref(y|x~)`` on the prompt that
carries the preference, for policy and reference alike (algorithm 1). Exact ties and identical responses are dropped
and counted. With ``samples: n`` the best is paired with the worst by ``w . r``.

Deviations, all choices of ours and fields of :class:`Config`: ``pairing: per_objective`` (off) labels the pair once per
objective and minimises ``sum_k w_k L_DPO,k``, which others report under this method's name; ``warm_start: hindsight``
(off) first teaches the base what a stated preference means (:mod:`moalign.training.distil`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.online_dpo import ConditionedConfig

if TYPE_CHECKING:
    from moalign.policies.policy import Policy


class Config(ConditionedConfig):
    """Settings of MO-ODPO: the engine's, online DPO's and the warm start's."""


class MoOdpo:
    """One policy for every preference, trained on pairs of its own samples."""

    name: ClassVar[str] = "mo-odpo"
    summary: ClassVar[str] = "online DPO on pairs of the policy's own samples, ordered by w.r (arXiv 2503.00295)"
    capabilities: ClassVar[Capabilities] = Capabilities(needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "warmup": 0}

    def train(self, job: Job) -> None:
        """Train the adapter; resumes from the last checkpoint."""
        from moalign.training.online_dpo import train_conditioned

        train_conditioned(job, job.config)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference)

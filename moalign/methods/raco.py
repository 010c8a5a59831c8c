"""RACO: DPO on every objective's pairs, with steps that avert conflicts; one policy for each preference.

Source: "Reward-free Alignment for Conflicting Objectives", arXiv 2602.02495 (ICML 2026), algorithm 1.

It is DPO-LW (:mod:`moalign.methods.dpo_lw`: the same pairs, the same batches) with another step. Of the gradients g_k
of each objective's DPO loss, ``g_0 = sum_k w_k g_k`` is DPO-LW's step; RACO's is ``g_0 + c |g_0| g_q / |g_q|``, q
CAGrad's weights, none above w_k (:mod:`moalign.losses.cagrad`). ``c: 0`` is DPO-LW, bit for bit. As c is below 1 the
step vanishes where g_0 does and nowhere else: the points where training comes to rest are those of DPO-LW.

``mode: amopo`` is the paper's other baseline, the losses of AMoPO (arXiv 2506.07165) with fixed weights: mean
log-probabilities of tokens in place of log-ratios to the reference, ``sum_k w_k (-log sigma(beta (mean log pi(y_w) -
mean log pi(y_l))))``, in plain steps (c has no use). Its beta is on the scale of one token, not of a response. AMoPO's
own prompts for each objective and random weights are left out, as in RACO's comparison.

Choices of ours: an objective of weight 0 has no pairs in a batch, as in DPO-LW (clipped, its gradient could not enter
the step; it could only lower the others' p*); so a one-hot preference is plain DPO. The step is of the whole batch,
however it is accumulated; the paper's code sums the steps of its parts. The code switches clipping off by default, the
algorithm has it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.methods.dpo_lw import AllPairs, train_on_all_pairs
from moalign.training.job import Job, RunContext

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moalign.policies.policy import Policy


class Config(AllPairs):
    """Settings of RACO; those of DPO on pairs are inherited."""

    beta: float = Field(default=0.2, gt=0)
    """Strength of the KL term, the paper's; of ``mode: amopo`` the scale of a difference of mean log-probabilities."""
    mode: Literal["raco", "amopo"] = "raco"
    c: float = Field(default=0.4, ge=0, lt=1)
    """How far a step may be from the weighted one, in its own lengths; the paper's. 0: dpo-lw. Below 1, or the weighted
    loss need not fall."""

    def gradients_kept(self, objectives: int) -> int:
        """See :class:`DpoStage`."""
        return objectives if self.mode == "raco" and self.c else 0


class Raco:
    """One adapter per preference, trained on all objectives' pairs with conflict-averse steps."""

    name: ClassVar[str] = "raco"
    summary: ClassVar[str] = "DPO per preference on all objectives' pairs, conflict-averse steps (arXiv 2602.02495)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline",
        one_policy=False,
        steerable=False,
        needs_pairs=True,
        whole="a step is made of the gradients of whole batches, one for each objective",
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}

    def train(self, job: Job) -> None:
        """Train an adapter for every preference; resumes at the preference and step of an interruption."""
        train_on_all_pairs(job, partial(trainer_of, job.config))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def trainer_of(config: Config, weights: Sequence[float], names: Sequence[str]) -> Callable[..., Any] | None:
    """Return what makes the trainer of one preference, whose positive ``weights`` are those of ``names``."""
    from moalign.training.conflict_averse import ConflictAverse, PerToken

    if config.mode == "amopo":
        return PerToken
    if not config.c or len(weights) == 1:
        return None
    return partial(ConflictAverse, weights, names, config.c)

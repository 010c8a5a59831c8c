"""MORLHF: PPO on the scalarised reward, one policy for every preference.

Source: the baseline of the multi-objective literature, e.g. Rewarded Soups, arXiv 2306.04488, section 2, and RiC,
arXiv 2402.10207 (both call it MORLHF); PPO as in Ziegler et al., arXiv 1909.08593.

For a preference w it maximises ``E[w . r] - kl_coef * KL(pi, pi_ref)``, r the normalised rewards, by clipped PPO with
one value head (:mod:`moalign.losses.ppo`: as MOC does, with a scalar reward). The prompt is bare; every
vector of ``--prefs`` (or of the task's grid) has a training of its own.

``conditioned: true`` is P-MORL: one policy that reads its preference from the prompt. Under this name it is judged at
the vectors it was trained on, like every run of the method; ``moalign train p-morl`` is the same policy as a method
that may be asked for any preference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import ConditionedPpoConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moalign.lm.language_model import LanguageModel
    from moalign.policies.policy import Policy

HEAD = "utility"
"""Name of the one value head."""
DIAGNOSTICS = ("kl", "kl_coef", "entropy", "clip_fraction", "value_loss/")


class Config(ConditionedPpoConfig):
    """Settings of MORLHF; those of PPO and the engine are inherited."""

    conditioned: bool = False
    """One policy that reads its preference from the prompt (P-MORL); ``groups``, ``style`` and ``warm_start`` are for
    it alone."""

    @property
    def one_policy(self) -> bool:
        """See :class:`CostHints`."""
        return self.conditioned

    @model_validator(mode="after")
    def _warm_start_reads(self) -> Config:
        if self.warm_start != "none" and not self.conditioned:
            raise ValueError("warm_start teaches to read a preference: it needs conditioned: true")
        return self


class Morlhf:
    """One policy for each preference, trained by PPO on w . r."""

    name: ClassVar[str] = "morlhf"
    summary: ClassVar[str] = "PPO on w.r, one policy per preference (MORLHF, as in arXiv 2306.04488)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="online", one_policy=False, steerable=False, needs_online_rewards=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "groups": 2}

    def train(self, job: Job) -> None:
        """Train one adapter per preference (``conditioned``: one for all); resumes in the one in flight."""
        from moalign.training.grid import each_preference

        if job.config.conditioned:
            train_conditioned(job)
            return
        for lm, preference, stage in each_preference(job):
            learn(job, lm, [preference], stage, "plain")

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for ``preference``; raises RequestError when there is none."""
        from moalign.policies.per_preference import index_of, trained_for
        from moalign.policies.prompted import conditioned

        if not context.config.conditioned:
            return trained_for(context, preference)
        index_of(context, preference)
        return conditioned(context, preference, style=context.config.style)


def train_conditioned(job: Job) -> None:
    """Train one policy that reads its preference from the prompt, and save it as the run's adapter (P-MORL)."""
    from moalign.training.distil import warm_start
    from moalign.training.grid import one_adapter

    with one_adapter(job) as lm:
        warm_start(job, lm, job.config, job.config.style, cap=job.config.reward_cap)
        learn(job, lm, job.preferences, "online", job.config.style)


def learn(
    job: Job,
    lm: LanguageModel,
    preferences: Sequence[Preference],
    phase: str,
    style: Literal["percent", "fraction", "plain"],
) -> None:
    """Train the active adapter of ``lm`` by PPO on ``w . r``, w drawn from ``preferences``."""
    from moalign.training.diagnostics import at_the_end
    from moalign.training.online import PpoTrainer
    from moalign.training.preference_draws import grouped

    config = job.config
    draw = grouped(preferences, min(config.groups, len(preferences)))
    trainer = PpoTrainer(job, lm, config, draw, [HEAD], phase, style)
    for rollout in trainer.rollouts():
        experience = trainer.experience(rollout.utility[:, None])
        for _ in range(config.epochs):
            trainer.update(experience, experience.advantages[..., 0])
    job.notes["diagnostics"] = at_the_end(job.run.metrics(), phase, config.steps, DIAGNOSTICS)

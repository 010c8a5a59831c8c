"""GRPO with several rewards: a group baseline in place of critics, one policy for every preference.

Source: GRPO, "DeepSeekMath", arXiv 2402.03300, on w . r (``aggregation: sum``). Other ways to make one advantage of
several rewards: GDPO, arXiv 2601.05242 (``gdpo``); RVPO, arXiv 2605.05750 (``rvpo``); DVAO, arXiv 2605.25604
(``dvao``); ``tchebycheff``. Their equations: :mod:`moalign.losses.grpo`.

Every prompt of a rollout carries a preference w and gets ``samples`` answers, its group. Normalised rewards are
standardised in the group, before or after they are summed, and all tokens of an answer share its advantage; clipped
updates as PPO's, the k3 estimate of the KL in the loss, both means over the batch's tokens.

Deviations, choices of ours. The papers train one policy for fixed weights; here w is drawn as for P-MORL and MOC,
``groups`` different vectors of the grid (or of ``--prefs``) per rollout, each for an equal part of the prompts, and the
policy reads it; ``--prefs W`` alone trains for one preference. GDPO whitens over the batch: with a preference for each
prompt that would mix them, so it is done over the answers of like preference. RVPO takes the plain mean over rewards,
of which ours with weights is the case of equal ones. ``tchebycheff``, with no source, is the augmented distance that
responses are ordered by elsewhere (:mod:`moalign.pareto.scalarisation`), of the standardised rewards: ``min_k Z_k /
w_k``, the other reading, lets the objective decide that counts least. DVAO is implemented from accounts of its paper,
whose authors published no code; it is not whitened, as they do not say so.

**What steers.** On the sandbox's base of before 2026-11-26 (seed 0, ``moalign train grpo``) ``sum`` reached .87 of the
optimum with tau .96 in 80 steps. ``gdpo`` reached .53 (``--set aggregation=gdpo --set beta=0.01 --set steps=140``) and
.48 (``beta=0.1``, ``lr=0.0015``, ``steps=100``), with all preferences up to (.4, .6) answered alike and all from (.6,
.4) on: rewards standardised one by one do not know what one costs of the other (:mod:`moalign.losses.grpo`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import OnlineConfig, WarmStart

if TYPE_CHECKING:
    from moalign.core.arrays import Matrix
    from moalign.policies.policy import Policy
    from moalign.training.rollout import Rollout

DIAGNOSTICS = ("kl", "beta", "entropy", "clip_fraction", "signal")


class Config(OnlineConfig, WarmStart):
    """Settings of GRPO; those of the online trainer are inherited."""

    samples: int = 8
    """Answers to each prompt: a group, whose mean is the baseline."""
    aggregation: Literal["sum", "gdpo", "rvpo", "dvao", "tchebycheff"] = "sum"
    """How one advantage is made of several rewards: :mod:`moalign.losses.grpo`."""
    risk: float = Field(default=1.0, gt=0)
    """Of ``aggregation: rvpo``; the paper has .5 to 2."""
    beta: float = Field(default=0.04, ge=0)
    """Strength of the KL term, in units of the standardised advantage; DeepSeekMath's."""
    clip_range: float = Field(default=0.2, gt=0, lt=1)
    """A probability ratio outside 1 - clip_range .. 1 + clip_range is not pushed further out."""
    groups: int = Field(default=8, ge=1)
    """Preferences per rollout, each for an equal part of the batch; at most as many as are trained on."""
    style: Literal["percent", "fraction"] = "percent"
    """How weights are written into the prompt: ``30.0%`` or ``0.3``."""

    @field_validator("samples")
    @classmethod
    def _a_group(cls, samples: int) -> int:
        if samples < 2:
            raise ValueError(
                f"the baseline is the mean of a group of answers, and a group of one has none; at least 2, "
                f"found {samples}"
            )
        return samples

    @property
    def rows_per_prompt(self) -> int:
        """A group."""
        return self.samples

    @model_validator(mode="after")
    def _a_prompt_each(self) -> Config:
        if self.groups > self.batch:
            raise ValueError(f"groups must be at most batch; found {self.groups} and {self.batch}")
        return self


class Grpo:
    """One policy for every preference, trained on answers compared with the others to their prompt."""

    name: ClassVar[str] = "grpo"
    summary: ClassVar[str] = (
        "GRPO on w.r, or on rewards standardised one by one, in groups of answers (arXiv 2402.03300)"
    )
    capabilities: ClassVar[Capabilities] = Capabilities(family="online", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "groups": 2, "samples": 2}

    def train(self, job: Job) -> None:
        """Train the adapter; resumes from the last checkpoint."""
        from moalign.losses import grpo
        from moalign.training.diagnostics import at_the_end
        from moalign.training.distil import warm_start
        from moalign.training.grid import one_adapter
        from moalign.training.kl_budget import KlStrength
        from moalign.training.online import OnlineTrainer
        from moalign.training.preference_draws import grouped

        config: Config = job.config
        with one_adapter(job) as lm:
            first = config.aggregation if config.aggregation == "tchebycheff" else "linear"
            warm_start(job, lm, config, config.style, first, config.reward_cap)
            trainer = OnlineTrainer(job, lm, config, grouped(job.preferences, config.groups), style=config.style)
            strength = KlStrength(config, "beta", config.beta, trainer.state, job.notes)
            for rollout in trainer.rollouts():
                advantages, metrics = advantages_of(rollout, config)
                tensors = batch_tensors(rollout, advantages)
                for _ in range(config.epochs):
                    for part in trainer.parts(np.arange(len(advantages)), tensors=tensors):
                        tokens = (part.logps, part.ref_logps, part.old_logps, part.entropy, part.response_mask)
                        loss = grpo.loss(*tokens, part.tensors, clip_range=config.clip_range, beta=strength.now)
                        trainer.backward(*loss)
                    trainer.step({**metrics, **strength.metrics})
                strength.adapt(rollout)
        job.notes["diagnostics"] = at_the_end(job.run.metrics(), trainer.phase, config.steps, DIAGNOSTICS)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference, style=context.config.style)


def advantages_of(rollout: Rollout, config: Config) -> tuple[Matrix, dict[str, float]]:
    """Return the advantage of each answer, ``[rows]``, and metrics.

    ``signal`` is the deviation of w . r in a group, a mean: near 0, rewards cancel at the preferences drawn.
    """
    from moalign.losses import grpo

    shape = (len(rollout.prompts), rollout.per_prompt)
    advantages = grpo.aggregated(rollout.z.reshape(*shape, -1), rollout.preferences, config.aggregation, config.risk)
    metrics = {"signal": float(rollout.utility.reshape(shape).std(axis=1, ddof=1).mean())}
    if config.aggregation in grpo.WHITENED:
        _, kinds = np.unique(rollout.preferences, axis=0, return_inverse=True)
        advantages = grpo.whitened(advantages, kinds.reshape(-1))
    return advantages.reshape(-1), metrics


def batch_tensors(rollout: Rollout, advantages: Matrix) -> dict[str, Any]:
    """Return the ``tensors`` of :func:`moalign.losses.grpo.loss` for all rows of a rollout."""
    import torch

    mask = rollout.samples.response_mask
    return {
        "advantages": torch.as_tensor(advantages, dtype=torch.float32, device=mask.device),
        # Sums over a row times this, averaged over rows, are means over the batch's tokens.
        "per_token": torch.full((len(mask),), len(mask) / float(mask.sum()), device=mask.device),
        **({} if rollout.importance is None else {"importance": rollout.importance}),
    }

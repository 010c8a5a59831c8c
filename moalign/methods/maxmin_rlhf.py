"""MaxMin-RLHF: one policy for all users, as good as can be for the group of users that it is worst for.

Source: "MaxMin-RLHF: Alignment with Diverse Human Preferences", arXiv 2402.08925, algorithms 1 and 2.

It learns from pairs labelled by mixed users, and from none of the task's rewards. Users are put into K groups
(``clusters``) with a reward r_k each by hard EM (:mod:`moalign.reward_models.hard_em`), and then

    max over pi of  min over k of  E[r_k(x, y)] - kl_coef * KL(pi, pi_ref)

by clipped PPO with a value head for every group (:mod:`moalign.losses.ppo`), ``A = sum_k lambda_k A_k``.
``clusters: 1`` is plain RLHF: one reward for everybody's pairs.

Deviation: the game is played by exponentiated weights over groups, lambda_k proportional to ``exp(-eta * S_k - damping
* s_k)``, s_k the mean r_k of the rollout in hand and S_k the sum of all until now. The paper's algorithm 1 trains on
the worst group of each step alone: ``play: worst``. ``damping`` is the proportional part beside the integral one, as in
PID Lagrangian methods (arXiv 2007.03964): by sums alone, policy and weights chase each other, and training may end
anywhere on their round.

Choices of ours: rewards are linear in the states of the frozen base (:mod:`moalign.training.user_rewards`), where the
paper fine-tunes K models in every round. They are compared in log odds, each 0 for the mean answer of the pairs: a
reward of Bradley-Terry is known up to a constant, and the paper does not say which. ``support``
(:mod:`moalign.training.support`) keeps the policy where such rewards mean something.

There is no preference to steer by: every one is answered alike.

**What it gains.** On sandbox-groups (seed 0, ``moalign train maxmin-rlhf --task sandbox-groups``) each of 100 users
came into the group of its taste, and the worst-off group was at +.07 [-.08, .29], in true log odds against the average
answer, at 1.9 nats from the base; with ``--set clusters=1`` at -.81 [-.95, -.68], 2.3 nats; with ``--set damping=0``
at -.90 [-1.08, -.72], 1.9 nats. MORLHF on the exact objectives at equal weights, which knows of no groups (``moalign
train morlhf --task sandbox-groups --prefs 0.3333,0.3333,0.3334``), leaves one at -5.64 [-5.83, -5.46], at 7.2 nats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import GroupsUsers, PpoConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moalign.core.arrays import Matrix
    from moalign.policies.policy import Policy

DIAGNOSTICS = ("kl", "kl_coef", "entropy", "clip_fraction", "reward/", "weight/")


class Config(PpoConfig, GroupsUsers):
    """Settings of MaxMin-RLHF; those of PPO are inherited."""

    pairs: int | None = Field(default=None, ge=1)
    """Most pairs of a user that are learned from; None: all."""
    ridge: float = Field(default=10.0, gt=0)
    """Of the rewards' logistic regressions, for features of unit variance."""
    starts: int = Field(default=10, ge=1)
    """Of EM, of which the likeliest end is taken."""
    play: Literal["exponentiated", "worst"] = "exponentiated"
    """Which groups a step is for: all by their weights, or the worst one alone."""
    eta: float = Field(default=0.02, gt=0)
    """Of ``play: exponentiated``: what a step at which a group is worse off by one adds to its log weight for good."""
    damping: float = Field(default=0.5, ge=0)
    """Of ``play: exponentiated``: what the step in hand adds for itself alone."""


class MaxminRlhf:
    """One policy that serves the worst-off group of users best."""

    name: ClassVar[str] = "maxmin-rlhf"
    summary: ClassVar[str] = "groups found among users who label pairs, PPO for the worst-off group (arXiv 2402.08925)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="online", needs_pairs=True, whole="users are grouped by the pairs of all of them"
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "pairs": 8, "starts": 1}

    def train(self, job: Job) -> None:
        """Find the groups, then train adapter and value heads; resumes in either."""
        import torch

        from moalign.losses.ppo import whitened
        from moalign.training.diagnostics import at_the_end
        from moalign.training.grid import one_adapter
        from moalign.training.online import PpoTrainer
        from moalign.training.preference_draws import grouped
        from moalign.training.user_rewards import find_groups, panel_of_groups

        config: Config = job.config
        with one_adapter(job) as lm:
            find_groups(job, lm, config.clusters, config.pairs, config.ridge, config.starts)
            own = replace(job, panel=panel_of_groups(job, lm))
            groups = own.panel.names
            # Whitened one by one, groups would be weighed by more than their weights.
            plain = config.model_copy(update={"whiten": "none"})
            even = grouped([[1 / len(groups)] * len(groups)], 1)  # which the policy does not read
            trainer = PpoTrainer(own, lm, plain, even, groups, style="plain")
            sums = trainer.state  # kept in checkpoints
            sums.update({f"sum/{name}": 0.0 for name in groups})
            for rollout in trainer.rollouts():
                experience = trainer.experience(rollout.z)
                means = rollout.z.mean(axis=0)
                for name, mean in zip(groups, means.tolist(), strict=True):
                    sums[f"sum/{name}"] += mean
                shares = weights([sums[f"sum/{name}"] for name in groups], means, config)
                each = torch.as_tensor(shares, dtype=torch.float32, device=lm.device)
                one = whitened((experience.advantages @ each).unsqueeze(-1), experience.mask, config.whiten).squeeze(-1)
                metrics = {f"weight/{name}": float(share) for name, share in zip(groups, shares, strict=True)}
                for _ in range(config.epochs):
                    trainer.update(experience, one, metrics)
        job.notes["diagnostics"] = at_the_end(job.run.metrics(), trainer.phase, config.steps, DIAGNOSTICS)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy, whatever the preference."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import trained

        return Policy(trained(context), context.task.renderer.plain)


def weights(sums: Sequence[float], means: Matrix, config: Config) -> Matrix:
    """Return lambda, ``[K]``, from groups' mean rewards, of the step in hand and summed over all steps until then."""
    if config.play == "worst":
        return np.asarray(np.eye(len(means))[int(np.argmin(means))])
    logits = -config.eta * np.asarray(sums) - config.damping * means
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum())

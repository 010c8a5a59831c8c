"""PD-MORL: PPO on w . r with a critic per objective, both drawn towards the preference's direction.

Source: "PD-MORL: Preference-Driven Multi-Objective Reinforcement Learning Algorithm", arXiv 2208.07914, section 4.

One policy, which reads its preference w from the prompt, and a vector of critics V. With d_w the direction of w and
``g(d, v)`` the angle between two vectors (:mod:`moalign.losses.directional`):

    critic   minimise  sum_i (V_i - return_i)^2 + critic_angle * g(d_w, V)
    actor    maximise  w . Q - actor_angle * g(d_w, Q)

It is P-MORL (:mod:`moalign.methods.p_morl`) with a value head for each objective, as MOC has them, and these two terms.

Deviations. The paper's actor-critic is TD3, whose actor follows the gradient of Q in the action. Tokens have none: here
PPO follows the policy gradient of the same objective, with Q[t] the lambda-return and V[t] its baseline:
``A = w . (Q - V) + actor_angle * (g(d_w, V) - g(d_w, Q))``, whitened as a whole. Nothing is replayed, so there is no
hindsight replay; preferences are drawn as for P-MORL and MOC. The paper's code measures in degrees, and cuts angles at
a right one.

Angles need an origin, and normalised rewards are 0 at the mean of the data: they are measured from the lower end of the
calibration split's scores (``lo`` of the normaliser), the reference point of the hypervolume (choice). Q and V hold the
KL cost, as MOC's do (``kl: inside``), which the directions do not: with ``kl_coef`` of .01 and 6 nats to come it turns
a return by .014 radians or so, with .2 and 10 nats by .9, where the angle means little.

``directions: data`` is in the place of the paper's interpolator: the solution for a preference need not lie in the
direction of its weights, and the paper interpolates between the solutions of key preferences, trained before. Here d_w
is the mean reward of the calibration split's responses that are best for w, one for each prompt (choice); ``weights``
takes w itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import ConditionedPpoConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from moalign.core.amounts import Amount, Amounts
    from moalign.core.arrays import Matrix
    from moalign.losses.ppo import Experience
    from moalign.policies.policy import Policy
    from moalign.training.online import PpoTrainer

DIAGNOSTICS = ("kl", "kl_coef", "entropy", "clip_fraction", "angle", "value_loss/")


class Config(ConditionedPpoConfig):
    """Settings of PD-MORL; those of PPO and the engine are inherited."""

    actor_angle: float = Field(default=1.0, ge=0)
    """What a radian between the direction and the return costs, in units of the normalised reward."""
    critic_angle: float = Field(default=0.1, ge=0)
    """Weight of the angle, in radians, beside the value heads' squared errors."""
    directions: Literal["data", "weights"] = "data"
    """data: where the calibration split's best responses for w lie; weights: w itself."""

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        distilled = super().learns_from(task)
        return distilled + task.calibration.first() if self.directions == "data" else distilled


class PdMorl:
    """One policy for every preference, trained by PPO on w . r and the angle to the preference's direction."""

    name: ClassVar[str] = "pd-morl"
    summary: ClassVar[str] = "PPO on w.r, a critic per objective, angles to w's direction (PD-MORL, arXiv 2208.07914)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="online", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "groups": 2}

    def train(self, job: Job) -> None:
        """Train adapter and value heads; resumes from the last checkpoint."""
        import torch

        from moalign.training.diagnostics import at_the_end
        from moalign.training.distil import warm_start
        from moalign.training.grid import one_adapter
        from moalign.training.online import PpoTrainer
        from moalign.training.preference_draws import grouped

        config, normaliser = job.config, job.task.normaliser
        towards, origin = directions_of(job), normaliser.z(normaliser.lo)
        with one_adapter(job) as lm:
            warm_start(job, lm, config, config.style, cap=config.reward_cap)
            # What is whitened is the one advantage: of objectives whitened each for itself, w . A is of other rewards.
            plain = config.model_copy(update={"whiten": "none"})
            draw = grouped(job.preferences, config.groups)
            trainer = PpoTrainer(job, lm, plain, draw, job.task.names, style=config.style)
            for rollout in trainer.rollouts():
                experience = trainer.experience(rollout.z)
                drawn = [tuple(w) for w in rollout.preferences.tolist() for _ in range(rollout.per_prompt)]
                zero, w, d = (
                    torch.as_tensor(np.array(vectors), dtype=torch.float32, device=lm.device).unsqueeze(-2)
                    for vectors in (origin, drawn, [towards[preference] for preference in drawn])
                )
                advantages, metrics = combined(experience, w, d, zero, config)
                for _ in range(config.epochs):
                    update(trainer, experience, advantages, d, zero, config, metrics)
        job.notes["diagnostics"] = at_the_end(job.run.metrics(), trainer.phase, config.steps, DIAGNOSTICS)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference, style=context.config.style)


def directions_of(job: Job) -> dict[Preference, Sequence[float]]:
    """Return d_w for every preference that is trained on; those of data are a stage, kept in the run's notes."""
    preferences = [tuple(map(float, preference)) for preference in job.preferences]
    if job.config.directions == "weights":
        return dict(zip(preferences, preferences, strict=True))
    if not job.stage_done("directions"):
        scored, normaliser = job.calibration(), job.task.normaliser
        if len(set(scored.prompts)) == len(scored.prompts):
            raise RequestError(
                "directions: data looks for the best of several responses to a prompt, but the calibration split has "
                "one to each; allowed: directions: weights, or a task with more responses"
            )
        z, lowest = normaliser.z(scored.raw), normaliser.z(normaliser.lo)
        job.notes["directions"] = [(best_means(scored.prompts, z, w) - lowest).tolist() for w in preferences]
        job.finish_stage("directions")
    return dict(zip(preferences, job.notes["directions"], strict=True))


def best_means(prompts: Sequence[str], z: Matrix, weights: Sequence[float]) -> Matrix:
    """Return the mean of the responses that are best by ``w . z``, one for each prompt, ``[objectives]``."""
    utility, best = z @ np.asarray(weights), dict[str, int]()
    for row, prompt in enumerate(prompts):
        if prompt not in best or utility[row] > utility[best[prompt]]:
            best[prompt] = row
    return np.asarray(z[list(best.values())].mean(axis=0))


def combined(
    experience: Experience, w: Tensor, d: Tensor, origin: Tensor, config: Config
) -> tuple[Tensor, dict[str, float]]:
    """Return the one advantage of the update, ``[rows, T]``, and the mean angle of the returns, in radians.

    ``w`` and ``d`` are ``[rows, 1, objectives]``, ``origin`` is ``[1, objectives]``.
    """
    from moalign.losses.directional import angle
    from moalign.losses.ppo import whitened

    returns, mask = experience.returns - origin, experience.mask
    after, before = angle(d, returns), angle(d, returns - experience.advantages)
    advantages = (w * experience.advantages).sum(-1) + config.actor_angle * (before - after)
    one = whitened((advantages * mask).unsqueeze(-1), mask, config.whiten).squeeze(-1)
    return one, {"angle": float(after[mask].mean())}


def update(
    trainer: PpoTrainer,
    experience: Experience,
    advantages: Tensor,
    d: Tensor,
    origin: Tensor,
    config: Config,
    metrics: Mapping[str, float],
) -> None:
    """Make one update with the one advantage of each token, ``[rows, T]``, and the critics' angle to ``d``."""
    from moalign.losses import ppo
    from moalign.losses.directional import angle

    tensors = {**experience.tensors(advantages), "directions": d}
    for part in trainer.parts(np.arange(len(advantages)), tensors=tensors):
        assert part.values is not None
        tokens = (part.logps, part.entropy, part.values, part.old_logps, part.response_mask)
        loss, measured = ppo.loss(
            *tokens, part.tensors, trainer.heads, clip_range=config.clip_range, vf_coef=config.vf_coef
        )
        angles = angle(part.tensors["directions"], part.values - origin) * part.response_mask
        drawn = (angles.sum(-1) * part.tensors["per_token"]).mean()
        trainer.backward(loss + config.vf_coef * config.critic_angle * drawn, measured)
    trainer.step({**metrics, "kl_coef": trainer.strength.now})

"""MOC: multi-objective control, one policy for every preference.

Source: "One Model for All: Multi-Objective Controllable Language Models", arXiv 2604.04497.

Maximise (J_1 .. J_m) subject to the rewards being aligned with the preference p, which is written beside the prompt.
The multi-objective step is taken at the level of the policy's outputs, not of its parameters, so one backward pass per
update is enough whatever m is. For the responses of one preference in a rollout:

1. ``A_i[t]``: advantages of objective i, from its own value head (:mod:`moalign.losses.ppo`).
2. ``e = p - s(Rbar)``, Rbar the mean normalised reward; the constraint is active when ``psi = mean(e^2) > phi``.
3. ``v_i = gate(u) u A_i`` over the tokens, u = pi / pi_old, gate 0 where PPO's clipping leaves no gradient;
   ``v_c = sum_i e_i v_i``; ``q_i = (v_i + lam v_c) / (1 + lam)`` while active, else ``v_i``.
4. ``c = argmin over the simplex of || sum_i c_i q_i ||^2`` (:mod:`moalign.losses.min_norm`).
5. ``omega_i = (c_i + lam e_i) / (1 + lam)`` while active, else ``c_i``; one clipped PPO update with
   ``A = sum_i omega_i A_i``.

The KL cost (``kl``): ``inside`` puts it into every objective's reward, as the parent method's code reads. It is then
combined as they are, with the weight ``sum_i omega_i``: 1 / (1 + lam) for ``soft`` and 0 for ``switch`` while the
constraint is active (the e_i sum to 0), anything once advantages are whitened. ``outside`` makes it an advantage of its
own, added to A with weight 1 after step 5 and unknown to steps 2 to 5 (:mod:`moalign.losses.ppo`, ``kl_apart``).
Measured by ``moalign train moc --task T --set kl=...``, inside against outside: sandbox (the base before) .910, .909
of the optimum against .899, .886 (two seeds; outside at half the ``kl_coef`` .900, .913), its learned rewards .488
against .482, assistant a hypervolume of .673 against .638 (``epochs=1``, ``lr=0.0005``; one seed). So ``inside`` is the
default; for ``switch`` it means no KL while the constraint is active.

Deviations, choices of ours: ``groups`` preferences of the grid share a rollout (the parent method: one), with steps 2
to 5 for each of them and one common update. ``control: simplex`` takes ``s(R) = sigmoid(R) / sum sigmoid(R)``;
``raw_mse`` compares p with R itself, the literal reading, which pins rewards at p instead of growing them. The public
text does not settle how control enters the min-norm problem: ``mode: soft`` is as above; ``switch`` uses e alone while
the constraint is active; ``stacked`` makes v_c an (m + 1)-th vector. An objective that is constant in a group says
nothing there and gets no weight: min-norm would give it all of it. Advantages are scaled per objective before step 3
(``whiten``), as min-norm favours short vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.losses.min_norm import min_norm
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import ConditionedPpoConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moalign.losses.ppo import Experience
    from moalign.policies.policy import Policy
    from moalign.training.rollout import Rollout

DIAGNOSTICS = ("kl", "entropy", "clip_fraction", "active", "psi", "c/", "omega/", "e/", "value_loss/")

Mode = Literal["soft", "switch", "stacked"]


class Config(ConditionedPpoConfig):
    """Settings of MOC; those of PPO and the engine are inherited."""

    mode: Mode = "soft"
    control: Literal["simplex", "raw_mse"] = "simplex"
    kl: Literal["inside", "outside"] = "inside"
    """Where the KL cost is: in every objective's reward, weighed as they are; or beside them, with weight 1."""
    phi: float = Field(default=1e-3, ge=0, le=1)
    """The constraint is active while the mean squared control error is above it; with ``simplex`` 1 is never."""
    lam_start: float = Field(default=2.0, ge=0)
    lam: float = Field(default=5.0, ge=0)
    """Weight of control against the min-norm step, reached from ``lam_start`` on a line."""
    lam_ramp: float = Field(default=1 / 3, ge=0, le=1)
    """Share of the steps in which it is reached."""


class Moc:
    """One policy for every preference, with a critic per objective and a min-norm step on its outputs."""

    name: ClassVar[str] = "moc"
    summary: ClassVar[str] = "PPO with a critic per objective, min-norm step and preference control (arXiv 2604.04497)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="online", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "groups": 2}

    def train(self, job: Job) -> None:
        """Train adapter and value heads; resumes from the last checkpoint."""
        from moalign.losses import ppo
        from moalign.training.diagnostics import at_the_end
        from moalign.training.distil import warm_start
        from moalign.training.grid import one_adapter
        from moalign.training.online import PpoTrainer
        from moalign.training.preference_draws import grouped

        config, names, apart = job.config, job.task.names, job.config.kl == "outside"
        with one_adapter(job) as lm:
            warm_start(job, lm, config, config.style, cap=config.reward_cap)
            heads = [*names, ppo.KL_HEAD] if apart else names
            trainer = PpoTrainer(job, lm, config, grouped(job.preferences, config.groups), heads, style=config.style)
            for rollout in trainer.rollouts():
                experience = trainer.experience(rollout.z, kl_apart=apart)
                for epoch in range(config.epochs):
                    now = experience.old_logps if epoch == 0 else trainer.policy_logps()
                    ratios = (now - experience.old_logps).exp()
                    advantages, metrics = combined(rollout, experience, ratios, config, names)
                    trainer.update(experience, advantages, metrics)
        job.notes["diagnostics"] = at_the_end(job.run.metrics(), trainer.phase, config.steps, DIAGNOSTICS)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference, style=context.config.style)


def combined(
    rollout: Rollout, experience: Experience, ratios: Tensor, config: Config, names: Sequence[str]
) -> tuple[Tensor, dict[str, float]]:
    """Return the one advantage of the update ``[rows, T]``, and metrics (means over groups): steps 2 to 5.

    Rows with the same preference are a group; ``ratios`` are u = pi / pi_old, ``[rows, T]``.
    """
    import torch

    preferences, of_prompt = np.unique(rollout.preferences, axis=0, return_inverse=True)
    group = np.repeat(of_prompt.reshape(-1), rollout.per_prompt)
    lam = ramp(config, rollout.step)
    grams = policy_grams(experience, ratios, group, config.clip_range)
    c, omega, e = (np.zeros_like(preferences) for _ in range(3))
    psi = np.zeros(len(preferences))
    for g, p in enumerate(preferences):
        z = rollout.z[group == g]
        speaks = np.ptp(z, axis=0) > 1e-9
        e[g] = control_error(p, z.mean(axis=0), config.control)
        psi[g] = np.mean(e[g] ** 2)
        omega[g], c[g] = weights(grams[g], e[g] if psi[g] > config.phi else None, lam, config.mode, speaks)
    metrics = {"psi": float(psi.mean()), "active": float((psi > config.phi).mean())}
    for key, values in (("c", c), ("omega", omega), ("e", np.abs(e))):
        metrics.update({f"{key}/{n}": float(v) for n, v in zip(names, values.mean(axis=0), strict=True)})
    share = torch.as_tensor(omega[group], dtype=experience.advantages.dtype, device=experience.advantages.device)
    return (experience.advantages * share[:, None, :]).sum(-1), {**metrics, "lam": lam}


def ramp(config: Config, step: int) -> float:
    """Return lam at a step (from 0): on a line from ``lam_start`` to ``lam``, which it then keeps."""
    length = config.lam_ramp * config.steps
    done = 1.0 if length <= 0 else min(1.0, step / length)
    return config.lam_start + done * (config.lam - config.lam_start)


def control_error(preference: Matrix, reward: Matrix, control: str) -> Matrix:
    """Return ``e = p - s(R)``, ``[objectives]``; ``reward`` is the group's mean normalised reward."""
    if control == "raw_mse":
        return preference - reward
    likes = 1 / (1 + np.exp(-np.clip(reward, -30, 30)))
    return np.asarray(preference - likes / likes.sum())


def policy_grams(experience: Experience, ratios: Tensor, group: NDArray[np.intp], clip_range: float) -> Matrix:
    """Return the Gram matrices of the vectors ``v_i = gate(u) u A_i`` of each group, ``[groups, m, m]``.

    ``ratios`` are u, ``[rows, T]``; ``group`` numbers each row's group.
    """
    import torch

    from moalign.losses.ppo import gate

    advantages, u = experience.advantages, ratios.unsqueeze(-1)
    v = (advantages * u * gate(u, advantages, clip_range)).double()
    index = torch.as_tensor(group, device=v.device)

    def sums(of_rows: Tensor) -> Tensor:
        return v.new_zeros((int(group.max()) + 1, *of_rows.shape[1:])).index_add_(0, index, of_rows)

    grams, tokens = sums(torch.einsum("rti,rtj->rij", v, v)), sums(experience.mask.sum(-1).to(v.dtype))
    return np.asarray((grams / tokens[:, None, None]).cpu().numpy())


def weights(
    gram: Matrix, error: Matrix | None, lam: float, mode: Mode, speaks: NDArray[np.bool_] | None = None
) -> tuple[Matrix, Matrix]:
    """Return ``(omega, c)`` of one group, ``[m]`` each, from the Gram matrix of the vectors v_i.

    ``error`` is e, None while the constraint is inactive. An objective that does not vary in the group (``speaks``)
    gets weight 0; when none does, all count.
    """
    size = len(gram)
    live = np.flatnonzero(speaks) if speaks is not None and speaks.any() else np.arange(size)
    g, omega, c = gram[np.ix_(live, live)], np.zeros(size), np.zeros(size)
    if error is None:
        c[live] = omega[live] = min_norm(g)
        return omega, c
    e = error[live]
    if mode == "switch":
        omega[live] = e
    elif mode == "stacked":
        both = np.vstack([np.eye(len(live)), e])  # v_c = sum_i e_i v_i, so its inner products follow from G
        shares = min_norm(both @ g @ both.T)
        c[live], omega[live] = shares[:-1], shares[:-1] + shares[-1] * e
    else:
        turn = (np.eye(len(live)) + lam * np.outer(np.ones(len(live)), e)) / (1 + lam)  # q = turn v
        c[live] = min_norm(turn @ g @ turn.T)
        omega[live] = (c[live] + lam * e) / (1 + lam)
    return omega, c

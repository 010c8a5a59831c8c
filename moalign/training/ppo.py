"""Clipped PPO with a value head for every reward, as a loss for the online engine.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, and "High-Dimensional Continuous
Control Using Generalized Advantage Estimation", arXiv 1506.02438; the token-wise KL cost and its adaptive coefficient
are those of Ziegler et al., arXiv 1909.08593. A method says what is rewarded (one column per head) and how the heads'
advantages become the one advantage of the update; everything else is here.

    reward of token t, head i:   -kl_coef * (log pi_old - log pi_ref)_t, on the last token also r_i
    A_i[t] = sum_l (gamma * lambda)^l * delta_i[t + l],   delta_i[t] = reward + gamma * V_i[t + 1] - V_i[t]
    loss = -mean_t min(u A, clip(u, 1 - eps, 1 + eps) A) + vf_coef * sum_i mean_t (V_i - (A_i + V_i,old))^2
    u = pi / pi_old

With ``kl_apart`` the KL cost is no part of the heads' rewards but a stream of its own with a head of its own, whose
advantage A_kl is added with weight 1 to the one advantage that the method makes of the others. Its head is there for
the cost to come: without it GAE would forget the cost of tokens 20 steps ahead (lambda^20 = .36), and what all
responses cost alike would push every sampled token down. ``kl_coef`` is in units of the normalised reward, and so A_kl
is divided by no deviation of its own. Where the others are divided by theirs (``whiten``), equal weights 1 / m
maximise ``sum_i (1 / m) r_i / sd_i = s * (a weighted mean of the rewards)``, s the mean of ``1 / sd_i``: A_kl is
multiplied by this s, so that a nat costs ``kl_coef`` of that mean. s does not depend on how the method weighs the
objectives: weights that sum to 0 must not switch the cost off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from moalign.lm.language_model import TokenOutputs
from moalign.losses.ppo import adapted, beside, clipped, gae, gate, token_rewards, whitened
from moalign.training.diagnostics import at_the_end
from moalign.training.online import OnlineEngine, Part, Rollout, Selection
from moalign.training.settings import PpoConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job


KL_HEAD = "kl"
"""Name of the head that foresees the KL cost where it is apart."""

Draw = Callable[[np.random.Generator, int], "NDArray[np.float64]"]
Rewards = Callable[[Rollout], "NDArray[np.float64]"]
"""Rollout -> reward of each response and head, ``[rows, heads]``."""


class ValueHeads(torch.nn.Module):
    """One linear value head per reward on the policy's last hidden state; they start at 0.

    They learn to read the state and do not shape it: with their gradient in the adapters too, the critics' errors
    (large as soon as some answers are malformed) took the policy apart within 40 steps on the sandbox.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, heads)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[rows, T, width]`` -> values ``[rows, T, heads]``."""
        values: Tensor = self.linear(hidden.detach().float())
        return values


@dataclass
class Experience:
    """What a rollout teaches, fixed before its first update."""

    mask: Tensor
    """Response tokens, bool ``[rows, T]``."""
    old_logps: Tensor
    """``[rows, T]``."""
    advantages: Tensor
    """``[rows, T, rewards]``; 0 outside the mask."""
    returns: Tensor
    """What the value heads are trained towards, ``[rows, T, heads]``."""
    kl: Tensor | None = None
    """Advantages of the KL cost where it is apart, on the scale of the others, ``[rows, T]``."""


class Combine(Protocol):
    """How the heads' advantages become the one advantage of the update."""

    def __call__(self, rollout: Rollout, experience: Experience, ratios: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar advantages ``[rows, T]`` and metrics; ``ratios`` are u = pi / pi_old, ``[rows, T]``."""
        ...


def only(rollout: Rollout, experience: Experience, ratios: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Combine the advantages of a single head: there is nothing to combine."""
    return experience.advantages[..., 0], {}


class PpoLoss:
    """The loss that the online engine is given."""

    def __init__(
        self,
        config: PpoConfig,
        rewarded: Sequence[str],
        draw: Draw,
        rewards: Rewards,
        combine: Combine,
        kl_apart: bool = False,
    ) -> None:
        """Prepare the loss.

        Args:
            rewarded: a name for every column of ``rewards``, for the metrics.
            draw: draws the preferences of a rollout, see :class:`~moalign.training.online.RolloutLoss`.
            kl_apart: the KL cost is a stream of its own, which ``combine`` does not see; else part of every reward.
        """
        self.config, self.preferences, self.rewards, self.combine = config, draw, rewards, combine
        self.kl_apart = kl_apart
        self.heads = [*rewarded, KL_HEAD] if kl_apart else list(rewarded)
        self.kl_coef = config.kl_coef
        self._rollout: Rollout | None = None
        self._experience: Experience | None = None

    def state(self) -> dict[str, float]:
        """Return what changes from step to step."""
        return {"kl_coef": self.kl_coef}

    def load_state(self, told: dict[str, float]) -> None:
        """Go on from :meth:`state`."""
        self.kl_coef = told["kl_coef"]

    def select(self, rollout: Rollout) -> Selection:
        """Take all rows, with their advantages under the policy as it is now."""
        told: dict[str, float] = {}
        if rollout is self._rollout and self._experience is not None and rollout.score_policy is not None:
            experience = self._experience
            ratios = (rollout.score_policy() - experience.old_logps).exp()
        else:
            experience = self._gather(rollout)
            ratios = torch.ones_like(experience.old_logps)  # nothing was trained since it was sampled
        advantages, metrics = self.combine(rollout, experience, ratios)
        if experience.kl is not None:
            advantages = advantages + experience.kl
        told.update(metrics)
        told["kl_coef"] = self.kl_coef
        rows, tokens = experience.mask.shape[0], float(experience.mask.sum())
        return Selection(
            rows=np.arange(rows),
            extras={
                "advantages": advantages,
                "returns": experience.returns,
                # Sums over a row times this, averaged over rows, are means over the batch's tokens.
                "per_token": torch.full((rows,), rows / tokens, device=advantages.device),
            },
            metrics=told,
        )

    def _gather(self, rollout: Rollout) -> Experience:
        """Compute advantages and returns of a new rollout, then adapt the KL coefficient to what it shows."""
        drawn = rollout.samples
        if rollout.values is None:
            raise ValueError("PPO needs an engine with value heads")
        ref_logps = rollout.ref_logps(torch.arange(len(drawn.logps)))
        terminal = torch.as_tensor(self.rewards(rollout), dtype=torch.float32, device=drawn.logps.device)
        config, mask, log_ratio = self.config, drawn.response_mask, drawn.logps - ref_logps
        rewards = token_rewards(terminal, log_ratio, mask, 0.0 if self.kl_apart else self.kl_coef)
        if self.kl_apart:
            cost = token_rewards(torch.zeros_like(terminal[:, :1]), log_ratio, mask, self.kl_coef)
            rewards = torch.cat([rewards, cost], dim=-1)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.gae_lambda)
        kl = None
        if self.kl_apart:
            advantages, kl = advantages[..., :-1], beside(advantages, mask, config.whiten)
        advantages = whitened(advantages, mask, config.whiten)
        if config.kl_target is not None:
            nats = float(log_ratio.sum(-1).mean())
            self.kl_coef = adapted(self.kl_coef, nats, config.kl_target, len(drawn.logps), config.kl_horizon)
        self._rollout = rollout
        self._experience = Experience(mask, drawn.logps, advantages, returns, kl)
        return self._experience

    def loss(self, outputs: TokenOutputs, part: Part) -> tuple[Tensor, dict[str, float]]:
        """Return policy and value loss of a part, means over tokens."""
        assert part.values is not None
        mask, scale = part.response_mask, part.extras["per_token"]

        def mean(tokens: Tensor) -> Tensor:
            return (torch.where(mask, tokens, torch.zeros_like(tokens)).sum(-1) * scale).mean()

        ratios, advantages = (outputs.logps - part.old_logps).exp(), part.extras["advantages"]
        policy = mean(clipped(ratios, advantages, self.config.clip_range))
        errors = [mean(error) for error in (part.values - part.extras["returns"]).square().unbind(-1)]
        loss = policy + self.config.vf_coef * torch.stack(errors).sum()
        clipped_away = ~gate(ratios.detach(), advantages, self.config.clip_range)
        told = {
            "policy_loss": float(policy.detach()),
            "entropy": float(mean(outputs.entropy)),
            "clip_fraction": float(mean(clipped_away.float())),
        }
        told.update({f"value_loss/{n}": float(e.detach()) for n, e in zip(self.heads, errors, strict=True)})
        return loss, told


# -- preferences -------------------------------------------------------------------------------------------------------


def grouped(vectors: Sequence[Sequence[float]], groups: int) -> Draw:
    """Return how the preferences of a rollout are drawn: ``groups`` different ones, each for an equal part of it."""
    every = np.asarray(vectors, dtype=np.float64)

    def draw(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        size = min(groups, len(every), count)
        chosen = rng.choice(len(every), size=size, replace=False)
        drawn: NDArray[np.float64] = every[chosen[np.arange(count) * size // count]]
        return drawn

    return draw


# -- training ----------------------------------------------------------------------------------------------------------


def train_ppo(
    job: Job,
    lm: LanguageModel,
    loss: PpoLoss,
    phase: str,
    style: Literal["percent", "fraction", "plain"],
    diagnostics: Sequence[str],
) -> None:
    """Train the active adapter of ``lm`` with value heads, which are kept as ``value_heads-<phase>.safetensors``.

    Args:
        phase: name in the record, metrics and checkpoints.
        style: how preferences are written into prompts.
        diagnostics: metrics whose means at the end go to ``job.notes["diagnostics"]``.
    """
    heads = ValueHeads(lm.model.config.hidden_size, len(loss.heads)).to(lm.device)
    OnlineEngine(job, lm, loss.config, phase, style, heads, loss.config.value_lr).run(loss)
    job.run.save_tensors(f"value_heads-{phase}", {key: value.detach() for key, value in heads.state_dict().items()})
    job.notes["diagnostics"] = at_the_end(job.run.metrics(), phase, loss.config.steps, diagnostics)

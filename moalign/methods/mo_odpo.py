"""MO-ODPO: multi-objective online DPO.

Source: "Robust Multi-Objective Preference Alignment with Online DPO", arXiv 2503.00295 (AAAI 2025).

For every prompt of a batch a preference ``w ~ Dirichlet(alpha * 1)`` is drawn and written in front of the prompt; two
responses are sampled from the policy, ordered by ``s = w . r`` (normalised rewards, bare prompt), and one gradient
step is made on ``-log sigma(beta * (D(y+) - D(y-)))``, ``D(y) = log pi(y|x~) - log pi_ref(y|x~)`` on the prompt that
carries the preference, for policy and reference alike (algorithm 1). Exact ties and identical responses are dropped
and counted. With ``samples: n`` the best is paired with the worst by ``w . r``.

Deviations, all choices of ours and fields of :class:`Config`: ``pairing: per_objective`` (off) labels the pair once per
objective and minimises ``sum_k w_k L_DPO,k``, which others report under this method's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moalign.methods.base import Capabilities, Job, RunContext
from moalign.preferences import Preference
from moalign.training.settings import OnlineConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moalign.policies.language_model import TokenOutputs
    from moalign.policies.policy import Policy
    from moalign.training.online import Part, Rollout, Selection


class Config(OnlineConfig):
    """Settings of MO-ODPO; the engine's settings are inherited."""

    alpha: float = Field(default=1.0, gt=0)
    """Dirichlet concentration; the sensitive knob: a badly chosen one makes the policy collapse."""
    beta: float = Field(default=0.1, gt=0)
    pairing: Literal["weighted", "per_objective"] = "weighted"
    samples: int = Field(default=2, ge=2)
    """Responses per prompt; more than 2: best against worst by w . r."""

    @model_validator(mode="after")
    def _pairs(self) -> Config:
        if self.pairing == "per_objective" and self.samples != 2:
            raise ValueError(f"pairing: per_objective needs samples: 2; found {self.samples}")
        return self


class MoOdpo:
    """One policy for every preference, trained on pairs of its own samples."""

    name: ClassVar[str] = "mo-odpo"
    summary: ClassVar[str] = "online DPO on pairs of the policy's own samples, ordered by w.r (arXiv 2503.00295)"
    capabilities: ClassVar[Capabilities] = Capabilities(needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "warmup": 0}

    def train(self, job: Job) -> None:
        """Train the adapter; resumes from the last checkpoint."""
        from moalign.policies import adapters
        from moalign.training.online import OnlineEngine

        lm = job.task.language_model
        adapters.attach(lm, job.policy_spec.lora, job.seed)
        OnlineEngine(job, lm, job.config).run(PairLoss(job))
        adapters.save(lm, job.run.path / "adapter")
        adapters.drop(lm)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference)


class PairLoss:
    """The loss that the online engine is given."""

    def __init__(self, job: Job) -> None:
        from moalign.training.online import preference_sampler

        self.config = job.config
        self.names = job.task.names
        self.preferences = preference_sampler(job.given_preferences, len(self.names), self.config.alpha)

    def select(self, rollout: Rollout) -> Selection:
        """Pair the responses of every prompt; see :func:`pairs`."""
        import numpy as np
        import torch

        from moalign.training.online import Selection

        rows, labels = pairs(rollout.z, rollout.preferences, rollout.per_prompt, rollout.responses, self.config.pairing)
        kept = np.flatnonzero((labels != 0).any(axis=1))
        dropped = len(labels) - len(kept)
        weights = np.ones((len(labels), 1)) if self.config.pairing == "weighted" else rollout.preferences
        return Selection(
            rows=rows[kept].reshape(-1),
            group=2,
            extras={
                "labels": torch.as_tensor(labels[kept], dtype=torch.float32),
                "weights": torch.as_tensor(weights[kept], dtype=torch.float32),
                "preferences": torch.as_tensor(rollout.preferences[kept], dtype=torch.float32),
            },
            metrics={"dropped": float(dropped), "dropped_share": dropped / max(1, len(labels))},
        )

    def loss(self, outputs: TokenOutputs, part: Part) -> tuple[Tensor, dict[str, float]]:
        """Return the mean DPO loss over pairs; rows 2i and 2i+1 are the pair i."""
        from moalign.training.dpo import log_ratios, pair_loss

        ratio = log_ratios(outputs.logps, part.ref_logps)
        labels, weights = part.extras["labels"].to(ratio.device), part.extras["weights"].to(ratio.device)
        loss = pair_loss(ratio[0::2], ratio[1::2], labels, weights, self.config.beta).mean()
        right = ((ratio[0::2] - ratio[1::2]).detach().unsqueeze(-1) * labels > 0).float()[labels != 0].mean()
        return loss, {"accuracy": float(right), **self._entropies(outputs, part)}

    def _entropies(self, outputs: TokenOutputs, part: Part) -> dict[str, float]:
        """Mean token entropy, and by the objective that a preference weighs most: collapse shows here first."""
        tokens = part.response_mask.sum(-1).clamp_min(1)
        per_row = outputs.entropy.sum(-1) / tokens
        leading = part.extras["preferences"].argmax(-1).repeat_interleave(2).to(per_row.device)
        told = {"entropy": float(per_row.mean())}
        for index, name in enumerate(self.names):
            if bool((leading == index).any()):
                told[f"entropy/{name}"] = float(per_row[leading == index].mean())
        return told


def pairs(
    z: NDArray[np.float64],
    preferences: NDArray[np.float64],
    per_prompt: int,
    responses: list[str],
    pairing: Literal["weighted", "per_objective"],
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Pair the responses of every prompt.

    Args:
        z: normalised rewards ``[prompts * per_prompt, objectives]``.
        preferences: ``[prompts, objectives]``.
        responses: ``[prompts * per_prompt]``; identical texts make no pair.

    Returns:
        Row numbers ``[prompts, 2]`` and labels ``[prompts, 1]`` (weighted; the first row is the better one) or
        ``[prompts, objectives]`` (+1 or -1 per objective); a label of 0 is a tie.
    """
    import numpy as np

    count = len(preferences)
    grouped = z.reshape(count, per_prompt, -1)
    scores = np.einsum("nsm,nm->ns", grouped, preferences)
    best, worst = scores.argmax(axis=1), scores.argmin(axis=1)
    if pairing == "per_objective":
        best, worst = np.zeros(count, dtype=np.intp), np.ones(count, dtype=np.intp)
    every = np.arange(count)
    rows = np.stack([best, worst], axis=1) + (every * per_prompt)[:, None]
    if pairing == "weighted":
        labels = np.sign(scores[every, best] - scores[every, worst])[:, None]
    else:
        labels = np.sign(grouped[every, best] - grouped[every, worst])
    same = np.array([responses[a] == responses[b] for a, b in rows.tolist()], dtype=bool)
    labels[same] = 0.0
    return rows, labels

"""Online DPO on pairs of the policy's own samples: the loss that MO-ODPO and hindsight give the online engine.

For every prompt of a rollout a preference is drawn and written beside the prompt; its responses are ordered by
``s = w . r`` (normalised rewards, bare prompt), and the best and the worst make a pair of the DPO loss
(:mod:`moalign.losses.dpo`). Importing this module imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from moalign.training.settings import OnlineConfig, WarmStart

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from moalign.lm.language_model import TokenOutputs
    from moalign.training.job import Job
    from moalign.training.online import Part, Rollout, Selection


class OnlineDpoConfig(OnlineConfig):
    """Settings of online DPO; the engine's settings are inherited."""

    alpha: float = Field(default=1.0, gt=0)
    """Dirichlet concentration; the sensitive knob: a badly chosen one makes the policy collapse."""
    resolution: int | None = Field(default=None, ge=1)
    """Preferences are drawn in steps of one over this; None: as the Dirichlet gives them, never quite round."""
    beta: float = Field(default=0.1, gt=0)
    pairing: Literal["weighted", "per_objective"] = "weighted"
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the preferred response's negative log-likelihood per token (RPO, arXiv 2404.19733, eq. 1): DPO alone
    may lower the likelihood of both responses, and what it frees goes to malformed ones. Needs pairing: weighted."""
    samples: int = Field(default=2, ge=2)
    """Responses per prompt; more than 2: best against worst by w . r."""

    @model_validator(mode="after")
    def _pairs(self) -> OnlineDpoConfig:
        if self.pairing == "per_objective" and self.samples != 2:
            raise ValueError(f"pairing: per_objective needs samples: 2; found {self.samples}")
        if self.pairing == "per_objective" and self.sft_coef:
            raise ValueError(
                f"sft_coef needs pairing: weighted, where one response is preferred; found {self.sft_coef}"
            )
        return self


class ConditionedConfig(OnlineDpoConfig, WarmStart):
    """Settings of one policy for every preference: the engine, online DPO, and how it is warmed up."""


def train_conditioned(job: Job, config: ConditionedConfig) -> None:
    """Train one policy that reads its preference from the prompt, and write it as the run's adapter; resumes."""
    from moalign.lm import adapters
    from moalign.training.distil import warm_start
    from moalign.training.online import OnlineEngine

    lm = job.task.language_model
    adapters.attach(lm, job.policy_spec.lora, job.seed)
    warm_start(job, lm, config)
    OnlineEngine(job, lm, config).run(PairLoss(job, config))
    adapters.save(lm, job.run.path / "adapter")
    adapters.drop(lm)


class PairLoss:
    """The loss that the online engine is given."""

    def __init__(self, job: Job, config: OnlineDpoConfig) -> None:
        from moalign.training.online import preference_sampler

        self.config = config
        self.names = job.task.names
        self.preferences = preference_sampler(job.given_preferences, len(self.names), config.alpha, config.resolution)

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
        from moalign.losses.dpo import log_ratios, pair_loss

        ratio = log_ratios(outputs.logps, part.ref_logps)
        labels, weights = part.extras["labels"].to(ratio.device), part.extras["weights"].to(ratio.device)
        loss = pair_loss(ratio[0::2], ratio[1::2], labels, weights, self.config.beta).mean()
        told = {}
        if self.config.sft_coef:  # the first response of a pair is the preferred one
            lengths = part.response_mask[0::2].sum(-1).clamp_min(1)
            nll = -(outputs.logps[0::2].sum(-1) / lengths).mean()
            loss, told = loss + self.config.sft_coef * nll, {"nll": float(nll.detach())}
        right = ((ratio[0::2] - ratio[1::2]).detach().unsqueeze(-1) * labels > 0).float()[labels != 0].mean()
        return loss, {"accuracy": float(right), **told, **self._entropies(outputs, part)}

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

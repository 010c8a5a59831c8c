"""MO-ODPO: multi-objective online DPO.

Source: "Robust Multi-Objective Preference Alignment with Online DPO", arXiv 2503.00295 (AAAI 2025), algorithm 1.

For every prompt of a batch a preference ``w ~ Dirichlet(alpha * 1)`` is drawn and written in front of the prompt; two
responses are sampled from the policy, ordered by ``s = w . r`` (normalised rewards, bare prompt), and one gradient
step is made on ``-log sigma(beta * (D(y+) - D(y-)))``, ``D(y) = log pi(y|x~) - log pi_ref(y|x~)`` on the prompt that
carries the preference, for policy and reference alike. Exact ties and identical responses are dropped and counted.
With ``samples: n`` the best is paired with the worst by ``w . r``.

Deviations, all choices of ours and fields of :class:`Config`: ``pairing: per_objective`` (off) labels the pair once per
objective and minimises ``sum_k w_k L_DPO,k``, which others report under this method's name; ``sft_coef`` (0) adds the
preferred response's likelihood; ``warm_start: hindsight`` (off) first teaches the base what a stated preference means
(:mod:`moalign.training.distil`); ``resolution`` (off) rounds the drawn preferences. MOC and P-MORL draw theirs
otherwise, some vectors of the grid for a rollout, since MOC's control error is that of a group of responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from moalign.core.arrays import Matrix
from moalign.core.preferences import Preference
from moalign.core.records import Labels
from moalign.methods.base import Capabilities
from moalign.pareto.scalarisation import Scalarisation, scores
from moalign.training.job import Job, RunContext
from moalign.training.settings import OnlineConfig, WarmStart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moalign.lm.language_model import LanguageModel
    from moalign.policies.policy import Policy
    from moalign.training.means import Some
    from moalign.training.online import Part
    from moalign.training.rollout import Rollout

Pairing = Literal["weighted", "per_objective"]


class Config(OnlineConfig, WarmStart):
    """Settings of MO-ODPO; those of the online trainer are inherited."""

    alpha: float = Field(default=1.0, gt=0)
    """Dirichlet concentration; the sensitive knob: a badly chosen one makes the policy collapse."""
    resolution: int | None = Field(default=None, ge=1)
    """Preferences are drawn in steps of one over this; None: as the Dirichlet gives them, never quite round."""
    beta: float = Field(default=0.1, gt=0)
    pairing: Pairing = "weighted"
    sft_coef: float = Field(default=0.0, ge=0)
    """Weight of the preferred response's negative log-likelihood per token (RPO, arXiv 2404.19733, eq. 1): DPO alone
    may lower the likelihood of both responses, and what it frees goes to malformed ones. Needs pairing: weighted."""
    samples: int = Field(default=2, ge=2)
    """Responses per prompt; more than 2: best against worst by w . r."""
    scalarisation: Scalarisation = "linear"
    """What responses are ordered by: :mod:`moalign.pareto.scalarisation`. Needs pairing: weighted."""
    labels: Labels = "order"
    """order: the better response is preferred, by what ``extremes`` pairs by. bradley-terry: it is preferred with
    probability ``sigma(s_better - s_worse)`` of the scores, and the loss is the expectation: then, and only then, it
    has a minimum, at ``pi_ref exp(s / beta) / Z`` (:func:`moalign.losses.dpo.pair_loss`). Needs pairing: weighted."""

    extremes: Literal["score", "advantage"] = "score"
    """Which two responses of a prompt are paired: those of the largest and smallest score s, or of the largest and
    smallest ``s - beta * D`` (needs pairing: weighted). That is alike for all responses where the policy is ``pi_ref
    exp(s / beta) / Z``, so the pair is the one that is furthest from it, and what was preferred too much is preferred
    less again."""

    @model_validator(mode="after")
    def _pairing_fits(self) -> Config:
        if self.pairing == "per_objective" and self.samples != 2:
            raise ValueError(f"pairing: per_objective needs samples: 2; found {self.samples}")
        if self.pairing == "per_objective" and self.sft_coef:
            raise ValueError(
                f"sft_coef needs pairing: weighted, where one response is preferred; found {self.sft_coef}"
            )
        chosen = self.scalarisation, self.labels, self.extremes
        if self.pairing == "per_objective" and chosen != ("linear", "order", "score"):
            raise ValueError(
                "pairing: per_objective orders responses by each reward alone, so it needs scalarisation: linear, "
                f"labels: order and extremes: score; found {', '.join(chosen)}"
            )
        return self


class MoOdpo:
    """One policy for every preference, trained on pairs of its own samples."""

    name: ClassVar[str] = "mo-odpo"
    summary: ClassVar[str] = "online DPO on pairs of the policy's own samples, ordered by w.r (arXiv 2503.00295)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="online", needs_online_rewards=True)
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "warmup": 0}

    def train(self, job: Job) -> None:
        """Train the adapter; resumes from the last checkpoint."""
        from moalign.training.distil import warm_start
        from moalign.training.grid import one_adapter

        with one_adapter(job) as lm:
            warm_start(job, lm, job.config, scalarisation=job.config.scalarisation, cap=job.config.reward_cap)
            learn_from_pairs(job, lm, job.config)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained policy asked with the preference in its prompt."""
        from moalign.policies.prompted import conditioned

        return conditioned(context, preference)


def learn_from_pairs(job: Job, lm: LanguageModel, config: Config) -> None:
    """Train the active adapter of ``lm`` on pairs of its own samples (algorithm 1)."""
    from moalign.training.kl_budget import KlStrength
    from moalign.training.online import OnlineTrainer
    from moalign.training.preference_draws import independent

    draw = independent(job.given_preferences, len(job.task.names), config.alpha, config.resolution)
    trainer = OnlineTrainer(job, lm, config, draw)
    strength = KlStrength(config, "beta", config.beta, trainer.state, job.notes)
    for rollout in trainer.rollouts():
        pairs = paired(rollout, config, strength.now)
        trainer.counts["pairs_dropped"] = trainer.counts.get("pairs_dropped", 0) + pairs.dropped
        if not len(pairs.rows):
            trainer.skip(pairs.metrics)
            continue
        for _ in range(config.epochs):
            for part in trainer.parts(pairs.rows, group=2, tensors=pairs.tensors):
                trainer.backward(*loss(part, config, job.task.names, strength.now))
            trainer.step({**pairs.metrics, **strength.metrics})
        strength.adapt(rollout)


@dataclass
class Pairs:
    """The pairs of a rollout that teach something; rows 2i and 2i + 1 belong to pair i."""

    rows: NDArray[np.intp]
    """``[2 * pairs]``."""
    tensors: dict[str, Tensor]
    """``labels``, ``chance`` and ``weights`` ``[pairs, labels]``, ``preferences`` ``[pairs, objectives]``."""
    dropped: int
    """Ties, where a preference weighs anything, and identical responses."""
    metrics: dict[str, float]


def paired(rollout: Rollout, config: Config, beta: float) -> Pairs:
    """Pair the responses of every prompt and leave out what teaches nothing; see :func:`best_against_worst`."""
    import torch

    s = scores(rollout.z, np.repeat(rollout.preferences, rollout.per_prompt, axis=0), config.scalarisation)
    by = s
    if config.extremes == "advantage":
        by = s - beta * (rollout.samples.logps - rollout.ref_logps()).sum(-1).double().cpu().numpy()
    rows, labels = best_against_worst(rollout.z, by, rollout.per_prompt, rollout.responses, config.pairing)
    weights = np.ones((len(labels), 1)) if config.pairing == "weighted" else rollout.preferences
    useful = np.flatnonzero((weights * labels != 0).any(axis=1))
    dropped = len(labels) - len(useful)
    better = s[rows[:, 0]] - s[rows[:, 1]] if config.labels == "bradley-terry" else np.full(len(rows), np.inf)
    chance = np.broadcast_to(1 / (1 + np.exp(-better))[:, None], labels.shape)
    columns = {"labels": labels, "chance": chance, "weights": weights, "preferences": rollout.preferences}
    return Pairs(
        rows=rows[useful].reshape(-1),
        tensors={name: torch.as_tensor(column[useful], dtype=torch.float32) for name, column in columns.items()},
        dropped=dropped,
        metrics={"dropped": float(dropped), "dropped_share": dropped / max(1, len(labels))},
    )


def best_against_worst(
    z: Matrix, s: Matrix, per_prompt: int, responses: Sequence[str], pairing: Pairing
) -> tuple[NDArray[np.intp], Matrix]:
    """Pair the responses of every prompt by their scores s ``[prompts * per_prompt]``.

    Per objective the first two of a prompt are a pair, labelled by their rewards z, ``[those rows, objectives]``.

    Returns row numbers ``[prompts, 2]`` and labels ``[prompts, 1]`` (weighted; the first row is the better one) or
    ``[prompts, objectives]`` (+1 or -1 per objective); a label of 0 is a tie, and identical texts are one.
    """
    grouped, of_prompt = z.reshape(-1, per_prompt, z.shape[-1]), s.reshape(-1, per_prompt)
    count = len(of_prompt)
    best, worst = of_prompt.argmax(axis=1), of_prompt.argmin(axis=1)
    if pairing == "per_objective":
        best, worst = np.zeros(count, dtype=np.intp), np.ones(count, dtype=np.intp)
    every = np.arange(count)
    rows = np.stack([best, worst], axis=1) + (every * per_prompt)[:, None]
    if pairing == "weighted":
        labels = np.sign(of_prompt[every, best] - of_prompt[every, worst])[:, None]
    else:
        labels = np.sign(grouped[every, best] - grouped[every, worst])
    same = np.array([responses[a] == responses[b] for a, b in rows.tolist()], dtype=bool)
    labels[same] = 0.0
    return rows, labels


def loss(part: Part, config: Config, names: Sequence[str], beta: float) -> tuple[Tensor, dict[str, float | Some]]:
    """Return the mean DPO loss over a part's pairs (a scalar) and metrics; ``names`` are the objectives'."""
    import torch

    from moalign.losses.dpo import log_ratios, pair_loss
    from moalign.training.means import Some

    ratio = log_ratios(part.logps, part.ref_logps)
    labels, weights = part.tensors["labels"].to(ratio.device), part.tensors["weights"].to(ratio.device)
    chance = None if config.labels == "order" else part.tensors["chance"].to(ratio.device)
    value = pair_loss(ratio[0::2], ratio[1::2], labels, weights, beta, chance).mean()
    # By advantage the first response of a pair may be the one that the score finds worse.
    preferred = labels if chance is None else labels * (chance - 0.5).sign()
    metrics: dict[str, float | Some] = {}
    if config.sft_coef:
        per_token = part.logps.sum(-1) / part.response_mask.sum(-1).clamp_min(1)
        nll = -torch.where(preferred[:, 0] < 0, per_token[1::2], per_token[0::2]).mean()
        value, metrics = value + config.sft_coef * nll, {"nll": float(nll.detach())}
    right = ((ratio[0::2] - ratio[1::2]).detach().unsqueeze(-1) * preferred > 0).float()[preferred != 0]
    return value, {"accuracy": Some(float(right.sum()), len(right)), **metrics, **entropies(part, names)}


def entropies(part: Part, names: Sequence[str]) -> dict[str, float | Some]:
    """Return mean token entropy, and by the objective that a preference weighs most: collapse shows here first."""
    from moalign.training.means import Some

    per_row = part.entropy.sum(-1) / part.response_mask.sum(-1).clamp_min(1)
    leading = part.tensors["preferences"].argmax(-1).repeat_interleave(2).to(per_row.device)
    of_objective = {
        f"entropy/{name}": Some(float(per_row[leading == index].sum()), int((leading == index).sum()))
        for index, name in enumerate(names)
    }
    return {"entropy": float(per_row.mean()), **of_objective}

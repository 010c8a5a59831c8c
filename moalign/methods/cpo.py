"""CPO: controllable preference optimisation.

Source: arXiv 2402.19085 (EMNLP 2024). The public code OpenBMB/CPO prepares its data differently; we follow the formula.

Rewards become levels 1..5, ``P_i(y)``, by the quintiles of the calibration split. Then, on one adapter,

* CPSFT: supervised training on every scored response with its levels as tags beside the prompt,
  ``<helpfulness:5> <honesty:4>``;
* CDPO: the condition c of a pair is the levels of one randomly drawn response to the same prompt, its value
  ``R(y|c) = sum_{i in C} -lambda_i |P_i(y) - c_i| + sum_{i not in C} lambda_i P_i(y)`` with C the controlled
  objectives: an exact match scores 0. Of two responses the one of higher value is chosen, ties are skipped, the tags of
  c (of the controlled objectives) stand beside the prompt; then DPO against the CPSFT policy.

A preference becomes levels by RiC's ``l2`` map, ``1 + 4 w_i / ||w||_2``, rounded: all objectives are controlled.

Choices of ours: tags stand where the task's template puts a preference; with ``uncontrolled`` above 0 an objective is
left out of C with that chance (one always stays), in both stages; the number of pairs per prompt; ``labels:
bradley-terry``, off by default, for models that certain labels drive away from their language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moalign.core.amounts import Amount, Amounts
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.core.records import Labels
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import CostHints, DpoStage, RefusesTasks, SftConfig

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.policies.policy import Policy
    from moalign.tasks.responses import Scored
    from moalign.training.offline_dpo import PairRows

LEVELS = 5
Ints = NDArray[np.int64]


class Config(CostHints, RefusesTasks):
    """Settings of CPO."""

    cpsft: SftConfig = SftConfig(steps=2000, batch=32, lr=1.4e-4, schedule="cosine")
    cdpo: DpoStage = DpoStage(steps=500, batch=32, lr=5e-5)
    per_prompt: int = Field(default=8, ge=1)
    """Most pairs of a prompt."""
    importance: dict[str, float] = Field(default_factory=dict)
    """lambda of objectives by name; those not named count 1."""
    uncontrolled: float = Field(default=0.0, ge=0, lt=1)
    """Chance that an objective is left out of a condition."""
    labels: Labels = "order"
    """Of CDPO's pairs. order: the response of higher value is chosen. bradley-terry: it is chosen with probability
    ``sigma(R(y_w|c) - R(y_l|c))``; the loss is the expectation over that choice, and its optimum is finite."""

    def require_suited(self, names: Sequence[str], preferences: Sequence[Preference]) -> None:
        """See :class:`RefusesTasks`."""
        importances(self, names)

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`."""
        return task.scored() + task.calibration.first()


class Cpo:
    """One policy, steered by the levels asked for in its prompt."""

    name: ClassVar[str] = "cpo"
    summary: ClassVar[str] = "SFT with levels in the prompt, then DPO towards the levels asked for (arXiv 2402.19085)"
    capabilities: ClassVar[Capabilities] = Capabilities(family="offline")
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {
        "cpsft": {"steps": 2, "batch": 4, "max_tokens": 128},
        "cdpo": {"steps": 2, "batch": 4, "max_tokens": 128},
        "per_prompt": 1,
    }

    def train(self, job: Job) -> None:
        """Train both stages; resumes at the stage and step that an interruption left."""
        from moalign.training.grid import one_adapter
        from moalign.training.offline_dpo import train_dpo
        from moalign.training.sft import train_sft

        config: Config = job.config
        weights = importances(config, job.task.names)
        scored = job.scored()
        levels = levels_of(scored.raw, self._edges(job))
        with one_adapter(job) as lm:
            if not job.stage_done("cpsft", lm):
                rng = np.random.default_rng([job.seed, 1])
                shown = controlled(rng, len(levels), levels.shape[1], config.uncontrolled)
                texts = [
                    job.task.renderer.beside(prompt, tags(row, job.task.names, which))
                    for prompt, row, which in zip(scored.prompts, levels, shown, strict=True)
                ]
                train_sft(job, lm, texts, scored.responses, config.cpsft, "cpsft")
                job.finish_stage("cpsft", lm)
            if config.cdpo.steps:
                rows = cdpo_rows(job, lm, scored, levels, weights)
                job.notes["diagnostics"] = train_dpo(job, lm, rows, config.cdpo, "cdpo")

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the trained model asked for the levels that the preference maps to."""
        from moalign.policies.policy import Policy
        from moalign.policies.prompted import trained

        condition = tags(desired_levels(preference), context.task.names)
        return Policy(trained(context), lambda prompt: context.task.renderer.beside(prompt, condition))

    def _edges(self, job: Job) -> Matrix:
        """Return the quintiles of the calibration split's raw scores, ``[4, objectives]``; kept with the run."""
        if not job.stage_done("levels"):
            quantiles = np.arange(1, LEVELS) / LEVELS
            job.notes["level_edges"] = np.quantile(job.calibration().raw, quantiles, axis=0).tolist()
            job.finish_stage("levels")
        return np.array(job.notes["level_edges"], dtype=np.float64)


def cdpo_rows(job: Job, lm: LanguageModel, scored: Scored, levels: Ints, weights: Matrix) -> PairRows:
    """Return CDPO's pairs as tokens, with the policy as it is (after CPSFT) as reference."""
    from moalign.training.offline_dpo import encode_pairs

    config, names = job.config, job.task.names
    pairs, left_out = conditioned_pairs(scored, levels, weights, config, job.seed)
    if not pairs:
        raise RequestError(
            f"cdpo: no pair of responses differs in value ({left_out['ties']} ties, {left_out['identical']} "
            "identical texts); it needs prompts with at least two different scored responses"
        )
    job.notes["cdpo_pairs"] = {"pairs": len(pairs), **left_out}
    chosen, rejected, conditions, shown, gaps = zip(*pairs, strict=True)
    texts = [
        job.task.renderer.beside(scored.prompts[a], tags(c, names, which))
        for a, c, which in zip(chosen, conditions, shown, strict=True)
    ]
    return encode_pairs(
        job,
        lm,
        texts,
        [scored.responses[a] for a in chosen],
        [scored.responses[b] for b in rejected],
        config.cdpo.max_tokens,
        chance=None if config.labels == "order" else 1 / (1 + np.exp(-np.array(gaps))),
        own_reference=True,
    )


def levels_of(raw: Matrix, edges: Matrix) -> Ints:
    """Return levels 1..5, ``[samples, objectives]``: one more for each edge ``[4, objectives]`` that a score passes."""
    return np.asarray(1 + (raw[:, None, :] > edges[None]).sum(axis=1), dtype=np.int64)


def tags(levels: Ints, names: Sequence[str], shown: NDArray[np.bool_] | None = None) -> str:
    """Return the condition as text, ``<helpfulness:5> <honesty:4>``; ``shown`` picks the controlled objectives."""
    which = [True] * len(names) if shown is None else shown.tolist()
    return " ".join(f"<{name}:{int(level)}>" for name, level, on in zip(names, levels, which, strict=True) if on)


def value(levels: Ints, condition: Ints, shown: NDArray[np.bool_], weights: Matrix) -> float:
    """Return R(y|c) of a response with ``levels`` ``[objectives]``; an exact match on all that is controlled adds 0."""
    terms = np.where(shown, -np.abs(levels - condition), levels)
    return float(weights @ terms)


def desired_levels(preference: Sequence[float]) -> Ints:
    """Map a preference to levels ``[objectives]``: ``1 + 4 w_i / ||w||_2``, rounded."""
    w = np.asarray(preference, dtype=np.float64)
    return np.asarray(np.rint(1 + (LEVELS - 1) * w / np.linalg.norm(w)), dtype=np.int64)


def importances(config: Config, names: Sequence[str]) -> Matrix:
    """Return lambda ``[objectives]``; raises RequestError for a name that is no objective, or a negative number."""
    from moalign.core.errors import unknown

    for name, number in config.importance.items():
        if name not in names:
            raise unknown("objective", name, list(names), "importance")
        if not number > 0:
            raise RequestError(f"importance.{name}: found {number:g}; allowed: a number above 0")
    return np.array([config.importance.get(name, 1.0) for name in names])


def controlled(rng: np.random.Generator, count: int, objectives: int, left_out: float) -> NDArray[np.bool_]:
    """Draw which objectives each condition controls, ``[count, objectives]``; at least one."""
    shown = rng.random((count, objectives)) >= left_out
    shown[np.arange(count), rng.integers(objectives, size=count)] |= ~shown.any(axis=1)
    return np.asarray(shown)


Conditioned = tuple[int, int, Ints, NDArray[np.bool_], float]
"""Chosen row, rejected row, condition ``[objectives]``, which of it are controlled ``[objectives]``, and by how much
the chosen one's value is higher."""


def conditioned_pairs(
    scored: Scored, levels: Ints, weights: Matrix, config: Config, seed: int
) -> tuple[list[Conditioned], dict[str, int]]:
    """Return CDPO's pairs and what was left out (ties, identical texts)."""
    from moalign.tasks.pairs import matches
    from moalign.tasks.responses import by_prompt

    rng = np.random.default_rng([seed, 2])
    pairs: list[Conditioned] = []
    left_out = {"ties": 0, "identical": 0}
    for group in by_prompt(scored.prompts).values():
        drawn = matches(group, config.per_prompt, rng)
        conditions = levels[rng.choice(group, size=len(drawn))]
        for (a, b), c, shown in zip(
            drawn, conditions, controlled(rng, len(drawn), levels.shape[1], config.uncontrolled), strict=True
        ):
            first, second = (value(levels[row], c, shown, weights) for row in (a, b))
            if scored.responses[a].shown == scored.responses[b].shown:
                left_out["identical"] += 1
            elif first == second:
                left_out["ties"] += 1
            else:
                better, worse = (a, b) if first > second else (b, a)
                pairs.append((better, worse, c, shown, abs(first - second)))
    return pairs, left_out

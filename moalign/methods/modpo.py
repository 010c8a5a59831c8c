"""MODPO: multi-objective direct preference optimisation.

Source: arXiv 2310.03708 (ACL Findings 2024); facts of the public code ZHZisZZ/modpo are marked "code".

Pairs ``(y_w, y_l)`` are labelled for one objective k; ``mu(y)`` holds the other objectives' rewards. One adapter is
trained for each preference w on

    z = (1 / w_k) * (beta * (D(y_w) - D(y_l)) - w_-k . (mu(y_w) - mu(y_l))),   D(y) = log pi(y|x) - log pi_ref(y|x)
    L = -log sigma(z)          (``loss: hinge``: max(0, 1 - z))

``w_k = 1`` is plain DPO; the optimum is ``pi_ref exp(w . r / beta) / Z`` when the labels follow r_k (Bradley-Terry).

* pairs: the data's own labels, or built from scored responses (``pairs: scored``, ordered by r_k);
* ``margin: reward`` takes mu from the task's normalised scores; ``margin: implicit`` (code's main example) from DPO
  experts on the other objectives' pairs: ``mu_j = beta * (log pi_j - log pi_ref)``;
* the gradient grows with 1 / w_k, so that ``w_k < 0.05`` is refused. ``role: auto`` labels each preference's pairs for
  the objective that it weighs most. At ``w_k = 0`` the answer is the margin's own model: with ``margin: implicit`` it
  is taken, without training.

Choices of ours, off by default: ``labels: bradley-terry`` makes the labels of built pairs follow r_k as the closed form
assumes, where an order without doubt has no finite optimum; ``sft_coef`` keeps the chosen responses likely, as the loss
sees only differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from moalign.core.amounts import Amount, Amounts
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, unknown
from moalign.core.preferences import Preference, label
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig, RefusesTasks

if TYPE_CHECKING:
    from pathlib import Path

    from moalign.lm.language_model import LanguageModel
    from moalign.policies.policy import Policy
    from moalign.training.offline_dpo import Margin, PairRows

LEAST_SHARE = 0.05
"""A smaller w_k is refused: the gradient grows with 1 / w_k."""


class Config(DpoConfig, RefusesTasks):
    """Settings of MODPO; those of offline DPO are inherited."""

    margin: Literal["reward", "implicit"] = "reward"
    role: str = "auto"
    """The objective whose pairs are trained on; auto: for each preference the one that it weighs most."""

    def require_suited(self, names: Sequence[str], preferences: Sequence[Preference]) -> None:
        """See :class:`RefusesTasks`."""
        for w in preferences:
            role_of(w, self, names)

    def learns_from(self, task: Amounts) -> Amount:
        """See :class:`CostHints`. Both responses of the data's own pairs are scored for the margin."""
        if self.margin == "implicit":
            return Amount()  # what it learns from its experts learned from, too
        own = sum(task.labelled) if self.pairs != "scored" else 0
        return super().learns_from(task) + Amount(2 * own)

    def expert_runs(self) -> tuple[str, dict[str, Any]] | None:
        """See :class:`CostHints`. They are trained as plain DPO, which needs no margin."""
        if self.margin == "reward":
            return None
        return "modpo", {name: getattr(self, name) for name in DpoConfig.model_fields}


class Modpo:
    """One adapter per preference, trained on one objective's pairs with the others as margin."""

    name: ClassVar[str] = "modpo"
    summary: ClassVar[str] = "DPO per preference with the other objectives as margin (arXiv 2310.03708)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_pairs=True
    )
    Config: ClassVar[type[Config]] = Config
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}

    def train(self, job: Job) -> None:
        """Train an adapter for every preference; resumes at the preference and step of an interruption."""
        from safetensors.torch import load_file

        from moalign.lm import adapters
        from moalign.training.grid import each_preference
        from moalign.training.offline_dpo import objective_pairs, train_dpo

        config: Config = job.config
        lm = job.task.language_model
        roles = {w: role_of(w, config, job.task.names) for w in job.preferences}
        experts = config.expert_runs()
        folders: list[Path] = []
        if experts is not None and any(w[k] != 1 for w, k in roles.items()):  # at a corner no margin counts
            _, folders = job.find_experts(*experts)
        used = sorted({k for w, k in roles.items() if w[k] > 0})
        pairs = objective_pairs(job, lm, config, used, scores=config.margin == "reward", counted=bool(folders))
        gaps = {}
        for k, own in pairs.items():
            sharing = [w for w in job.preferences if roles[w] == k]
            gaps[k] = implicit_gaps(job, lm, own, folders, sharing, k) if own.gaps is None else own.gaps
        job.notes["roles"] = {label(w): job.task.names[k] for w, k in roles.items()}

        for _, w, stage in each_preference(job):
            k = roles[w]
            if w[k] == 0:
                adapters.set_tensors(lm, load_file(folders[w.index(1.0)] / "adapter_model.safetensors"))
                continue
            margin = margin_of(w, k, gaps[k])
            job.notes["diagnostics"] = train_dpo(job, lm, pairs[k], config, stage, margin)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def implicit_gaps(
    job: Job, lm: LanguageModel, rows: PairRows, experts: list[Path], preferences: list[Preference], k: int
) -> Matrix:
    """Return ``mu_j(y_w) - mu_j(y_l)`` of the experts on pairs of objective k, ``[pairs, objectives]``.

    0 where none of ``preferences`` needs it.
    """
    from moalign.lm import adapters
    from moalign.training.reference import reference_log_probs

    gaps = np.zeros((len(rows), len(job.task.names)))
    for j, folder in enumerate(experts):
        if j != k and any(w[j] > 0 for w in preferences):
            adapters.load(lm, folder)
            logps = reference_log_probs(job, lm, [*rows.chosen, *rows.rejected], own=True)
            ratio = logps.reshape(2, -1).T.astype(np.float64) - rows.reference
            gaps[:, j] = job.config.beta * (ratio[:, 0] - ratio[:, 1])
            adapters.drop(lm)
    return gaps


def role_of(w: Preference, config: Config, names: Sequence[str]) -> int:
    """Return the objective k whose pairs a preference is trained on.

    Raises RequestError for an unknown name, and for a weight w_k below :data:`LEAST_SHARE` (but for w_k = 0 where the
    answer is one expert of an implicit margin).
    """
    if config.role == "auto":
        return int(np.argmax(w))
    if config.role not in names:
        raise unknown("objective", config.role, ["auto", *names], "role")
    k = list(names).index(config.role)
    if w[k] == 0 and config.margin == "implicit" and max(w) == 1:
        return k
    if w[k] < LEAST_SHARE:
        most = names[int(np.argmax(w))]
        why = (
            "with w_k = 0 the answer is the margin's own model, which margin: reward does not have"
            if w[k] == 0
            else "its gradient grows with 1 / w_k"
        )
        raise RequestError(
            f"preference {label(w)}: its weight on role {config.role} is {w[k]:g}; allowed: at least {LEAST_SHARE} "
            f"({why}); swap the roles: train it on the pairs of {most} (role: auto swaps for each preference)"
        )
    return k


def margin_of(w: Preference, k: int, gaps: Matrix) -> Margin:
    """Return the other objectives' margins on the pairs of objective k; ``gaps`` are ``[pairs, objectives]``."""
    from moalign.training.offline_dpo import Margin

    others = [j for j in range(len(w)) if j != k]
    return Margin(gaps[:, others], [w[j] for j in others], w[k])

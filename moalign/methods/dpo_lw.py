"""DPO-LW: DPO with a linearly weighted loss, one policy for each preference.

Source: baseline "DPO LW" of MODPO (arXiv 2310.03708), ``sum_i w_i L_DPO(pairs of objective i)``.

Every batch holds as many pairs of each objective with a positive weight; the mean loss of each objective's pairs
counts w_i. A one-hot preference is plain DPO on that objective's pairs. Pairs come from the data or from scored
responses, as for MODPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.training.job import Job, RunContext
from moalign.training.settings import DpoConfig, RefusesTasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from moalign.policies.policy import Policy
    from moalign.training.offline_dpo import PairRows


class AllPairs(DpoConfig, RefusesTasks):
    """Settings of DPO on the pairs of every objective; all of them are those of DPO on pairs."""

    def require_suited(self, names: Sequence[str], preferences: Sequence[Preference]) -> None:
        """See :class:`RefusesTasks`."""
        most = max(sum(weight > 0 for weight in w) for w in preferences)
        if self.batch < most:
            raise RequestError(
                f"batch {self.batch}: every batch holds pairs of each of {most} objectives; allowed: at least {most}"
            )


class DpoLw:
    """One adapter per preference, trained on all objectives' pairs with weighted losses."""

    name: ClassVar[str] = "dpo-lw"
    summary: ClassVar[str] = "DPO per preference on all objectives' pairs, losses weighted by w (arXiv 2310.03708)"
    capabilities: ClassVar[Capabilities] = Capabilities(
        family="offline", one_policy=False, steerable=False, needs_pairs=True
    )
    Config: ClassVar[type[AllPairs]] = AllPairs
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "batch": 4, "max_tokens": 128, "per_prompt": 1}

    def train(self, job: Job) -> None:
        """Train an adapter for every preference; resumes at the preference and step of an interruption."""
        train_on_all_pairs(job)

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """Return the policy trained for a preference; raises RequestError for one that was not trained."""
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


def train_on_all_pairs(
    job: Job,
    trainer_of: Callable[[Sequence[float], Sequence[str]], Callable[..., Any] | None] = lambda w, names: None,
    prepare: Callable[[dict[int, PairRows]], dict[int, PairRows]] = lambda pairs: pairs,
    batches: Callable[..., Any] | None = None,
    counted: bool = False,
) -> None:
    """Train an adapter for every preference of the job on pairs of each objective with a positive weight.

    ``trainer_of`` the positive weights and the objectives' names returns the ``trainer`` of
    :func:`moalign.training.offline_dpo.train_dpo`, which ``batches`` is for, too; ``prepare`` is given the pairs by
    objective before any training, when no adapter is on the base, and returns those to train on; ``counted`` is that of
    :func:`~moalign.training.offline_dpo.objective_pairs`.
    """
    from moalign.core.seeds import derive
    from moalign.training.grid import each_preference
    from moalign.training.offline_dpo import even_order, joined, objective_pairs, train_dpo

    config: DpoConfig = job.config
    lm, names = job.task.language_model, job.task.names
    used = sorted({k for w in job.preferences for k in range(len(w)) if w[k] > 0})
    pairs = prepare(objective_pairs(job, lm, config, used, counted=counted))

    for _, w, stage in each_preference(job):
        parts = [k for k in range(len(w)) if w[k] > 0]
        rows = [pairs[k] for k in parts]
        seed = derive(job.seed, stage, "order")
        places, counts = even_order([len(part) for part in rows], config.steps, config.batch, seed)
        # The mean over the batch of these times the losses is sum_i w_i (mean loss of objective i's pairs).
        each = np.repeat([w[k] * config.batch / count for k, count in zip(parts, counts, strict=True)], counts)
        trainer = trainer_of([w[k] for k in parts], [names[k] for k in parts])
        weights = np.tile(each, config.steps)
        job.notes["diagnostics"] = train_dpo(
            job, lm, joined(rows), config, stage, places=places, weights=weights, trainer=trainer, batches=batches
        )

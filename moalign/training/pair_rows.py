"""From a task's preference pairs to what the offline DPO engine trains on, for the objectives that a method needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moalign.training.offline_dpo import PairRows, encode_pairs
from moalign.training.settings import DpoConfig

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.tasks.pairs import Pairs
    from moalign.training.job import Job

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class ObjectivePairs:
    """The pairs labelled for one objective."""

    rows: PairRows
    gaps: Matrix | None
    """Normalised scores of the chosen responses less those of the rejected, ``[pairs, objectives]``, if asked for."""


def objective_pairs(
    job: Job, lm: LanguageModel, config: DpoConfig, objectives: Sequence[int], scores: bool = False
) -> dict[int, ObjectivePairs]:
    """Return the pairs of some objectives; call it before any stage, so that their cost counts once.

    What was built and left out is told in ``job.notes["pairs"]``.

    Args:
        objectives: their indices.
        scores: also score both responses of every pair on every objective.

    Raises:
        RequestError: no pairs, or pairs that cannot be used (:meth:`moalign.tasks.task.Task.pairs`).
    """
    build = config.pairs == "scored" or not all(job.task.has_pairs(k) for k in objectives)
    scored = job.scored() if build and config.pairs != "data" else None
    found, told = {}, {}
    for k in objectives:
        pairs = job.task.pairs(k, config.pairs, config.per_prompt, config.labels, scored)
        texts = [job.task.renderer.plain(prompt) for prompt in pairs.prompts]
        rows = encode_pairs(job, lm, texts, pairs.chosen, pairs.rejected, config.max_tokens, pairs.chance)
        found[k] = ObjectivePairs(rows, _gaps(job, pairs)[rows.kept] if scores else None)
        told[job.task.names[k]] = {"pairs": len(rows), **pairs.dropped, "alike": len(pairs) - len(rows)}
    job.notes["pairs"] = told
    return found


def _gaps(job: Job, pairs: Pairs) -> Matrix:
    raw = pairs.raw
    if raw is None:
        raw = (
            job.panel.score(pairs.prompts, [response.shown for response in pairs.chosen]),
            job.panel.score(pairs.prompts, [response.shown for response in pairs.rejected]),
        )
    return np.asarray(job.panel.z(raw[0]) - job.panel.z(raw[1]))


def joined(parts: Sequence[PairRows]) -> PairRows:
    """Return the pairs of several objectives one after the other."""
    return PairRows(
        chosen=[row for part in parts for row in part.chosen],
        rejected=[row for part in parts for row in part.rejected],
        reference=np.concatenate([part.reference for part in parts]),
        chance=np.concatenate([part.chance for part in parts]),
        kept=np.concatenate([part.kept for part in parts]),
    )

"""Log-probabilities of pairs under an adapter that is on the model now: further references, and earlier rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moalign.training.reference import distinct_log_probs

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job
    from moalign.training.offline_dpo import PairRows


def own_log_probs(job: Job, lm: LanguageModel, rows: PairRows) -> NDArray[np.float32]:
    """Return the active adapter's log-probabilities of chosen and rejected responses, ``[pairs, 2]``.

    They are looked up in the run's store, as they may have been before.
    """
    return distinct_log_probs(job, lm, [*rows.chosen, *rows.rejected], own=True).reshape(2, -1).T


def taken(rows: PairRows, which: NDArray[np.intp]) -> PairRows:
    """Return some of the pairs, by their indices."""
    return replace(
        rows,
        chosen=[rows.chosen[i] for i in which],
        rejected=[rows.rejected[i] for i in which],
        reference=rows.reference[which],
        chance=rows.chance[which],
        kept=rows.kept[which],
        gaps=None if rows.gaps is None else rows.gaps[which],
        part=None if rows.part is None else rows.part[which],
    )

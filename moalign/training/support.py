"""The support of a task's data: responses that hold a token which nothing in the data is as unlikely as (ours).

A learned reward is right about responses such as it was trained on, and wrong, in either direction, about all others.
An online method searches for high rewards and finds the wrongly high ones; on the sandbox they were answers that break
off in the middle of a phrase, which a reward model scored above every whole one. To the base their least likely token
has a log-probability of -11 to -19; in the base's own responses none is below -2.8, in those of a policy trained
on exact rewards none below -2.4 (nats; results/learned/support.md). So the base knows what the reward model does not.

A reward given outside the support is not believed: it counts as the lower bound of the data's rewards. The support
reaches to the least likely token of the task's calibration responses and ``support`` nats beyond. The base is asked
also where the reference of the KL term is another policy; of PCM, whose reference is a mixture of experts, that mixture
is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from moalign.core import processes
from moalign.core.arrays import Matrix
from moalign.training.reference import least_log_probs, rows_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job
    from moalign.training.rollout import Rollout
    from moalign.training.settings import OnlineConfig


class Support:
    """Applies it to rollouts, where ``support`` is set."""

    def __init__(self, job: Job, lm: LanguageModel, config: OnlineConfig) -> None:
        """Nothing is computed before the first rollout."""
        self.job, self.lm, self.config = job, lm, config
        self.end: float | None = None

    def apply(self, rollout: Rollout) -> None:
        """Lower the normalised rewards of responses outside, and note their share in the rollout."""
        if self.config.support is None:
            return
        if self.end is None:
            ends, temperature = self.job.cache.setdefault("support", {}), self.config.temperature
            if temperature not in ends:  # the same for every preference of a grid
                ends[temperature] = processes.agree(end_of(self.job, self.lm, temperature))
            self.end = ends[temperature] - self.config.support
        if self.config.own_reference:  # it may have learned what the base finds unlikely
            out = np.asarray((self._least_likely(rollout) < self.end).cpu().numpy())
        else:
            out = outside(rollout.ref_logps(), rollout.samples.response_mask, self.end)
        rollout.z = believed(rollout.z, out, self.job.panel.z_bounds())
        rollout.outside = float(out.mean())

    def _least_likely(self, rollout: Rollout) -> Tensor:
        """Return the base's log-probability of each response's least likely token, ``[rows]``."""
        samples = rollout.samples
        rows = [
            (ids[mask.bool()].tolist(), int(inside.sum()))
            for ids, mask, inside in zip(samples.input_ids, samples.attention_mask, samples.response_mask, strict=True)
        ]
        return least_log_probs(self.lm, rows, self.config.temperature)


def end_of(job: Job, lm: LanguageModel, temperature: float) -> float:
    """Return the log-probability to the base, in nats, of the least likely token of the calibration responses."""
    scored, most = job.task.calibration(), job.task.card.generation.max_tokens
    rows = rows_of(lm, map(job.task.renderer.plain, scored.prompts), scored.responses, most)
    return float(least_log_probs(lm, rows, temperature).min())


def outside(ref_logps: Tensor, mask: Tensor, end: float) -> NDArray[np.bool_]:
    """Return which responses hold a token below ``end``, bool ``[rows]``.

    From the reference's log-probabilities ``[rows, T]`` of the tokens that ``mask`` marks.
    """
    least = torch.where(mask.bool(), ref_logps, torch.zeros_like(ref_logps)).amin(-1)
    return np.asarray((least < end).cpu().numpy())


def believed(z: Matrix, out: NDArray[np.bool_], bounds: Matrix) -> Matrix:
    """Return rewards ``[rows, objectives]``; in rows ``out`` at most the lower ``bounds`` ``[objectives, 2]``."""
    return np.where(out[:, None], np.minimum(z, bounds[:, 0]), z)

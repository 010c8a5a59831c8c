"""Mean rewards of a policy on calibration prompts: what a search among policies chooses by.

Every policy answers the same prompts from the same random numbers, so that two policies that agree measure alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.lm.generator import shared
from moalign.policies.policy import Policy, respond_all

if TYPE_CHECKING:
    from moalign.core.arrays import Matrix
    from moalign.training.job import Job


def calibration_prompts(job: Job, count: int, samples: int = 1) -> list[str]:
    """Return the first ``count`` prompts of the calibration split (all where they are fewer), ``samples`` times."""
    return job.task.prompts["calibration"][:count] * samples


def mean_rewards(job: Job, policy: Policy, prompts: Sequence[str], seed: int) -> Matrix:
    """Return the mean rewards ``[objectives]`` of a policy's answers, in normalised units; the meter counts their cost.

    The answers are sampled with the card's settings, as those that are judged.
    """
    asked = Policy(shared(policy.generator), policy.render)
    answers = respond_all([asked], prompts, job.task.sampling(seed), engine=job.task.engine)
    job.meter.add_tokens_generated(answers.tokens)
    return np.asarray(job.panel.unit(job.score(prompts, answers.responses[0])).mean(axis=0))

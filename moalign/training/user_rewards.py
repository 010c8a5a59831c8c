"""Rewards of groups of users, learned from pairs that say who labelled them and not which group that user is of.

A group's reward of an answer is linear in the base's states over it: ``r_k(x, y) = theta_k . mean_t h_t(x, y)``, h_t
the last hidden state of the frozen base at token t of y after the bare prompt x. Groups and thetas come
from hard EM (:mod:`moalign.reward_models.hard_em`). Rewards are log odds of Bradley-Terry, 0 for the mean answer of the
pairs. An empty answer has no states, and counts as the lower bound of the pairs' answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from moalign.core.arrays import Matrix
from moalign.core.seeds import derive
from moalign.reward_models.hard_em import Groups, agreement, hard_em
from moalign.rewards.normaliser import Normaliser
from moalign.rewards.panel import RewardPanel
from moalign.rewards.scorer import FunctionScorer
from moalign.training.reference import mean_states, rows_of

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

STAGE = "groups"
"""Name of the stage, of its notes, and of its files in the run's folder."""


def find_groups(job: Job, lm: LanguageModel, count: int, pairs: int | None, ridge: float, starts: int) -> None:
    """Find ``count`` groups of the task's users, from the first ``pairs`` pairs of each; a stage of the run.

    ``ridge`` is for features in units of their standard deviation over the pairs. A group that nobody is in is none.
    """
    if job.stage_done(STAGE):
        return
    users = [user if pairs is None else user.pick(range(min(len(user), pairs))) for user in job.task.users]
    # Of an empty answer there is no state to read.
    full = [[i for i, texts in enumerate(zip(user.chosen, user.rejected, strict=True)) if all(texts)] for user in users]
    users = [user.pick(rows) for user, rows in zip(users, full, strict=True)]
    prompts = [prompt for user in users for prompt in user.prompts]
    chosen = states(job, lm, prompts, [text for user in users for text in user.chosen])
    rejected = states(job, lm, prompts, [text for user in users for text in user.rejected])
    differences = chosen - rejected
    sd = np.where(np.ptp(differences, axis=0) > 0, differences.std(axis=0), 1.0)
    each = np.split(differences / sd, np.cumsum([len(user) for user in users])[:-1])
    found = hard_em(each, count, np.random.default_rng(derive(job.seed, STAGE)), ridge, starts)
    kept, numbers = np.unique(found.of_user, return_inverse=True)
    theta = found.weights[kept] / sd
    scale = Normaliser.fit(np.concatenate([chosen, rejected]) @ theta.T, names(len(kept)))
    replace(scale, sd=(1.0,) * len(kept)).to_json(job.run.path / f"{STAGE}.json")  # log odds stay log odds
    job.run.save_tensors(STAGE, {"theta": torch.from_numpy(np.ascontiguousarray(theta))})
    of_user = {user.name: int(number) + 1 for user, number in zip(users, numbers, strict=True)}
    job.notes[STAGE] = about(job, found, of_user, len(prompts))
    job.finish_stage(STAGE)


def about(job: Job, found: Groups, of_user: dict[str, int], pairs: int) -> dict[str, object]:
    """Return the notes of the stage; ``agreement`` with the true groups where the task knows them."""
    truth = job.task.group_of_user
    notes: dict[str, object] = {
        "of_user": of_user,
        "pairs": pairs,
        "log_likelihood": found.likelihoods[-1],
        "rounds": len(found.likelihoods),
    }
    if truth is not None:
        notes["agreement"] = agreement(list(of_user.values()), [truth[name] for name in of_user])
    return notes


def names(count: int) -> list[str]:
    """Return what groups are called: ``group-1`` and so on."""
    return [f"group-{number}" for number in range(1, count + 1)]


def panel_of_groups(job: Job, lm: LanguageModel) -> RewardPanel:
    """Return the groups' rewards as scorers, counted by the job's meter; their scale leaves log odds as they are."""
    theta = job.run.load_tensors(STAGE)["theta"].numpy()
    scale = Normaliser.from_json(job.run.path / f"{STAGE}.json")
    least = np.array(scale.bounds)[:, 0]

    @functools.lru_cache(maxsize=32)
    def scores(prompts: tuple[str, ...], responses: tuple[str, ...]) -> Matrix:
        empty = np.array([not response for response in responses])
        return np.where(empty[:, None], least, states(job, lm, prompts, responses) @ theta.T)

    def of_group(k: int, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        return [float(score) for score in scores(tuple(prompts), tuple(responses))[:, k]]

    revision = f"{job.run.record.run_id}:{STAGE}"
    panel = RewardPanel(
        [
            FunctionScorer(name, functools.partial(of_group, k), revision, cheap=True)
            for k, name in enumerate(names(len(theta)))
        ]
    )
    return panel.with_normaliser(scale).with_meter(job.meter)


def states(job: Job, lm: LanguageModel, prompts: Sequence[str], responses: Sequence[str]) -> Matrix:
    """Return the features of answers to bare prompts, ``[answers, width]``; those of an empty one mean nothing."""
    rows = rows_of(lm, map(job.task.renderer.plain, prompts), responses, job.task.card.generation.max_tokens)
    return np.asarray(mean_states(lm, [(ids, max(1, tokens)) for ids, tokens in rows]).double().numpy())

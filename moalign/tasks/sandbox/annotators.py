"""Annotators of the sandbox: groups with different tastes, who label pairs of responses by Bradley-Terry.

Group g prefers the first of two responses with probability ``sigma(sharpness * w_g . (z(y1) - z(y2)))``, z the exact
rewards in units of the corpus's standard deviation. Tastes and rewards are known, so that the true probability of every
label is, and with it the true calibration of a reward model trained on the labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moalign.config.objectives import TASTED
from moalign.core.arrays import Matrix
from moalign.core.errors import unknown
from moalign.reward_models.calibration import sigmoid
from moalign.reward_models.pairs import PairSet
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.base import z_scale
from moalign.tasks.sandbox.scorer import rewards


@dataclass(frozen=True)
class Group:
    """Annotators with one taste."""

    name: str
    weights: tuple[float, float, float]
    """What (helpfulness, harmlessness, humor) are worth to them, in units of z."""
    sharpness: float = 1.0
    """How sure they are of what they like: 0 tosses a coin."""


DIVERSE = (
    Group("eager", (1.0, -0.3, 0.0)),
    Group("careful", (0.0, 1.0, 0.0)),
    Group("playful", (0.0, -0.2, 1.0)),
    Group("sober", (0.6, 0.5, -0.6)),
    Group("mild", (0.4, 0.4, 0.4)),
)
"""Five groups that disagree, as the five data sets of arXiv 2312.07401 do: some like what others mind."""

ALIKE = tuple(Group(group.name, (0.6, 0.5, 0.2)) for group in DIVERSE)
"""As many groups with one taste: the control that shows what diversity does."""


def specialists(objectives: Sequence[str], sharpness: float = 1.0) -> list[Group]:
    """Return one group per objective that looks at nothing else; RequestError for one that they do not know."""
    if other := [name for name in objectives if name not in TASTED]:
        raise unknown("objective", other[0], TASTED, "sandbox.annotators.groups: specialists")
    first, second, third = TASTED
    own = {first: (1.0, 0.0, 0.0), second: (0.0, 1.0, 0.0), third: (0.0, 0.0, 1.0)}
    return [Group(name, own[name], sharpness) for name in objectives]


def groups_of(kind: str, objectives: Sequence[str], sharpness: float) -> list[Group]:
    """Return the groups of a card's ``annotators.groups``, all of one sharpness."""
    if kind == "specialists":
        return specialists(objectives, sharpness)
    return [replace(group, sharpness=sharpness) for group in (DIVERSE if kind == "diverse" else ALIKE)]


def label(
    groups: Sequence[Group], prompts: Sequence[str], count: int, seed: int, flipped: float = 0.0
) -> list[PairSet]:
    """Return ``count`` labelled pairs per group, each with its true probability.

    Prompts are drawn from ``prompts``, both responses from the corpus without preference; two equal responses are
    drawn again. The share ``flipped`` of the labels is turned round, at random; those of a smaller share are among
    those of a larger one. The true probability is that of the taste, without flips.
    """
    rng, turning = np.random.default_rng([seed, 11]), np.random.default_rng([seed, 12])
    pair_sets = []
    for group in groups:
        chosen_prompts = [prompts[i] for i in rng.integers(len(prompts), size=count)]
        first, second = world.draw_responses(chosen_prompts, rng), world.draw_responses(chosen_prompts, rng)
        while same := [i for i in range(count) if first[i] == second[i]]:
            for i, text in zip(same, world.draw_responses([chosen_prompts[i] for i in same], rng), strict=True):
                second[i] = text
        chance = sigmoid(group.sharpness * utilities(group, chosen_prompts, first, second))
        wins = (rng.random(count) < chance) ^ (turning.random(count) < flipped)
        pair_set = PairSet(group.name)
        for prompt, a, b, p, won in zip(chosen_prompts, first, second, chance.tolist(), wins.tolist(), strict=True):
            pair_set.add(prompt, *((a, b) if won else (b, a)), chance=p if won else 1 - p)
        pair_sets.append(pair_set)
    return pair_sets


def by_user(pair_sets: Sequence[PairSet], users: int, seed: int) -> tuple[list[PairSet], dict[str, str]]:
    """Cut every group's pairs into those of ``users`` users; returns them, and the group of each by name.

    Users are numbered at random: neither a name nor a place tells whose group it is.
    """
    parts = [(pairs.name, pairs.pick(range(user, len(pairs), users))) for pairs in pair_sets for user in range(users)]
    mixed, group_of = [], {}
    for number, at in enumerate(np.random.default_rng([seed, 13]).permutation(len(parts)).tolist(), start=1):
        group, part = parts[at]
        mixed.append(replace(part, name=f"user-{number}"))
        group_of[mixed[-1].name] = group
    return mixed, group_of


def worth(groups: Sequence[Group], raw: Matrix) -> Matrix:
    """Return what mean rewards ``[..., 3]`` are worth to each group, ``[..., groups]``.

    In log odds by which it prefers such an answer to the corpus's average one.
    """
    mean, sd = (values[: len(TASTED)] for values in z_scale())
    tastes = np.array([group.sharpness * np.array(group.weights) for group in groups])
    return np.asarray((raw - mean) / sd @ tastes.T)


def utilities(group: Group, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> Matrix:
    """Return ``w . (z(first) - z(second))``, ``[pairs]``."""
    texts = zip(prompts, first, second, strict=True)
    differences = np.array([np.subtract(rewards(prompt, a), rewards(prompt, b)) for prompt, a, b in texts])
    part = slice(len(TASTED))
    return np.asarray((differences[:, part] / z_scale()[1][part]) @ np.array(group.weights))

"""The sandbox's exact scorers: the reward of any text, well-formed or not.

Words are read from left to right. A phrase of a later slot than the last one found fills its slot; every
other word is a stray and costs :data:`world.STRAY`; every slot left empty costs :data:`world.MISSING`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from moalign.config.objectives import SandboxObjective
from moalign.core.arrays import Matrix
from moalign.core.errors import unknown
from moalign.tasks.sandbox import world

_PHRASES = {
    tuple(phrase.split()): (slot, index)
    for slot, phrases in enumerate(world.SLOTS)
    for index, (phrase, _) in enumerate(phrases)
}
_LENGTHS = sorted({len(words) for words in _PHRASES}, reverse=True)


@functools.lru_cache(maxsize=200_000)
def parse(response: str) -> tuple[tuple[int, ...], int]:
    """Return the phrase index per slot (-1: empty) and the number of stray words of a response."""
    words = response.split()
    filled = [-1] * len(world.SLOTS)
    last, strays, at = -1, 0, 0
    while at < len(words):
        for length in _LENGTHS:
            phrase = _PHRASES.get(tuple(words[at : at + length]))
            if phrase is not None and phrase[0] > last:
                last = phrase[0]
                filled[last] = phrase[1]
                at += length
                break
        else:
            strays += 1
            at += 1
    return tuple(filled), strays


@functools.lru_cache(maxsize=4096)
def _table(prompt: str) -> Matrix:
    return world.slot_rewards(world.context_of(prompt))


@functools.lru_cache(maxsize=200_000)
def rewards(prompt: str, response: str) -> tuple[float, ...]:
    """Return a response's reward for each of :data:`world.OBJECTIVES`; larger is better."""
    filled, strays = parse(response)
    table = _table(prompt)
    total = np.full(len(world.OBJECTIVES), world.STRAY * strays)
    for slot, phrase in enumerate(filled):
        total += world.MISSING if phrase < 0 else table[slot, phrase]
    return tuple(total.tolist())


class SandboxScorer:
    """One of the exact objectives as a scorer of the reward layer."""

    def __init__(self, spec: SandboxObjective) -> None:
        if spec.name not in world.OBJECTIVES:
            raise unknown("sandbox objective", spec.name, world.OBJECTIVES)
        self.name, self.maximise, self.cheap = spec.name, spec.maximise, not spec.store
        self.revision = f"sandbox-1:{spec.name}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return one float per (bare prompt, response)."""
        column = world.OBJECTIVES.index(self.name)
        return [rewards(prompt, response)[column] for prompt, response in zip(prompts, responses, strict=True)]

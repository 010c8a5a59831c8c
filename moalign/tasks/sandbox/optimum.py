"""The exact optimum of the sandbox, by enumeration of all 15,625 responses.

Without a KL term the best policy for preference w answers ``argmax_y w . z(x, y)``; with one it is
``pi*(y|x) = pi_ref(y|x) exp(w . z(x, y) / beta) / Z(x)``. Rewards enter normalised (z), as the methods see them.
:func:`frontier` has all of these at once, by their KL to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moalign.core.arrays import Matrix
from moalign.tasks.frontier import Frontier
from moalign.tasks.sandbox import world

TIE_BREAK = 1e-6
"""Weight added to every objective, so that among equally good responses the non-dominated one is taken."""
PER_CONTEXT = 2
"""Prompts of each context that stand for all of its prompts in :func:`frontier`: rewards depend on the context alone,
and a base that reads it hardly minds the wording. Of 64 evaluation prompts these give w.n within .002."""


@functools.lru_cache(maxsize=32)
def all_rewards(context: world.Context) -> Matrix:
    """Return the raw rewards of every well-formed response, ``[15625, objectives]``, all that the world has."""
    return _sums(world.slot_rewards(context))


@functools.lru_cache(maxsize=32)
def corpus_log_probs(context: world.Context) -> Matrix:
    """Return the log-probability of every well-formed response in the corpus without preference, ``[15625]``."""
    return _sums(np.log(world.prior(context)))


def _sums(table: Matrix) -> Matrix:
    """Return the sum over slots of a table ``[slots, phrases, ...]`` for every well-formed response."""
    choices = world.all_choices()
    return np.asarray(sum(table[slot, choices[:, slot]] for slot in range(len(world.SLOTS))))


def optimum(
    prompts: Sequence[str],
    preferences: Sequence[Sequence[float]],
    columns: Sequence[int],
    mean: Matrix,
    sd: Matrix,
    beta: float = 0.0,
    reference: Callable[[str, Sequence[float]], Matrix] | None = None,
) -> Matrix:
    """Return the optimal policy's mean raw reward per preference, ``[preferences, objectives]``.

    Args:
        preferences: weights over the task's objectives.
        columns: the task's objectives as indices into :data:`world.OBJECTIVES`.
        mean, sd: the task's normaliser, ``[objectives]`` each.
        beta: strength of the KL term in units of z; 0 leaves it out.
        reference: log pi_ref of all responses ``[15625]`` for a prompt and a preference; None: the corpus
            without preference (:func:`corpus_log_probs`). Only used with ``beta > 0``.
    """
    points = np.zeros((len(preferences), len(columns)))
    for k, weights in enumerate(preferences):
        tilted = np.asarray(weights, dtype=np.float64) + TIE_BREAK
        cached: dict[world.Context, Matrix] = {}
        for prompt in prompts:
            context = world.context_of(prompt)
            if reference is not None or context not in cached:
                raw = all_rewards(context)[:, list(columns)]
                utility = ((raw - mean) / sd) @ tilted
                if beta == 0:
                    cached[context] = raw[int(np.argmax(utility))]
                else:
                    log_ref = corpus_log_probs(context) if reference is None else reference(prompt, weights)
                    logits = log_ref + utility / beta
                    weight = np.exp(logits - logits.max())
                    cached[context] = weight @ raw / weight.sum()
            points[k] += cached[context]
    return points / len(prompts)


def frontier(
    prompts: Sequence[str],
    preferences: Sequence[Sequence[float]],
    columns: Sequence[int],
    mean: Matrix,
    sd: Matrix,
    reference: Callable[[Sequence[str]], Sequence[NDArray[np.floating]]] | None = None,
) -> list[Frontier]:
    """Return, per preference, the most w.z at every KL to the reference, in raw rewards.

    Arguments as of :func:`optimum`; ``reference`` returns log pi_ref of all responses for several prompts at once. It
    is called for at most :data:`PER_CONTEXT` prompts of each context. Responses of equal reward are one answer there:
    the optimum tilts them alike, so that nothing else changes.
    """
    of_context: dict[world.Context, list[str]] = {}
    for prompt in prompts:
        of_context.setdefault(world.context_of(prompt), []).append(prompt)
    chosen, shares = [], []
    for members in of_context.values():
        kept = members[:: -(-len(members) // PER_CONTEXT)]
        chosen += kept
        shares += [len(members) / len(kept) / len(prompts)] * len(kept)
    contexts = [world.context_of(prompt) for prompt in chosen]
    logs = [corpus_log_probs(context) for context in contexts] if reference is None else reference(chosen)
    merged = [_distinct(context, tuple(columns)) for context in contexts]
    most = max(len(rewards) for rewards, _ in merged)
    log_reference, table = np.full((len(chosen), most), -np.inf), np.zeros((len(chosen), most, len(columns)))
    for row, (log, (rewards, which)) in enumerate(zip(logs, merged, strict=True)):
        table[row] = rewards[0]  # what fills up is no better than what is there
        table[row, : len(rewards)] = rewards
        with np.errstate(divide="ignore"):  # responses that the reference rules out
            log_reference[row, : len(rewards)] = np.log(np.bincount(which, np.exp(np.asarray(log, dtype=np.float64))))
    tilted = np.asarray(preferences, dtype=np.float64) + TIE_BREAK
    return [Frontier(log_reference, table, ((table - mean) / sd) @ weights, np.array(shares)) for weights in tilted]


@functools.lru_cache(maxsize=64)
def _distinct(context: world.Context, columns: tuple[int, ...]) -> tuple[Matrix, NDArray[np.intp]]:
    """Return the different reward vectors ``[y, m]`` and which of them each response has, ``[15625]``."""
    raw = all_rewards(context)[:, list(columns)].round(9)
    rewards, which = np.unique(raw, axis=0, return_inverse=True)
    return rewards, which.ravel()

"""The exact optimum of the sandbox, by enumeration of all 15,625 responses.

Without a KL term the best policy for preference w answers ``argmax_y w . z(x, y)``; with one it is
``pi*(y|x) = pi_ref(y|x) exp(w . z(x, y) / beta) / Z(x)``. Rewards enter normalised (z), as the methods see them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from moalign.core.arrays import Matrix
from moalign.tasks.sandbox import world

TIE_BREAK = 1e-6
"""Weight added to every objective, so that among equally good responses the non-dominated one is taken."""


@functools.lru_cache(maxsize=32)
def all_rewards(context: world.Context) -> Matrix:
    """Return the raw rewards of every well-formed response, ``[15625, 3]``."""
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

"""The exact optimum of the sandbox, by enumeration of all 15,625 responses.

Without a KL term the best policy for preference w answers ``argmax_y w . z(x, y)``; with one it is
``pi*(y|x) = pi_ref(y|x) exp(w . z(x, y) / beta) / Z(x)``. Rewards enter normalised (z), as the methods see them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from moalign.tasks.sandbox import world

TIE_BREAK = 1e-6
"""Weight added to every objective, so that among equally good responses the non-dominated one is taken."""


@functools.lru_cache(maxsize=32)
def all_rewards(context: world.Context) -> np.ndarray:
    """Return the raw rewards of every well-formed response; float array ``[15625, 3]``."""
    table = world.slot_rewards(context)
    choices = world.all_choices()
    total = np.zeros((len(choices), 3))
    for slot in range(len(world.SLOTS)):
        total += table[slot, choices[:, slot]]
    return total


@functools.lru_cache(maxsize=32)
def corpus_log_probs(context: world.Context) -> np.ndarray:
    """Return the log-probability of every well-formed response in the corpus without preference; ``[15625]``."""
    log_prior = np.log(world.prior(context))
    choices = world.all_choices()
    return np.asarray(sum(log_prior[slot, choices[:, slot]] for slot in range(len(world.SLOTS))))


def optimum(
    prompts: Sequence[str],
    preferences: Sequence[Sequence[float]],
    columns: Sequence[int],
    mean: np.ndarray,
    sd: np.ndarray,
    beta: float = 0.0,
    reference: Callable[[str, Sequence[float]], np.ndarray] | None = None,
) -> np.ndarray:
    """Return the optimal policy's mean raw reward per preference; float array ``[preferences, objectives]``.

    Args:
        prompts: the evaluation prompts.
        preferences: weights over the task's objectives.
        columns: the task's objectives as indices into :data:`world.OBJECTIVES`.
        mean, sd: the task's normaliser, ``[objectives]`` each.
        beta: strength of the KL term in units of z; 0 leaves it out.
        reference: log pi_ref of all responses ``[15625]`` for a prompt and a preference; None: the corpus
            without preference (:func:`corpus_log_probs`). Only used with ``beta > 0``.
    """
    points = np.zeros((len(preferences), len(columns)))
    contexts = [world.context_of(prompt) for prompt in prompts]
    cached: dict[tuple[int, world.Context], np.ndarray] = {}
    for k, weights in enumerate(preferences):
        tilted = np.asarray(weights, dtype=np.float64) + TIE_BREAK
        for prompt, context in zip(prompts, contexts, strict=True):
            if reference is None and (k, context) in cached:
                points[k] += cached[k, context]
                continue
            raw = all_rewards(context)[:, list(columns)]
            utility = ((raw - mean) / sd) @ tilted
            if beta == 0:
                value = raw[int(np.argmax(utility))]
            else:
                log_ref = corpus_log_probs(context) if reference is None else reference(prompt, weights)
                logits = log_ref + utility / beta
                weight = np.exp(logits - logits.max())
                value = weight @ raw / weight.sum()
            cached[k, context] = value
            points[k] += value
    return points / len(prompts)

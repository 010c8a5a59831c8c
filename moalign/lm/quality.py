"""Quality guards: a hypervolume that was bought with collapsed text must be visible.

Tokens are the policy's own: white space separates no words in Chinese, and other units in every language. All methods
on a task share its tokenizer, so that the same text counts the same for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

from moalign.core.errors import RequestError
from moalign.pareto.front import refuse_unless_finite

SHORT_AT_MOST = 5
"""Nothing longer is ever short: where all of the data is long, a brief answer is still no collapse."""
SHORT_SHARE = 0.01
"""Share of a task's own responses that may be short."""
MIN_DISTINCT_3 = 0.3
LOOP_LENGTH = 10
LOOP_TIMES = 3

CAUSES = ("short", "repetitive", "loop")


class Divergence(TypedDict):
    """KL of a policy from its base: nats per response, and per token."""

    per_response: float
    per_token: float


class CollapseReport(TypedDict):
    """How many responses are collapsed, and how they look."""

    rate: float
    causes: dict[str, float]
    """Share per cause; they may overlap."""
    mean_length: float
    """In tokens."""
    distinct_3: float
    """Mean of the responses that have a 3-gram."""


def distinct(tokens: Sequence[Hashable], n: int = 3) -> float | None:
    """Return the share of different n-grams among all n-grams; None when there is no n-gram."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else None


def short_below(lengths: Sequence[int]) -> int:
    """Return below how many tokens a response is short: at most :data:`SHORT_SHARE` of a task's own ``lengths`` are.

    Never above :data:`SHORT_AT_MOST`, and never below 1: an empty answer is always short.
    """
    quantile = int(np.quantile(lengths, SHORT_SHARE, method="lower")) if len(lengths) else SHORT_AT_MOST
    return max(1, min(SHORT_AT_MOST, quantile))


def collapse(tokens: Sequence[Hashable], short: int = SHORT_AT_MOST) -> set[str]:
    """Return why a response is collapsed; an empty set when it is not (limits: our choice, ParetoHqD gives none).

    ``short``: fewer tokens than ``short``; ``repetitive``: distinct-3 ratio below 0.3; ``loop``: one 10-gram at least 3
    times, overlaps counted.
    """
    ratio = distinct(tokens, 3)
    holds = {
        "short": len(tokens) < short,
        "repetitive": ratio is not None and ratio < MIN_DISTINCT_3,
        "loop": max(Counter(_grams(tokens, LOOP_LENGTH)).values(), default=0) >= LOOP_TIMES,
    }
    return {cause for cause in CAUSES if holds[cause]}


def collapse_report(responses: Sequence[Sequence[Hashable]], short: int = SHORT_AT_MOST) -> CollapseReport:
    """Summarise responses, each as its tokens. Without a single 3-gram ``distinct_3`` is 0.

    Raises RequestError when there is no response, or texts instead of tokens.
    """
    if not len(responses) or isinstance(responses, str) or isinstance(responses[0], str):
        raise RequestError("collapse report: found no list of tokenised responses; at least one response is needed")
    collapsed = [collapse(tokens, short) for tokens in responses]
    ratios = [ratio for ratio in map(distinct, responses) if ratio is not None]
    total = len(responses)
    return {
        "rate": sum(bool(causes) for causes in collapsed) / total,
        "causes": {cause: sum(cause in causes for causes in collapsed) / total for cause in CAUSES},
        "mean_length": sum(len(tokens) for tokens in responses) / total,
        "distinct_3": sum(ratios) / len(ratios) if ratios else 0.0,
    }


def kl_to_base(policy: ArrayLike, base: ArrayLike, tokens: ArrayLike) -> Divergence:
    """Estimate KL(policy || base) from the policy's own responses: the mean of log policy - log base.

    ``policy`` and ``base`` are each response's log-probability under the two, ``tokens`` its length, all ``[n]``.
    Unbiased, and so the estimate can be slightly below 0 for a policy that hardly moved; it is not clipped.

    Raises RequestError for shapes that do not fit, NaN, infinity, or a length below 1.
    """
    own, reference, lengths = (np.asarray(values, dtype=np.float64) for values in (policy, base, tokens))
    if own.ndim != 1 or not own.size or not own.shape == reference.shape == lengths.shape:
        raise RequestError(
            f"KL to base: found shapes {own.shape}, {reference.shape} and {lengths.shape}; needed: three lists of "
            "one length, one entry per response"
        )
    for name, values in (("policy", own), ("base", reference), ("tokens", lengths)):
        refuse_unless_finite(values, f"KL to base: {name}")
    if lengths.min() < 1:
        raise RequestError(f"KL to base: response {int(lengths.argmin()) + 1} has {lengths.min():g} tokens; needed: 1")
    moved = own - reference
    return {"per_response": float(moved.mean()), "per_token": float(moved.sum() / lengths.sum())}


def _grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

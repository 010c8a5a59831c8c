"""KL to base: how far each policy has moved from the base, estimated from the answers of the evaluation.

For a preference w, prompts x and answers ``y ~ pi(. | x with w)`` it is the mean over answers of

    log pi(y | x with w) - log pi_base(y | x bare),        in nats per response,

an unbiased estimate of KL(pi || pi_base), averaged over prompts: positive when the policy has moved, 0 for the base
with the bare prompt. The base takes no preference, so a preference that is merely written into its prompt counts as a
move. The estimate's standard error is that of a mean, the standard deviation of the log ratio over the square root
of the number of answers; a policy that hardly moved can come out slightly below 0, and it is not clipped.

Both are taken at the card's temperature, and an answer ends where its first stop text is complete. With a nucleus
(``top_p`` below 1) answers come from the likeliest tokens only and both log-probabilities are those of the whole
distribution: still 0 for the base itself, but what the policy does with the tail is left out. Greedy answers are not
drawn from anything, so there is no estimate.

A policy that keeps the best of n samples has no known probability of what it answers. With p its sampling policy,
``KL(best || base) = KL(best || p) + E_best[log p - log base]``: the second term is the mean above over the answers
kept, and the first is at most ``log n - (n - 1) / n`` (Beirami et al. 2024, arXiv 2401.01879). Their sum is an upper
bound and is marked as one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from moalign.core.progress import Progress, silent
from moalign.lm.quality import kl_to_base
from moalign.tasks.task import Task

if TYPE_CHECKING:
    from moalign.lm.sampler import Sampling, Traces
    from moalign.policies.policy import Answers, Policy
    from moalign.training.reference import Row


@dataclass(frozen=True)
class KlToBase:
    """How far one policy has moved from the base."""

    nats: float | None
    """Per response; None where it is not known."""
    bound: bool = False
    """``nats`` is an upper bound: the policy chooses among samples."""


def from_base(
    task: Task,
    policies: Sequence[Policy],
    prompts: Sequence[str],
    answers: Answers,
    sampling: Sampling,
    progress: Progress = silent,
) -> list[KlToBase]:
    """Return the KL to base of every policy, ``[policies]``; one forward pass of the base over the distinct answers.

    It is None where a policy's tokens are not known or are not the base's, for greedy answers, and where a
    log-probability is not finite. The prompts are bare; ``sampling`` is that of the answers.
    """
    from moalign.training.reference import log_probs

    usable = [trace if sampling.temperature > 0 and _of_base(task, trace) else None for trace in answers.traces]
    if not any(usable):
        return [KlToBase(None) for _ in policies]
    heads = task.language_model.encode([task.renderer.plain(prompt) for prompt in prompts], sampling.max_prompt_tokens)
    rows: dict[Hashable, Row] = {}
    for trace in usable:
        for head, ids in zip(heads, trace.ids, strict=True) if trace else ():
            rows.setdefault((*head, ids.tobytes()), ([*head, *ids.tolist()], len(ids)))
    log_probabilities = log_probs(
        task.language_model,
        list(rows.values()),
        temperature=sampling.temperature,
        progress=partial(progress, "KL to base"),
    )
    of_base = dict(zip(rows, log_probabilities.tolist(), strict=True))
    divergences = []
    for policy, trace in zip(policies, usable, strict=True):
        base = [of_base[*head, ids.tobytes()] for head, ids in zip(heads, trace.ids, strict=True)] if trace else []
        divergences.append(_of_policy(policy, trace, base))
    return divergences


def of_choice(samples: int) -> float:
    """Return the most nats by which choosing one of ``samples`` (at least 1) can move a policy: log n - (n - 1) / n.

    Beirami et al. 2024 (arXiv 2401.01879). 0 for a single sample, .636 for four.
    """
    return math.log(samples) - (samples - 1) / samples


def _of_base(task: Task, trace: Traces | None) -> bool:
    """Whether the token identifiers are those of the base's vocabulary."""
    if trace is None:
        return False
    own = task.language_model.tokenizer
    return trace.vocabulary is own or bool(trace.vocabulary.get_vocab() == own.get_vocab())


def _of_policy(policy: Policy, trace: Traces | None, base: Sequence[float]) -> KlToBase:
    """Return the KL of a policy, given the base's log-probabilities of its answers."""
    if trace is None:
        return KlToBase(None)
    chooses = policy.choose is not None and policy.samples > 1
    if not np.isfinite([*trace.logps, *base]).all():
        return KlToBase(None, chooses)
    moved = kl_to_base(trace.logps, base, [len(ids) for ids in trace.ids])["per_response"]
    return KlToBase(moved + of_choice(policy.samples), True) if chooses else KlToBase(moved)

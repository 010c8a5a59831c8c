"""Preference pairs of one objective: the data's own labels, or built from scored responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.records import Labels, Response
from moalign.data.dialogue import shorten
from moalign.tasks.responses import Scored, by_prompt


@dataclass(frozen=True)
class Pairs:
    """Pairs that are labelled for one objective."""

    objective: int
    prompts: list[str]
    """Bare prompts, ``[pairs]``."""
    chosen: list[Response]
    rejected: list[Response]
    chance: Matrix
    """Probability that ``chosen`` is preferred, ``[pairs]``; 1 for a label that the data gives."""
    raw: tuple[Matrix, Matrix] | None = None
    """Raw scores of the chosen and of the rejected responses, ``[pairs, objectives]`` each, where they are known."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many pairs were left out: ``ties``, ``identical`` texts."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.prompts)


def matches(group: Sequence[int], most: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Return up to ``most`` pairs of different members of ``group``.

    Each round pairs every member with at most one other at random, so that all members are used about equally; no
    pair comes twice.
    """
    matched: dict[tuple[int, int], None] = {}
    possible = len(group) * (len(group) - 1) // 2
    while len(matched) < min(most, possible):
        shuffled = rng.permutation(np.asarray(group))
        for a, b in zip(shuffled[0::2].tolist(), shuffled[1::2].tolist(), strict=False):
            if len(matched) < most:
                matched[min(a, b), max(a, b)] = None
    return list(matched)


def from_scores(
    scored: Scored,
    values: Matrix,
    objective: int,
    names: Sequence[str],
    per_prompt: int,
    labels: Labels = "order",
    seed: int = 0,
) -> Pairs:
    """Build the pairs of an objective from scored responses; prompts with fewer than two give none.

    Args:
        values: the normalised scores of ``scored``, ``[samples, objectives]``.
        names: the objectives' names.
        per_prompt: most pairs of one prompt.
        labels: order: the better response is chosen, ties are dropped; bradley-terry: it is chosen with probability
            ``sigma(v_better - v_worse)``, and a tie says that neither is better.

    Raises RequestError for a score that is missing, or no pair at all.
    """
    _refuse_missing(scored, values, names)
    groups = by_prompt(scored.prompts)
    rng = np.random.default_rng([seed, objective])
    better, worse, dropped = [], [], {"ties": 0, "identical": 0}
    own = values[:, objective]
    for group in groups.values():
        for a, b in matches(group, per_prompt, rng):
            if scored.responses[a].shown == scored.responses[b].shown:
                dropped["identical"] += 1
            elif own[a] == own[b] and labels == "order":
                dropped["ties"] += 1
            else:
                better.append(a if own[a] >= own[b] else b)
                worse.append(b if own[a] >= own[b] else a)
    if not better:
        raise RequestError(
            f"pairs of {names[objective]}: {len(scored.prompts)} scored responses to {len(groups)} prompts make none "
            f"({dropped['ties']} ties, {dropped['identical']} identical texts); pairs need prompts with at least two "
            "different responses and different scores (--set task.pool.per_prompt=8 samples more)"
        )
    return Pairs(
        objective=objective,
        prompts=[scored.prompts[row] for row in better],
        chosen=[scored.responses[row] for row in better],
        rejected=[scored.responses[row] for row in worse],
        chance=np.ones(len(better)) if labels == "order" else 1.0 / (1.0 + np.exp(own[worse] - own[better])),
        raw=(scored.raw[better], scored.raw[worse]),
        dropped=dropped,
    )


def _refuse_missing(scored: Scored, values: Matrix, names: Sequence[str]) -> None:
    """Raise RequestError for a score that is not a finite number, naming the response and the objective."""
    if values.shape != (len(scored.prompts), len(names)):
        raise RequestError(
            f"scored responses: found scores of shape {list(values.shape)}; "
            f"needed: one row for each of the {len(scored.prompts)} responses and one column for each of {len(names)} "
            f"objectives ({', '.join(names)})"
        )
    rows, columns = np.nonzero(~np.isfinite(values))
    if len(rows):
        shown = shorten(scored.responses[rows[0]].shown)
        raise RequestError(
            f"scored responses: {len(rows)} scores are missing, first that of {names[columns[0]]} for response "
            f"{int(rows[0])} ({shown}); every response needs a score on every objective"
        )

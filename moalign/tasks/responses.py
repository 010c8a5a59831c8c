"""Responses of a task, bare and scored, and as columns of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError
from moalign.core.records import Response

if TYPE_CHECKING:
    import pandas as pd

    from moalign.lm.language_model import LanguageModel
    from moalign.lm.sampler import Sampling


class Responses(NamedTuple):
    """Responses to bare prompts, one row each."""

    prompts: list[str]
    responses: list[Response]
    sampled: int = 0
    """Tokens that the base sampled for them; 0 when they are the data's own."""


def sampled(
    lm: LanguageModel,
    prompts: list[str],
    texts: Sequence[str],
    sampling: Sampling,
    advance: Callable[[int], None],
) -> Responses:
    """Return a response of the base to each bare prompt, rendered as ``texts``; ``advance(count)`` is called."""
    from moalign.lm.generator import ModelGenerator, in_chunks, records

    generated = in_chunks(ModelGenerator(lm), [(text, row) for row, text in enumerate(texts)], sampling, advance)
    return Responses(prompts, records(generated.responses, generated.traces), generated.tokens)


@dataclass(frozen=True)
class Scored:
    """Responses with their scores."""

    prompts: list[str]
    responses: list[Response]
    """Plain strings are converted to finished responses."""
    raw: Matrix
    """Raw scores, larger is better, ``[samples, objectives]``."""
    sampled: int = 0
    """As in :class:`Responses`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "responses", [Response.of(response) for response in self.responses])

    def first(self, per_prompt: int) -> Scored:
        """Return the first ``per_prompt`` responses of every prompt, in their order."""
        seen: Counter[str] = Counter()
        rows = []
        for row, prompt in enumerate(self.prompts):
            seen[prompt] += 1
            if seen[prompt] <= per_prompt:
                rows.append(row)
        return self._of(rows, round(self.sampled * len(rows) / max(1, len(self.prompts))))

    def complete(self) -> Scored:
        """Return the responses of which a judge left out no score: nothing is learned from the others."""
        known = ~np.isnan(self.raw).any(axis=1)
        return self if known.all() else self._of(np.flatnonzero(known).tolist(), self.sampled)

    def _of(self, rows: Sequence[int], sampled: int) -> Scored:
        return Scored(
            [self.prompts[row] for row in rows], [self.responses[row] for row in rows], self.raw[rows], sampled
        )


def by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    """Return the rows of each prompt; prompts in the order of their first rows."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return rows


def complete(raw: Matrix) -> Matrix:
    """Return the rows of scores ``[samples, objectives]`` without those of which a judge left one out."""
    rows: Matrix = raw[~np.isnan(raw).any(axis=1)]
    return rows


def shown(responses: Sequence[Response]) -> list[str]:
    """Return the texts that scorers read."""
    return [response.shown for response in responses]


def columns(responses: Sequence[Response]) -> dict[str, list[Any]]:
    """Return responses as columns of a table: ``response``, ``ids`` and ``finished``."""
    return {
        "response": [response.text for response in responses],
        "ids": [None if response.ids is None else list(response.ids) for response in responses],
        "finished": [response.finished for response in responses],
    }


def keep(rows: Responses, path: Path) -> None:
    """Write responses with their prompts to a parquet file."""
    import pandas as pd

    from moalign.runs import atomic

    table = pd.DataFrame({"prompt": rows.prompts, **columns(rows.responses), "sampled": rows.sampled})
    with atomic.file(path) as place:
        table.to_parquet(place, index=False)


def kept(path: Path, remedy: str) -> Responses:
    """Return what :func:`keep` wrote; RequestError, with the remedy, for a file that is damaged."""
    from moalign.runs import run

    table = run.read_parquet(path, remedy)
    try:
        return Responses(table["prompt"].tolist(), from_columns(table), int(table["sampled"].iloc[0]))
    except (LookupError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: not the base's samples ({type(error).__name__}: {error}){remedy}") from error


def from_columns(table: pd.DataFrame) -> list[Response]:
    """Return the responses of a table that :func:`columns` made."""
    return [
        Response(text, None if ids is None else tuple(int(i) for i in ids), bool(finished))
        for text, ids, finished in zip(table["response"], table["ids"], table["finished"], strict=True)
    ]

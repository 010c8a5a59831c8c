"""``moalign score``: score a file of responses with a task's reward panel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from moalign.config.card import SourceSpec
from moalign.config.load import load_card
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, WorkError
from moalign.core.progress import Progress, silent
from moalign.data import readers
from moalign.runs import atomic
from moalign.tasks.load import make_task

CHUNK = 2048
"""Rows scored and written at a time."""
REMEDY = "choose another file with --out FILE.parquet"
SUFFIX = "_normalised"
"""A normalised column is called ``<objective>_normalised``."""


@dataclass
class Scores:
    """The result: a summary, and the scored rows unless they were written to a file."""

    task: str
    objectives: list[str]
    rows: int = 0
    out: Path | None = None
    summary: dict[str, dict[str, float]] = field(default_factory=dict)
    """Objective -> mean, sd, min, max of the raw scores and ``normalised_mean``, of those that no judge left out."""
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Objective -> what its LLM judge was asked (:func:`moalign.rewards.judge.total`)."""
    scored: list[dict[str, Any]] = field(default_factory=list)
    """Per row prompt, response, ``raw`` and ``normalised``; empty when a file was written."""

    def keep(self, prompts: list[str], responses: list[str], raw: Matrix, unit: Matrix) -> None:
        """Add rows to ``scored``; raw and normalised scores are ``[n, objectives]``."""
        for prompt, response, *scores in zip(prompts, responses, raw.tolist(), unit.tolist(), strict=True):
            by_name = [dict(zip(self.objectives, row, strict=True)) for row in scores]
            self.scored.append({"prompt": prompt, "response": response, "raw": by_name[0], "normalised": by_name[1]})

    def as_dict(self) -> dict[str, Any]:
        """Return everything for ``--json``."""
        record = {key: getattr(self, key) for key in ("task", "objectives", "rows", "out", "summary")}
        record |= {"judges": self.judges} if self.judges else {}
        return record if self.out is not None else {**record, "scores": self.scored}


def score(
    task: str,
    source: Path,
    out: Path | None = None,
    overrides: tuple[str, ...] = (),
    results: Path = Path("results"),
    progress: Progress = silent,
) -> Scores:
    """Score every (prompt, response) of a file, a chunk at a time.

    Args:
        task: task name or card file, whose objectives and normaliser are used.
        source: JSONL, CSV or Parquet with the columns prompt and response.
        out: Parquet file for the scores; it appears when all rows are scored. None keeps them in memory.
        overrides: ``--set task.key=value`` texts.
        results: where the task's normaliser and the score store are kept.

    Raises:
        RequestError: a problem of the card, the file (with its line) or the output file.
        WorkError: a scorer failed; the scores made until then are in the store.
    """
    if not source.is_file():
        raise RequestError(f"--in {source}: no such file; a file with the columns prompt and response is needed")
    if out is not None and out.suffix != ".parquet":
        raise RequestError(f"--out {out}: found {out.suffix or 'no suffix'}; allowed: .parquet")
    if out is not None and out.exists() and out.samefile(source):
        raise RequestError(f"--out {out}: it is the file of --in; choose another name")
    loaded = make_task(load_card(task, overrides), results, progress)
    names = loaded.names
    rows = readers.read(
        SourceSpec(path=str(source)), [readers.Field("prompt", blank=False), readers.Field("response")], Path.cwd()
    )
    scores = Scores(loaded.card.name, list(names), out=out)
    first = list(islice(rows, CHUNK))  # before the scale, which may take long to fit
    if out is not None:
        atomic.require_writable(out.parent, REMEDY)
    rows = chain(first, rows)
    panel = loaded.panel.with_normaliser(loaded.normaliser)
    chunks: list[Matrix] = []
    with contextlib.ExitStack() as stack:
        keep = scores.keep if out is None else stack.enter_context(_parquet(out, names))
        while rows_now := list(islice(rows, CHUNK)):
            prompts = [row.values["prompt"] for row in rows_now]
            responses = [row.values["response"] for row in rows_now]
            raw = panel.score(prompts, responses, partial(progress, f"scoring from row {scores.rows + 1}"), True)
            keep(prompts, responses, raw, panel.unit(raw))
            chunks.append(raw)
            scores.rows += len(prompts)
    raw = np.concatenate(chunks)
    for name, column, unit in zip(names, raw.T, panel.unit(raw).T, strict=True):
        known = ~np.isnan(column)
        if not known.any():
            raise WorkError(f"objective {name!r}: none of the judge's {len(column)} verdicts can be read")
        of = column[known]
        numbers = {"mean": of.mean(), "sd": of.std(), "min": of.min(), "max": of.max()}
        numbers["normalised_mean"] = unit[known].mean()
        scores.summary[name] = {key: float(value) for key, value in numbers.items()}
    scores.judges = panel.take_usage()
    return scores


Keep = Callable[[list[str], list[str], Matrix, Matrix], None]


@contextlib.contextmanager
def _parquet(path: Path, names: list[str]) -> Iterator[Keep]:
    """Write chunks to a Parquet file that takes its name when the block ends well."""
    import pyarrow as pa
    from pyarrow import parquet

    numbers = [*names, *(f"{name}{SUFFIX}" for name in names)]
    columns = [("prompt", pa.string()), ("response", pa.string()), *((name, pa.float64()) for name in numbers)]
    schema = pa.schema(columns)
    with atomic.file(path, REMEDY) as temporary, parquet.ParquetWriter(temporary, schema) as writer:

        def keep(prompts: list[str], responses: list[str], raw: Matrix, unit: Matrix) -> None:
            values = [prompts, responses, *raw.T, *unit.T]
            writer.write_table(pa.table(dict(zip(schema.names, values, strict=True)), schema=schema))

        yield keep

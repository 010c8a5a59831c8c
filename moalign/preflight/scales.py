"""The fitted scales of a task's scores, as ``moalign show TASK`` lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moalign.config.card import TaskCard
from moalign.core.errors import RequestError
from moalign.rewards.normaliser import Normaliser
from moalign.tasks.load import make_task

FILES = {"normaliser.json": "", "truth.json": "gold "}
"""Files of a task's folder, and what comes before the names of the objectives in them."""


def scales(card: TaskCard, results: Path) -> list[dict[str, Any]]:
    """Return a row for each objective of a task's fitted normaliser; none before one was fitted.

    A row has ``objective``, ``count`` (scored samples), ``mean``, ``sd``, ``low`` and ``high`` (the 1 % and 99 %
    quantiles), ``bounds`` (0.5 % and 99.5 % of the data's own), and ``published``: mean and sd that a paper reports.
    """
    from moalign.preflight.inputs import must_be_fetched

    # What a base or data that is not here would be is not known, and neither is the task's folder.
    if not any((results / "tasks").glob(f"{card.name}-*/*.json")) or must_be_fetched(card):
        return []
    try:
        folder = make_task(card, results).folder
    except RequestError:
        return []
    rows = []
    for name, before in FILES.items():
        if (folder / name).is_file():
            fitted = Normaliser.from_json(folder / name)
            rows += [_row(fitted, at, before, card) for at in range(len(fitted.names))]
    return rows


def _row(fitted: Normaliser, at: int, before: str, card: TaskCard) -> dict[str, Any]:
    fields = {"mean": "mean", "sd": "sd", "low": "lo", "high": "hi", "bounds": "bounds"}
    name = fitted.names[at]
    paper = None if before else card.published.get(name)
    return {
        "objective": before + name,
        "count": fitted.count,
        **{key: getattr(fitted, field)[at] for key, field in fields.items()},
        "published": None if paper is None else paper.model_dump(),
    }

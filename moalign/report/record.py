"""The record of a comparison, as ``compare.json`` holds it; :mod:`moalign.comparison.result` says what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
"""The whole record, or a part of it: a row for each method, a pair, a point."""


def judged(record: Row) -> list[Row]:
    """Return the rows of methods of which a run finished, best first."""
    return [row for row in record["rows"] if row["status"] != "failed"]


def optimum_on_grid(record: Row) -> float | None:
    """Return the optimum's hypervolume; None where it is not known, or not that of the comparison's preferences.

    Where every method answered preferences of its own, the record's optimum is that for the first one's.
    """
    on_grid = any(not row["own_preferences"] for row in judged(record))
    return float(record["optimum"]["hypervolume"]) if record["optimum"] and on_grid else None


def machine(origin: Row) -> str | None:
    """Return the GPUs of a captured environment, or else its CPU; None where neither is known."""
    return ", ".join(origin.get("gpus") or []) or origin.get("cpu")


def machines(record: Row) -> list[str]:
    """Return the different machines that a comparison's runs were trained on, as far as they are known.

    >>> machines({"rows": [{"runs": [{"made": {"cpu": "C", "gpus": ["G"]}}, {"made": {"cpu": "C"}}, {"made": None}]}]})
    ['G', 'C']
    """
    names = [machine(run["made"] or {}) for row in record["rows"] for run in row["runs"]]
    return list(dict.fromkeys(filter(None, names)))

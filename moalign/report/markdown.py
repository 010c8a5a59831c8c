"""The comparison as a Markdown page: verdict, tables, figures, and the commands that reproduce it."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from moalign.report import tables
from moalign.report.record import Row, optimum_on_grid
from moalign.report.templates import render

_RANKING = (
    "rank name hypervolume interval share seeds iqm tau inner_product utility regret igd_plus spacing worst_group"
)
_COST = f"rank label {tables.COST} answering_rewards collapsed length distinct kl share_at_kl"
_FIGURES = {
    "believed": "Believed and true rewards, and both over KL to base",
    "utility": "What each preference gets: utility of the policy asked for it",
    "kl": "What each method reaches at its KL to base (and, where it is known, the most that any policy can)",
    "cost": "Hypervolume against cost",
    "curves": "Learning curves",
}


def page(record: Row, folder: Path) -> str:
    """Return the page; its links are relative to ``folder``, where it will be written."""
    return render(
        "compare.md",
        {
            **tables.of_comparison(record, _RANKING, _COST),
            "pairs": tables.leads(record),
            "differences": tables.differences(record),
            "record": record,
            "optimum": optimum_on_grid(record),
            "legend": tables.legend(record["rows"]),
            "link": lambda path: quote(Path(os.path.relpath(path, folder)).as_posix()),
            "figures": [(_FIGURES[name], path) for name, path in record["figures"].items() if name in _FIGURES],
            "failures": [(row["label"], run) for row in record["rows"] for run in row["runs"] if run["error"]],
        },
    )

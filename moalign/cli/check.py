"""``moalign check``: preflight of a recipe or a task card, every problem at once."""

from __future__ import annotations

from typing import Annotated

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, Results, Settings
from moalign.core.errors import RequestError


def check(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|CARD",
            help="Recipe file, or task/method as moalign ls recipes names it; a task's name, card file or folder.",
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="24GB", help="Memory of a card: say which settings make the recipe fit it, or why none does."
        ),
    ] = None,
    set_: Settings = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Check a recipe or a task card before training.

    Settings, card, model, data, splits, objectives and memory: every problem at once, and nothing is written. A card is
    checked with the recipes beside it.
    """
    from moalign.preflight import check as workflow

    with output.working():
        report = workflow.check(recipe, tuple(set_ or ()), results, gpu)
    if as_json:
        output.as_json(report.as_dict())
    else:
        output.pairs(report.checked)
        for text in report.notes:
            output.note(f"note: {text}")
    if report.problems:
        raise RequestError(*report.problems)
    if not as_json:
        output.line()
        output.line(f"{report.recipe}: nothing wrong")

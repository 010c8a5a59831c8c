"""``moalign export``: a finished run's policy for one preference, for use without moalign."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, Results


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder or identifier.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must be new or empty.")],
    prefs: Annotated[str | None, typer.Option(metavar="W1,W2[,..]", help="The preference to export.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="A whole model with the adapter folded in, instead of a peft adapter.")
    ] = False,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Write a plain peft adapter or merged model, or a mixture of experts with a script, for use without moalign."""
    from dataclasses import asdict

    from moalign import api
    from moalign.core import preferences
    from moalign.experiment import export as workflow

    workflow.check_free(out)
    handle = api.load(run, results=results)
    with output.working() as progress:
        method, context = handle.open(progress)
        preference = preferences.required(prefs, context.task.names)
        exported = workflow.export(method, context, preference, out, merged, progress)
    if as_json:
        output.as_json({"out": str(out), **asdict(exported)})
        return
    kinds = {"adapter": "peft adapter", "model": "merged model", "mixture": "experts and a script, answer.py,"}
    output.line(f"{exported.method} at {preferences.label(preference)}: {kinds[exported.kind]} in {out}")
    output.pairs(
        [("base", exported.base), ("prompt", repr(exported.prompt)), ("how to ask it", str(out / "README.md"))]
    )

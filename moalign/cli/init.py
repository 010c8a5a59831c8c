"""``moalign init``: a task card and a scorer file of one's own that train as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moalign.cli import output
from moalign.cli.options import Json


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where to write; it must be new or empty.  [default: my-task]")
    ] = Path("my-task"),
    model: Annotated[
        str | None,
        typer.Option(metavar="M", help="Model folder, hub id or built-in name.  [default: smollm2-135m-instruct]"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts: .jsonl, .csv or .parquet with a column prompt; else examples."),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(metavar="A,B[,..]", help="Rules by name, or names of your own.  [default: brevity,variety]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a task card, a scorer file and a recipe of your own that train as they are.

    Nothing is overwritten.
    """
    from dataclasses import asdict

    from moalign.experiment import init as workflow

    started = workflow.init(folder, model, data, objectives)
    if as_json:
        output.as_json(asdict(started))
        return
    output.line(f"{started.folder}: a task with {started.prompts} prompts, ready to train")
    output.pairs(
        [
            ("task", started.task),
            ("model", started.model),
            ("objectives", ", ".join(started.objectives)),
            *(("" if number else "files", name) for number, name in enumerate(started.files)),
        ]
    )
    for text in started.notes:
        output.note(f"note: {text}")
    output.line()
    where = workflow.task_option(started.folder)
    output.next_commands(
        output.command("check", where),
        output.command("preview", "--task", where),
        output.command("train", "mo-odpo", "--task", where),
    )

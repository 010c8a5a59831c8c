"""``moalign model``: model folders made usable."""

from __future__ import annotations

from typing import Annotated

import typer

from moalign.cli import output
from moalign.cli.options import Json
from moalign.report.units import memory

app = typer.Typer(
    name="model",
    help="Model folders: pickled weights converted to safetensors.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


@app.callback()
def _verbs() -> None:
    """Keep ``convert`` a word of its own: typer would leave out the name of an only command."""


@app.command("convert")
def convert(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Model folder with pytorch_model.bin.")],
    as_json: Json = False,
) -> None:
    """Convert a folder's pickled weights to safetensors in the cache, once; no code in them is run.

    torch reads them, weights only, in a process that is refused any network. Afterwards the folder is used by its name,
    as if its weights were safetensors.
    """
    from dataclasses import asdict

    from moalign.lm import conversion

    made = conversion.convert(folder)
    if as_json:
        output.as_json(asdict(made))
        return
    output.line(f"{made.folder}: {'found converted' if made.reused else 'converted'}")
    output.pairs([("weights", f"{made.tensors} tensors, {memory(made.bytes)}"), ("kept in", made.converted)])
    output.line("name the folder as before: model: FOLDER in a card, --set task.model=FOLDER, --model FOLDER")

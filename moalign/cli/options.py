"""Options that several verbs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_RESULTS = Path("results")

Task = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Task name, card file or its folder.  [default: sandbox]")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")
]
CardSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="task.KEY=VALUE", help="Change one setting of the card; repeatable."),
]


def folder(text: str) -> Path:
    """Parse the name of a folder; an empty one is refused, and one that this locale cannot name."""
    if not str(text):
        raise typer.BadParameter("empty; the name of a folder is needed")
    if any("\ud800" <= letter <= "\udfff" for letter in str(text)):  # what writes tensors and tables takes UTF-8 alone
        raise typer.BadParameter(f"{text}: not text in this locale; set PYTHONUTF8=1, or name another folder")
    return Path(os.path.expanduser(text))  # a shell leaves --results=~/x as it is


Results = Annotated[Path, typer.Option(metavar="DIR", parser=folder, help="Where runs are kept.")]
Samples = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Answers to each prompt: more of them, less noise.  [default: the card's]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

PrefsText = Annotated[
    list[str] | None,
    typer.Option(
        "--prefs-text",
        metavar="TEXT",
        help='A preference in words, like "helpful and funny": equal weights; repeatable.',
    ),
]


def preferences_of(prefs: list[str] | None, texts: list[str] | None) -> list[str]:
    """Return the preferences of ``--prefs`` and ``--prefs-text`` together."""
    from moalign.core.preferences import Words

    return [*(prefs or ()), *map(Words, texts or ())]

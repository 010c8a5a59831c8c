"""``moalign generate``: answers of a finished run, or of the best of a comparison, at one or several preferences."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, PrefsText, Results, preferences_of
from moalign.core.errors import RequestError
from moalign.core.text import PROSE
from moalign.report.units import number

if TYPE_CHECKING:
    from moalign.experiment.generate import Answer
    from moalign.experiment.handle import RunHandle


def generate(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Run folder or identifier, or a comparison's folder: its best trained run."),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="[PROMPT|-]", help="A prompt; - reads stdin, one a line; none: prompts of the task."),
    ] = None,
    prefs: Annotated[
        list[str] | None, typer.Option(metavar="W1,W2[,..]", help="The preference to answer for; repeatable.")
    ] = None,
    prefs_text: PrefsText = None,
    user: Annotated[
        Path | None,
        typer.Option(
            metavar="PAIRS.jsonl",
            help="Pairs that a user labelled (prompt, chosen, rejected), to read the preference off.",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="T", help="Sampling temperature; else the card's.  0: greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed of sampling.")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Answer prompts with a finished run at one preference, or at several, side by side.

    With ``--user`` the preference is the one that a user's labelled pairs show, by methods that can read it off them:
    the run answers as if it had been named, and stderr says which one it is. A few pairs say little: with none of them
    all users are alike.

    Of a prompt that is longer than the task's limit its end is read, and stderr says so.

    With ``--json`` and one preference: ``run``, ``prefs``, ``objectives``, ``answers``; with several ``prefs`` is a
    list of them and ``answers`` a list for each.
    """
    from moalign import api
    from moalign.core.preferences import typed

    prompts, prefs = _prompts(prompt), preferences_of(prefs, prefs_text)
    if user is not None and prefs:
        raise RequestError("--user and --prefs exclude each other: show a preference by a user's pairs, or name it")
    with output.working() as progress:
        handle = _run(run, prefs, results)
        if user is not None:
            inferred = handle.infer(user, progress)
            output.note(f"{user}: read as --prefs {typed(inferred)}")
            prefs = [",".join(map(str, inferred))]
        answers = api.generate(
            handle, prefs or (), prompts, temperature=temperature, seed=seed, results=results, progress=progress
        )
    blocks = _blocks(answers)
    _note_cut(blocks[0])
    if as_json:
        output.as_json(_content(handle, blocks))
    elif len(blocks) == 1 and prompts is not None:
        for answer in answers:
            output.line(answer.response, PROSE)
    else:
        _show(handle, blocks)


def _note_cut(answers: list[Answer]) -> None:
    """Say which prompts were too long to be read whole."""
    for place, answer in enumerate(answers, start=1):
        if answer.cut_tokens:
            limit = "generation.max_prompt_tokens of the task"
            output.note(f"note: prompt {place}: its first {answer.cut_tokens:,} tokens were not read: over {limit}")


def _content(handle: RunHandle, blocks: list[list[Answer]]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    requested = [list(block[0].preference) for block in blocks]
    rows = [[answer.as_dict() for answer in block] for block in blocks]
    single = len(blocks) == 1
    return {
        "run": str(handle.path),
        "prefs": requested[0] if single else requested,
        "objectives": list(handle.objectives),
        "answers": rows[0] if single else rows,
    }


def _run(name: str, prefs: list[str] | None, results: Path) -> RunHandle:
    """Return the run that RUN names; of a comparison the best one that answers for the preferences."""
    from moalign import api

    place = Path(name)
    file = place / "compare.json" if place.is_dir() else place
    if file.name != "compare.json" or not file.is_file():
        return api.load(name, results=results)
    best = api.best(file, prefs or (), results=results)
    output.note(f"{file}: asking {best.run.record.method}, rank {best.rank} of {best.entries}: {best.run.path}")
    return best.run


def _blocks(answers: list[Answer]) -> list[list[Answer]]:
    """Return the answers by preference, in their order."""
    return [list(block) for _, block in itertools.groupby(answers, key=lambda answer: answer.preference)]


def _prompts(prompt: str | None) -> list[str] | None:
    """Return the prompts given, None for the task's own; ``-`` reads stdin, one a line."""
    if prompt != "-":
        return None if prompt is None else [prompt]
    lines: list[str] = []
    try:
        lines.extend(line.rstrip("\r\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise RequestError(f"PROMPT -: stdin is not UTF-8 text after line {len(lines)} ({error.reason})") from error
    if lines:
        lines[0] = lines[0].removeprefix("\ufeff")  # a mark of some editors; in a data file it is no text either
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise RequestError("PROMPT -: stdin holds no prompt; give one a line")
    return prompts


def _show(handle: RunHandle, blocks: list[list[Answer]]) -> None:
    """Print each prompt with a block for each preference: answer, the words it was asked for in, scores."""
    from moalign.core.preferences import label

    if len(blocks) > 1:
        output.line(f"{handle.record.method} on {handle.record.task}: {handle.path}")
        output.line()
    labels = [label(block[0].preference) for block in blocks]
    width = max(10, *map(len, labels))
    for row in zip(*blocks, strict=True):
        _field("prompt", row[0].prompt, width)
        for answer, name in zip(row, labels, strict=True):
            _field(name, answer.response, width)
            if answer.words:
                _field("asked", answer.words, width)
            scores = [
                f"{objective} {number(value)} (raw {number(answer.raw[objective])})"
                for objective, value in answer.normalised.items()
            ]
            _field("scores", ", ".join(scores), width)
            output.line()


def _field(name: str, text: str, width: int) -> None:
    """Print a text behind its name; its further lines are indented, so that none looks like another field."""
    output.line(f"{name:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2)), PROSE)

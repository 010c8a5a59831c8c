"""``moalign generate``: answers of a finished run, or of the best of a comparison, at one or several preferences."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moalign.cli import output
from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.core.preferences import Preference
    from moalign.experiment.generate import Answer
    from moalign.runs.run import Run


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
    temperature: Annotated[
        float | None, typer.Option(min=0, metavar="T", help="Sampling temperature; else the card's.  0: greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed of sampling.")] = None,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept.")] = output.DEFAULT_RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Answer prompts with a finished run at one preference, or at several, side by side.

    With ``--json`` and one preference: ``run``, ``prefs``, ``objectives``, ``answers``; with several ``prefs`` is a
    list of them and ``answers`` a list for each.
    """
    from moalign.experiment import finished
    from moalign.experiment import generate as workflow

    prompts = _prompts(prompt)
    with output.working() as say:
        found, wanted = _found(run, prefs, results)
        method, context = finished.opened(found, results, say)
        names = context.task.names
        wanted = wanted or _wanted(prefs, names)
        answers = workflow.generate(method, context, wanted, prompts, temperature, seed, say)
    if as_json:
        told = [[answer.told() for answer in some] for some in answers]
        one = len(wanted) == 1
        output.as_json(
            {
                "run": str(found.path),
                "prefs": list(wanted[0]) if one else [list(w) for w in wanted],
                "objectives": names,
                "answers": told[0] if one else told,
            }
        )
        return
    if len(wanted) == 1 and prompts is not None:
        for answer in answers[0]:
            output.say(answer.response)
        return
    if len(wanted) > 1:
        output.say(f"{method.name} on {context.task.card.name}: {found.path}")
        output.say()
    _show(answers, wanted)


def _found(name: str, prefs: list[str] | None, results: Path) -> tuple[Run, list[Preference]]:
    """Return the run that RUN names; of a comparison its best one, and the preferences that it was chosen for."""
    from moalign.experiment import finished

    place = Path(name)
    file = place / "compare.json" if place.is_dir() else place
    if file.name != "compare.json" or not file.is_file():
        return finished.find([name], results)[0], []
    told = finished.read_comparison(file)
    wanted = _wanted(prefs, told["objectives"])
    run, rank = finished.best_of(file, told, wanted, results)
    output.note(f"{file}: asking {run.record.method}, rank {rank} of {len(told['rows'])}: {run.path}")
    return run, wanted


def _wanted(prefs: list[str] | None, names: list[str]) -> list[Preference]:
    """Return the preferences asked for, each once."""
    from moalign.core import preferences

    texts: list[str | None] = [*prefs] if prefs else [None]
    return list(dict.fromkeys(preferences.required(text, names) for text in texts))


def _prompts(prompt: str | None) -> list[str] | None:
    """Return the prompts given, None for the task's own; ``-`` reads stdin, one a line."""
    if prompt != "-":
        return None if prompt is None else [prompt]
    lines = [line.rstrip("\r\n") for line in sys.stdin]
    found = [line for line in lines if line.strip()]
    if not found:
        raise RequestError("PROMPT -: stdin holds no prompt; give one a line")
    return found


def _show(answers: list[list[Answer]], preferences: list[Preference]) -> None:
    """Print each prompt with a block for each preference: answer, the words it was asked for in, scores."""
    from moalign.core.preferences import label

    labels = [label(preference) for preference in preferences]
    width = max(10, *map(len, labels))
    for row in zip(*answers, strict=True):
        output.say(f"{'prompt':<{width}}  {row[0].prompt}")
        for answer, name in zip(row, labels, strict=True):
            output.say(f"{name:<{width}}  {answer.response}")
            if answer.words:
                output.say(f"{'asked':<{width}}  {answer.words}")
            scores = [
                f"{objective} {output.number(value)} (raw {output.number(answer.raw[objective])})"
                for objective, value in answer.normalised.items()
            ]
            output.say(f"{'scores':<{width}}  {', '.join(scores)}")
            output.say()

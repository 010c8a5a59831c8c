"""``moalign compare``: train what is missing, put every method before the same judge, and say which wins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, Results, Samples, Settings, Task
from moalign.core.errors import RequestError


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Evaluated runs to compare; none: those of the task's suite."),
    ] = None,
    task: Task = None,
    methods: Annotated[str | None, typer.Option(metavar="A,B,..", help="Methods; else the task's suite.")] = None,
    suite: Annotated[str, typer.Option(metavar="full|quick", help="Which suite, where no methods are named.")] = "full",
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Train every method with N seeds.")] = None,
    grid: Annotated[int | None, typer.Option(metavar="N", help="Compare on an even grid of N preferences.")] = None,
    samples: Samples = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs trained at a time.  [default: 1; tiny models: 1 per CPU]"),
    ] = None,
    executor: Annotated[
        str, typer.Option(metavar="local|ray", help="Train on this machine, or as tasks of a ray cluster.")
    ] = "local",
    set_: Settings = None,
    results: Results = DEFAULT_RESULTS,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as Markdown.")] = None,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the fronts.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write one page that opens offline, with every answer.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare methods under equal conditions.

    Trains what is missing; one task card, one judge, differences paired over prompts.
    """
    from moalign import api

    if runs:
        _note_unused({"--jobs": jobs, "--executor": None if executor == "local" else executor})
    with output.working() as progress:
        comparison = api.compare(
            runs or task,
            _names(methods),
            1 if seeds is None else seeds,
            suite=suite,
            task=task,
            grid=grid,
            samples=samples,
            jobs=jobs,
            executor=executor,
            settings=set_,
            results=results,
            figure=figure,
            markdown=markdown,
            html=html,
            progress=progress,
        )
    output.traces(comparison.traces)
    if as_json:
        output.as_json(comparison.content)
    else:
        _show(comparison.content, results)
    if comparison.failed:
        output.errors([f"{entry.label} failed: {entry.error}" for entry in comparison.entries if entry.error])
        raise typer.Exit(1)


def _note_unused(given: Mapping[str, object]) -> None:
    """Say which options of training were given for nothing."""
    for option, value in given.items():
        if value is not None:
            output.note(f"note: {option} {value}: finished runs are named, so nothing is trained; it changes nothing")


def _show(content: Mapping[str, Any], results: Path) -> None:
    """Print the comparison, and what to type next with the leading run filled in."""
    from moalign.core.preferences import served_example
    from moalign.report.record import judged
    from moalign.report.terminal import print_comparison

    print_comparison(output.console(), content)
    ranked = judged(content)
    done = [(row, run["run"]) for row in ranked for run in row["runs"] if run["status"] == "done"]
    if not done:
        return
    leader, run = done[0]
    shown = served_example([point["prefs"] for point in leader["points"]], len(content["objectives"]))
    commands = [
        output.command("generate", run, "--prefs", shown),
        output.command("eval", run, "--hypervolume"),
        output.command("show", run),
    ]
    if content["task"] == "sandbox":
        seeds = max(3, 1 + max(len(row["seeds"]) for row in ranked))
        commands.append(output.command("compare", "--task", "sandbox", "--seeds", str(seeds), results=results))
        commands.append(output.command("compare", "--task", "sandbox-cold", results=results))
    output.next_commands(*commands)


def _names(text: str | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RequestError(f"--methods {text}: an empty name; give names separated by commas, like sft,ric")
    return tuple(dict.fromkeys(names))

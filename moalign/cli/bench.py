"""``moalign bench``: throughput and peak memory of methods on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moalign.cli import output


def bench(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD]...", help="What to measure; none: the methods of the task's suite that train."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Task name or card file.  [default: sandbox]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, as in compare; repeatable."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Steps of every stage of training.  [default: 8]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure throughput and peak memory on this machine.

    Each method trains for a few steps with its recipe's batch and lengths, in a process of its own; nothing is kept.
    """
    from moalign.comparison import bench as workflow

    request = workflow.BenchRequest(
        methods=tuple(dict.fromkeys(methods or ())),
        task=task,
        overrides=tuple(set_ or ()),
        steps=workflow.STEPS if steps is None else steps,
    )
    try:
        with output.working() as progress:
            result = workflow.bench(request, progress)
    except KeyboardInterrupt:
        output.note("interrupted; a bench keeps nothing")
        raise typer.Exit(130) from None
    if output.debug:
        for trace in result.traces:
            output.note(trace)
    if as_json:
        output.as_json(result.content)
    else:
        _show(result.content)
    if result.failed:
        raise typer.Exit(1)


COLUMNS = ("method", "s/step", "generated/s", "trained/s", "scored/s", "host peak", "GPU peak", "start")


def _show(content: dict[str, Any]) -> None:
    machine = content["machine"]
    output.pairs(
        [
            ("task", f"{content['task']}, {content['steps']} steps of every stage"),
            ("CPU", f"{machine['cpu'] or 'unknown'}; cores: {machine['cpus']}, threads of torch: {machine['threads']}"),
            ("GPU", ", ".join(machine["gpus"]) or "none"),
            ("torch", str(machine["torch"])),
        ]
    )
    output.line()
    table = output.table(*COLUMNS, right=COLUMNS[1:])
    for row in content["rows"]:
        if row["status"] == "failed":
            table.add_row(f"{row['method']} (failed)", *[output.number(None)] * (len(COLUMNS) - 1))
            continue
        rates = ("tokens_generated_per_second", "tokens_trained_per_second", "responses_scored_per_second")
        table.add_row(
            row["method"],
            _seconds(row),
            *(output.count(row[rate]) for rate in rates),
            output.memory(row["peak_host_bytes"]),
            output.memory(row["peak_gpu_bytes"]),
            output.duration(row["start_seconds"]),
        )
    output.show(table)
    output.line(
        "s/step: median seconds of an update, sampling and scoring included where they belong to it; generated and"
    )
    output.line("trained: tokens; scored: responses; start: seconds until imports, base and normaliser were there.")
    for row in content["rows"]:
        if row["error"]:
            output.line(f"{row['method']} failed: {row['error']}")
        elif not row["steps_measured"]:
            output.line(f"{row['method']}: no update step to measure; it trains nothing (steps: 0?)")


def _seconds(row: dict[str, Any]) -> str:
    """Return the seconds of a step; of each stage where there are several."""
    stages = row["stages"]
    if len(stages) < 2:
        return output.number(row["seconds_per_step"])
    return ", ".join(f"{name} {output.number(seconds)}" for name, seconds in stages.items())

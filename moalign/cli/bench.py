"""``moalign bench``: throughput and peak memory of methods on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import Json, Task
from moalign.report.record import Row
from moalign.report.tables import Column
from moalign.report.units import count, duration, memory, number


def bench(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD]...", help="What to measure; none: the methods of the task's suite that train."
        ),
    ] = None,
    task: Task = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, as in compare; repeatable."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Steps of every stage of training.  [default: 8]")
    ] = None,
    as_json: Json = False,
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
    except KeyboardInterrupt as stop:
        from moalign.cli.main import how_it_stopped

        how, code = how_it_stopped(stop)
        output.note(f"{how}; a bench keeps nothing")
        raise typer.Exit(code) from None
    output.traces(result.traces)
    if as_json:
        output.as_json(result.content)
    else:
        _show(result.content)
    if result.failed:
        output.errors([f"{row.method} failed: {row.error}" for row in result.rows if row.status == "failed"])
        raise typer.Exit(1)


def _seconds(row: Row) -> str | None:
    """Return the seconds of a step; of each stage where there are several."""
    stages: dict[str, float] = row.get("stages") or {}
    if len(stages) < 2:
        return None if row["status"] == "failed" else number(row["seconds_per_step"])
    return ", ".join(f"{name} {number(seconds)}" for name, seconds in stages.items())


def _name(row: Row) -> str:
    return f"{row['method']}{' (failed)' if row['status'] == 'failed' else ''}"


COLUMNS = (
    Column("method", _name, left=True),
    Column("s/step", _seconds),
    Column("generated/s", "tokens_generated_per_second", count),
    Column("trained/s", "tokens_trained_per_second", count),
    Column("scored/s", "responses_scored_per_second", count),
    Column("host peak", "peak_host_bytes", memory),
    Column("GPU peak", "peak_gpu_bytes", memory),
    Column("start", "start_seconds", duration),
)


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
    output.table(COLUMNS, content["rows"])
    output.line(
        "s/step: median seconds of an update, sampling and scoring included where they belong to it; generated and"
    )
    output.line("trained: tokens; scored: responses; start: seconds until imports, base and normaliser were there.")
    for row in content["rows"]:
        if row["status"] == "done" and not row["steps_measured"]:
            output.line(f"{row['method']}: no update step to measure; it trains nothing (steps: 0?)")

"""``moalign eval``: points, hypervolume and indicators of finished runs; with ``--points`` a plain calculator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, PrefsText, Results, Samples, preferences_of
from moalign.cli.outcome import show_points, show_summary
from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.evaluation.curve import Curve
    from moalign.evaluation.result import EvalResult
    from moalign.experiment.handle import RunHandle


def evaluate(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Run folder or identifier; none: the run that finished last."),
    ] = None,
    hypervolume: Annotated[
        bool, typer.Option("--hypervolume", help="Show the hypervolume only (--json always tells everything).")
    ] = False,
    prefs: Annotated[
        list[str] | None,
        typer.Option(metavar="W1,W2[,..]", help="Evaluate this preference instead of the task's grid; repeatable."),
    ] = None,
    prefs_text: PrefsText = None,
    grid: Annotated[int | None, typer.Option(metavar="N", help="Evaluate an even grid of N preferences.")] = None,
    samples: Samples = None,
    snapshots: Annotated[
        bool, typer.Option("--snapshots", help="Judge the snapshots kept in training: what was gained, and is it true.")
    ] = False,
    points: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Calculate from a table of reward vectors; its header names objectives."),
    ] = None,
    ref: Annotated[
        str | None,
        typer.Option(metavar="R1,R2[,..]", help="Reference point (for runs in normalised units; else the card's)."),
    ] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="With --points: smaller is better.")] = False,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Evaluate finished runs, or calculate from a table of points."""
    prefs = preferences_of(prefs, prefs_text)
    if snapshots:
        refused = {"--points": points, "--ref": ref, "--minimise": minimise, "--hypervolume": hypervolume}
        _refuse_with_snapshots(refused)
        _curves(runs or [], prefs, grid, samples, results, as_json)
        return
    if points is not None:
        _refuse_with_points(runs, grid, samples)
        calculated = _calculate(points, ref, minimise, prefs or [])
        if as_json:
            output.as_json(calculated)
        else:
            _show_calculated(calculated)
        return
    if minimise:
        raise RequestError("--minimise belongs to --points: the objectives of a run's task know their direction")
    evaluations = _evaluate(runs or [], prefs, grid, samples, ref, results)
    if as_json:
        contents = [evaluation.content for evaluation in evaluations]
        output.as_json(contents[0] if len(contents) == 1 else {"runs": contents})
        return
    for evaluation in evaluations:
        output.line(f"{evaluation.method} on {evaluation.task}, seed {evaluation.seed}: {evaluation.run}")
        if not hypervolume:
            show_points(evaluation)
        show_summary(evaluation, short=hypervolume)
        if len(evaluations) > 1:
            output.line()


def _evaluate(
    names: list[str], prefs: list[str] | None, grid: int | None, samples: int | None, ref: str | None, results: Path
) -> list[EvalResult]:
    from moalign import api
    from moalign.experiment.arguments import refuse_both

    refuse_both(prefs, grid)
    runs: list[str] | list[RunHandle] = names
    if not names:
        runs = [api.load(results=results)]
        output.note(f"evaluating the run that finished last: {runs[0].path}")
    with output.working() as progress:
        return api.evaluate_all(
            runs, prefs=prefs, grid=grid, samples=samples, reference_point=ref, results=results, progress=progress
        )


# -- snapshots -----------------------------------------------------------------------------------------------------


def _refuse_with_snapshots(given: Mapping[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise RequestError(f"--snapshots and {option} exclude each other; found both")


def _curves(
    names: list[str], prefs: list[str], grid: int | None, samples: int | None, results: Path, as_json: bool
) -> None:
    from moalign import api

    with output.working() as progress:
        runs = [api.load(name, results=results) for name in names] or [api.load(results=results)]
        curves = [
            api.curve(run, prefs=prefs, grid=grid, samples=samples, results=results, progress=progress) for run in runs
        ]
    if as_json:
        contents = [curve.content for curve in curves]
        output.as_json(contents[0] if len(contents) == 1 else {"runs": contents})
        return
    for curve in curves:
        output.line(f"{curve.method} on {curve.task}, seed {curve.seed}: {curve.run}")
        _show_curve(curve)


def _show_curve(curve: Curve) -> None:
    """Print a row for each snapshot, and where the truth is best."""
    from moalign.report.units import number, percent

    rows = []
    for row in curve.rows:
        cells = {"part": row.part, "step": str(row.step), "share": percent(row.share), "KL": number(row.kl, 2)}
        for name, reward in (("true", row.true), ("believed", row.believed)):
            if reward is not None:
                cells[f"w·n\n{name}"] = number(reward.inner_product)
                cells[f"hypervolume\n{name}"] = number(reward.hypervolume)
        if row.spread is not None:
            cells["spread"] = number(row.spread)
        rows.append({**cells, "collapsed": percent(row.collapse_rate, 1)})
    output.table([*output.columns("part", left=True), *output.columns(*list(rows[0])[1:])], rows)
    names = {"inner_product": "w·n", "hypervolume": "hypervolume"}
    output.pairs(
        [
            (
                f"truth best by {names[name]}",
                f"{number(best.value)} at step {best.step} of {best.part}, KL {number(best.kl, 2)} nats; the finished "
                f"policy has {number(best.lost)} less",
            )
            for name, best in curve.best.items()
        ]
    )
    output.line()


# -- the calculator ------------------------------------------------------------------------------------------------


def _refuse_with_points(runs: list[str] | None, grid: int | None, samples: int | None) -> None:
    if runs:
        raise RequestError(f"--points and RUN exclude each other; found both (RUN {' '.join(runs)})")
    if grid is not None:
        raise RequestError("--grid is for runs; with --points name the vectors with --prefs")
    if samples is not None:
        raise RequestError("--samples is for runs; a table of points has no prompts to answer")


def _calculate(path: Path, ref: str | None, minimise: bool, prefs: list[str]) -> dict[str, Any]:
    from moalign.pareto import points

    corner = None if ref is None else points.parse_ref(ref)
    return points.calculate(path, corner, minimise, prefs, notify=output.warn)


def _show_calculated(content: Mapping[str, Any]) -> None:
    corner = zip(content["objectives"], content["ref"], strict=True)
    rows = [
        ("hypervolume", f"{content['hypervolume']:.10g}"),
        ("reference", ", ".join(f"{name} {value:g}" for name, value in corner)),
        ("points", str(content["points"])),
        ("front", str(content["front"])),
    ]
    if "expected_utility" in content:
        rows.append(("expected utility", f"{content['expected_utility']:.10g}"))
    output.pairs(rows)

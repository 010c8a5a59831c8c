"""``moalign eval``: points, hypervolume and indicators of finished runs; with ``--points`` a plain calculator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.core.preferences import Preference
    from moalign.training.job import RunContext


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
    grid: Annotated[int | None, typer.Option(metavar="N", help="Evaluate an even grid of N preferences.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Answers to each prompt: more of them, less noise.  [default: the card's]"
        ),
    ] = None,
    points: Annotated[
        Path | None,
        typer.Option(metavar="FILE.csv", help="Calculate from a table of reward vectors; its header names objectives."),
    ] = None,
    ref: Annotated[
        str | None,
        typer.Option(metavar="R1,R2[,..]", help="Reference point (for runs in normalised units; else the card's)."),
    ] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="With --points: smaller is better.")] = False,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept.")] = output.DEFAULT_RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Evaluate finished runs, or calculate from a table of points."""
    if points is not None:
        _refuse_with_points(runs, grid, samples)
        told = _calculate(points, ref, minimise, prefs or [])
        if as_json:
            output.as_json(told)
        else:
            _show_calculated(told)
        return
    if minimise:
        raise RequestError("--minimise belongs to --points: the objectives of a run's task know their direction")
    evaluations = _evaluate(runs or [], prefs or [], grid, samples, ref, results)
    if as_json:
        output.as_json(evaluations[0] if len(evaluations) == 1 else {"runs": evaluations})
        return
    for told in evaluations:
        seed = f", seed {told['seed']}"
        output.say(f"{told['method']} on {told['task']}{seed}: {told['run']}")
        if not hypervolume:
            show_points(told)
        show_summary(told, short=hypervolume)
        if len(evaluations) > 1:
            output.say()


# -- the calculator ------------------------------------------------------------------------------------------------


def _refuse_with_points(runs: list[str] | None, grid: int | None, samples: int | None) -> None:
    if runs:
        raise RequestError(f"--points and RUN exclude each other; found both (RUN {' '.join(runs)})")
    if grid is not None:
        raise RequestError("--grid is for runs; with --points name the vectors with --prefs")
    if samples is not None:
        raise RequestError("--samples is for runs; a table of points has no prompts to answer")


def _calculate(path: Path, ref: str | None, minimise: bool, prefs: list[str]) -> dict[str, Any]:
    from moalign.core import preferences
    from moalign.pareto import points

    vectors = [preferences.parse(text, points.read_points(path)[0]) for text in prefs]
    corner = None if ref is None else points.parse_ref(ref)
    return points.calculate(path, corner, minimise, vectors, notify=output.warn)


def _show_calculated(told: dict[str, Any]) -> None:
    rows = [
        ("hypervolume", f"{told['hypervolume']:.10g}"),
        ("reference", ", ".join(f"{name} {r:g}" for name, r in zip(told["objectives"], told["ref"], strict=True))),
        ("points", str(told["points"])),
        ("front", str(told["front"])),
    ]
    if "expected_utility" in told:
        rows.append(("expected utility", f"{told['expected_utility']:.10g}"))
    output.pairs(rows)


# -- runs ----------------------------------------------------------------------------------------------------------


def _evaluate(
    names: list[str], prefs: list[str], grid: int | None, samples: int | None, ref: str | None, results: Path
) -> list[dict[str, Any]]:
    from moalign.evaluation import evaluate as workflow
    from moalign.evaluation.reference import at_reference
    from moalign.experiment import finished

    if prefs and grid is not None:
        raise RequestError("--prefs and --grid exclude each other: name the vectors, or the size of a grid")
    found = finished.find(names, results)
    if not names:
        output.note(f"evaluating the run that finished last: {found[0].path}")
    asked = []
    for run in found:  # every option is checked against every run before the first answer is generated
        method, context = finished.opened(run, results)
        wanted = workflow.preferences_for(method, context, _wanted(context, prefs, grid))
        asked.append((run, wanted, None if ref is None else _reference(ref, context.task.names)))
    evaluations = []
    with output.working() as say:
        for run, wanted, corner in asked:
            method, context = finished.opened(run, results, say)
            made = workflow.evaluate(method, context, wanted, say, samples)
            told = made.told if corner is None else at_reference(made, context.task, corner)
            evaluations.append({**told, "run": str(run.path)})  # the file may have been written from elsewhere
    return evaluations


def _wanted(context: RunContext, prefs: list[str], grid: int | None) -> list[Preference] | None:
    from moalign.core import preferences

    names = context.task.names
    if prefs:
        return list(dict.fromkeys(preferences.parse(text, names) for text in prefs))
    return None if grid is None else preferences.grid_of(len(names), grid)


def _reference(text: str, names: list[str]) -> tuple[float, ...]:
    from moalign.pareto.points import parse_ref

    corner = parse_ref(text)
    if len(corner) != len(names):
        raise RequestError(
            f"--ref {text}: found {len(corner)} number{'s' if len(corner) != 1 else ''}; the task has {len(names)} "
            f"objectives ({', '.join(names)}), so give {len(names)}, like --ref {','.join(['0'] * len(names))}"
        )
    return corner


def show_points(told: dict[str, Any]) -> None:
    """Print the table of mean rewards: one row per preference, normalised with interval and raw; * is the front."""
    from moalign.core.preferences import label

    names = told["objectives"]
    scaled = [f"{name}\nnormalised" for name in names]
    raw = [f"{name}\nraw" for name in names]
    table = output.table("preference", *scaled, *raw, right=[*scaled, *raw])
    for point in told["points"]:
        cells = [
            f"{output.number(mean)} {output.interval(bounds, 2)}"
            for mean, bounds in zip(point["mean"], point["ci"], strict=True)
        ]
        plain = [output.number(value) for value in point["raw"]]
        table.add_row(label(point["prefs"]) + (" *" if point["nondominated"] else ""), *cells, *plain)
    output.show(table)


def show_summary(told: dict[str, Any], short: bool = False) -> None:
    """Print the hypervolume with its interval, the optimal share and (unless ``short``) the indicators."""
    corner = ", ".join(f"{r:g}" for r in told["ref"])
    mark = "" if short else f" (*){_spread(told)}"
    rows = [
        (
            "hypervolume",
            f"{output.number(told['hypervolume'], 4)} {output.interval(told['hypervolume_ci'], 4)} "
            f"from reference point ({corner}), {told['front']} of {len(told['points'])} points on the front{mark}",
        )
    ]
    if told.get("optimal_share") is not None:
        share, (low, high) = output.percent(told["optimal_share"], 1), told["optimal_share_ci"]
        rows.append(
            ("optimal share", f"{share} [{100 * low:.1f}, {100 * high:.1f}] of the exact optimum's hypervolume")
        )
    rows += _generalisation_rows(told.get("generalisation") or {})
    if not short:
        indicators, quality = told["indicators"], told.get("quality", {})
        rows += [
            ("Kendall's tau", output.number(indicators["tau"], 2)),
            ("inner product", output.number(indicators["inner_product"])),
            ("expected utility", output.number(indicators["expected_utility"])),
        ]
        if "rate" in quality:
            rows.append(("collapse rate", output.percent(quality["rate"], 1)))
        if quality.get("kl") is not None:
            rows.append(("KL to base", _moved(told)))
        if told.get("overlong"):
            rows.append(("prompts", output.overlong(told["overlong"])))
    output.pairs(rows)


def _spread(told: dict[str, Any]) -> str:
    """Return how evenly the front is spread, where it has two points and the evaluation says so."""
    spacing = told["indicators"].get("spacing")
    return "" if spacing is None or told["front"] < 2 else f", spacing {output.number(spacing)}"


def _moved(told: dict[str, Any]) -> str:
    """Return the mean KL to base and, where preferences differ, its range over them."""
    each = [point["kl"] for point in told["points"]]
    low, high = output.number(min(each), 2), output.number(max(each), 2)
    spread = f", {low} to {high} over the preferences" if low != high else ""
    return f"{output.nats(told['quality'])} nats per response{spread}"


def _generalisation_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a row for the preferences that were trained on and one for those that were held out."""
    rows = []
    for side, name in (("trained", "trained on"), ("held_out", "held out")):
        part = told.get(side)
        if part is None:
            continue
        found = f"{len(part['prefs'])} preferences: hypervolume {output.number(part['hypervolume'], 4)}"
        if part["optimal_share"] is not None:
            share, (low, high) = output.percent(part["optimal_share"], 1), part["optimal_share_ci"]
            found += f", {share} [{100 * low:.1f}, {100 * high:.1f}] of the optimum's"
        if part.get("utility_share") is not None:
            found += f"; utility {output.percent(part['utility_share'], 1)} of the optimum's"
        rows.append((name, found))
    return rows

"""``moalign eval``: points, hypervolume and indicators of finished runs; with ``--points`` a plain calculator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.core.errors import RequestError

if TYPE_CHECKING:
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
            show_points(evaluation.content)
        show_summary(evaluation.content, short=hypervolume)
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


def _show_calculated(content: Mapping[str, Any]) -> None:
    rows = [
        ("hypervolume", f"{content['hypervolume']:.10g}"),
        (
            "reference",
            ", ".join(f"{name} {r:g}" for name, r in zip(content["objectives"], content["ref"], strict=True)),
        ),
        ("points", str(content["points"])),
        ("front", str(content["front"])),
    ]
    if "expected_utility" in content:
        rows.append(("expected utility", f"{content['expected_utility']:.10g}"))
    output.pairs(rows)


# -- what is shown of a run ----------------------------------------------------------------------------------------


def show_points(content: Mapping[str, Any]) -> None:
    """Print the table of mean rewards: one row per preference, normalised with interval and raw; * is the front."""
    from moalign.core.preferences import label

    names = content["objectives"]
    scaled = [f"{name}\nnormalised" for name in names]
    raw = [f"{name}\nraw" for name in names]
    table = output.table("preference", *scaled, *raw, right=[*scaled, *raw])
    for point in content["points"]:
        cells = [
            f"{output.number(mean)} {output.interval(bounds, 2)}"
            for mean, bounds in zip(point["mean"], point["ci"], strict=True)
        ]
        plain = [output.number(value) for value in point["raw"]]
        table.add_row(label(point["prefs"]) + (" *" if point["nondominated"] else ""), *cells, *plain)
    output.show(table)


def show_summary(content: Mapping[str, Any], short: bool = False) -> None:
    """Print the hypervolume with its interval, the optimal share and (unless ``short``) the indicators."""
    corner = ", ".join(f"{r:g}" for r in content["ref"])
    mark = "" if short else f" (*){_spread(content)}"
    rows = [
        (
            "hypervolume",
            f"{output.number(content['hypervolume'], 4)} {output.interval(content['hypervolume_ci'], 4)} "
            f"from reference point ({corner}), {content['front']} of {len(content['points'])} points on the front"
            f"{mark}",
        )
    ]
    if content.get("optimal_share") is not None:
        share, (low, high) = output.percent(content["optimal_share"], 1), content["optimal_share_ci"]
        rows.append(
            ("optimal share", f"{share} [{100 * low:.1f}, {100 * high:.1f}] of the exact optimum's hypervolume")
        )
    rows += _generalisation_rows(content.get("generalisation") or {})
    if not short:
        indicators, quality = content["indicators"], content.get("quality", {})
        rows += [
            ("Kendall's tau", output.number(indicators["tau"], 2)),
            ("inner product", output.number(indicators["inner_product"])),
            ("expected utility", output.number(indicators["expected_utility"])),
        ]
        if "rate" in quality:
            rows.append(("collapse rate", output.percent(quality["rate"], 1)))
        if quality.get("kl") is not None:
            rows.append(("KL to base", _moved(content)))
        if content.get("overlong"):
            rows.append(("prompts", output.overlong(content["overlong"])))
    output.pairs(rows)


def _spread(content: Mapping[str, Any]) -> str:
    """Return how evenly the front is spread, where it has two points and the evaluation says so."""
    spacing = content["indicators"].get("spacing")
    return "" if spacing is None or content["front"] < 2 else f", spacing {output.number(spacing)}"


def _moved(content: Mapping[str, Any]) -> str:
    """Return the mean KL to base and, where preferences differ, its range over them."""
    each = [point["kl"] for point in content["points"]]
    low, high = output.number(min(each), 2), output.number(max(each), 2)
    spread = f", {low} to {high} over the preferences" if low != high else ""
    return f"{output.nats(content['quality'])} nats per response{spread}"


def _generalisation_rows(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row for the preferences that were trained on and one for those that were held out."""
    rows = []
    for side, name in (("trained", "trained on"), ("held_out", "held out")):
        part = content.get(side)
        if part is None:
            continue
        text = f"{len(part['prefs'])} preferences: hypervolume {output.number(part['hypervolume'], 4)}"
        if part["optimal_share"] is not None:
            share, (low, high) = output.percent(part["optimal_share"], 1), part["optimal_share_ci"]
            text += f", {share} [{100 * low:.1f}, {100 * high:.1f}] of the optimum's"
        if part.get("utility_share") is not None:
            text += f"; utility {output.percent(part['utility_share'], 1)} of the optimum's"
        rows.append((name, text))
    return rows

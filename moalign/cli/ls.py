"""``moalign ls``: methods, tasks, recipes, runs and built-in language models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.core.errors import RequestError, unknown
from moalign.report.units import NONE

if TYPE_CHECKING:
    from moalign.evaluation.result import EvalResult

KINDS = ("methods", "tasks", "recipes", "runs", "models")


def ls(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")],
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept.")] = output.DEFAULT_RESULTS,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List methods, tasks, recipes, runs, or the language models that can be had without a model hub."""
    listers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": _methods,
        "tasks": _tasks,
        "recipes": _recipes,
        "runs": lambda: _runs(results),
        "models": _models,
    }
    if kind not in listers:
        raise unknown("list", kind, KINDS)
    rows = listers[kind]()
    if as_json:
        output.as_json({kind: rows})
    elif kind == "runs":
        _show_runs(rows, results)
    elif kind == "models":
        _show_models(rows)
    else:
        columns = {
            "methods": ("name", "steers", "needs", "summary"),
            "tasks": ("name", "objectives", "description"),
            "recipes": ("name", "gpu", "minutes", "description"),
        }[kind]
        table = output.table(*columns)
        for row in rows:
            table.add_row(*(_cell(row[column]) for column in columns))
        output.show(table)
        output.line(f"details: moalign show NAME{'; run one: moalign train METHOD --task TASK' * (kind == 'recipes')}")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return NONE if value is None else str(value)


def _methods() -> list[dict[str, Any]]:
    from moalign.methods import registry

    rows = []
    for name in registry.names():
        try:
            method = registry.get(name)
        except RequestError as error:  # a broken plugin must not hide the others
            output.warn(str(error))
            continue
        can = method.capabilities
        needs = [("pairs", can.needs_pairs), ("rewards while training", can.needs_online_rewards and can.trains)]
        steers = "any preference" if can.steerable else "the trained preferences only"
        rows.append(
            {
                "name": name,
                "summary": method.summary,
                "steers": steers if can.trains else f"{steers}, untrained",
                "needs": [text for text, needed in needs if needed],
                "objectives": can.objectives,
                "one_policy": can.one_policy,
                "trains": can.trains,
            }
        )
    return rows


def _tasks() -> list[dict[str, Any]]:
    from moalign.config import find
    from moalign.config.load import load_card

    rows = []
    for name in find.list_tasks():
        try:
            card = load_card(name)
        except RequestError as error:
            output.errors(error.problems)
            continue
        rows.append(
            {
                "name": name,
                "kind": card.kind,
                "objectives": card.objective_names,
                "description": card.description,
                "suite": card.suite,
                "path": str(find.find_task_file(name)),
            }
        )
    return rows


def _recipes() -> list[dict[str, Any]]:
    from moalign.config import find, yaml_lines

    rows = []
    for task, method, path in find.list_recipes():
        try:
            data = yaml_lines.load(path).data
        except RequestError as error:
            output.errors(error.problems)
            continue
        needs = data.get("needs")
        needs = needs if isinstance(needs, dict) else {}
        rows.append(
            {
                "name": f"{task}/{method}",
                "task": task,
                "method": method,
                "description": str(data.get("description", "")),
                "gpu": needs.get("gpu", "none"),
                "minutes": needs.get("minutes"),
                "path": str(path),
            }
        )
    return rows


def _runs(results: Path) -> list[dict[str, Any]]:
    from moalign.runs.store import RunStore

    rows = []
    for run in RunStore(results).runs():
        record, evaluation = run.record, _evaluation(run.path / "eval.json")
        rows.append(
            {
                "run_id": run.run_id,
                "task": record.task,
                "method": record.method,
                "seed": record.seed,
                "status": run.status,
                "created": record.created.isoformat(timespec="seconds"),
                "seconds": record.seconds,
                "hypervolume": evaluation and evaluation.hypervolume,
                "optimal_share": evaluation and evaluation.optimal_share,
                "path": str(run.path),
            }
        )
    return rows


def _evaluation(path: Path) -> EvalResult | None:
    """Return the run's evaluation on the task's grid."""
    from moalign.evaluation.result import EvalResult

    try:
        return EvalResult.load(path) if path.is_file() else None
    except RequestError as error:
        output.warn(str(error))
        return None


def _show_runs(rows: list[dict[str, Any]], results: Path) -> None:
    if not rows:
        output.note(f"no runs in {results / 'runs'}; train one: moalign train METHOD")
        return
    columns = ("run", "task", "method", "seed", "status", "created (UTC)", "took", "hypervolume", "optimal share")
    table = output.table(*columns, right=("seed", "took", "hypervolume", "optimal share"))
    for row in rows:
        table.add_row(
            row["run_id"],
            row["task"],
            row["method"],
            str(row["seed"]),
            row["status"],
            row["created"][:16].replace("T", " "),
            output.duration(row["seconds"]),
            output.number(row["hypervolume"], 4),
            output.percent(row["optimal_share"], 1),
        )
    output.show(table)


def _models() -> list[dict[str, Any]]:
    from moalign.lm import builtin

    return builtin.listing()


def _show_models(rows: list[dict[str, Any]]) -> None:
    table = output.table(
        "name", "parameters", "download", "licence", "package", "state", right=("parameters", "download")
    )
    missing = {}
    for row in rows:
        ready = row["installed"] and row["library"]
        if row["path"] is None and not ready:
            missing[row["name"]] = row["command"]
        state = "converted" if row["path"] else "installed, converted at its first use" if ready else "not installed"
        sizes = f"{row['parameters'] / 1e6:.0f} M", f"{row['bytes'] / 1e6:.0f} MB"
        table.add_row(row["name"], *sizes, row["licence"], row["package"], state)
    output.show(table)
    for name, command in missing.items():
        output.line(f"get {name}: {command}")
    output.line("use one: --set task.model=NAME")

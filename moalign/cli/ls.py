"""``moalign ls``: methods, tasks, recipes, runs and built-in language models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, Results
from moalign.core.errors import RequestError, unknown
from moalign.report.record import Row
from moalign.report.tables import Column
from moalign.report.units import duration, number, percent

Rows = list[dict[str, Any]]

if TYPE_CHECKING:
    from moalign.evaluation.result import EvalResult

KINDS = ("methods", "tasks", "recipes", "runs", "models")


def ls(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to list.")],
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """List methods, tasks, recipes, runs, or the language models that can be had without a model hub."""
    listers: dict[str, Callable[[], Rows]] = {
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
        return
    if kind == "runs" and not rows:
        output.note(f"no runs in {results / 'runs'}; train one: moalign train METHOD")
        return
    output.table(_COLUMNS[kind], rows)
    if kind == "models":
        for row in rows:
            if _state(row) == "not installed":
                output.line(f"get {row['name']}: {row['command']}")
        output.line("use one: --set task.model=NAME")
    elif kind != "runs":
        output.line(f"details: moalign show NAME{'; run one: moalign train METHOD --task TASK' * (kind == 'recipes')}")


def _loaded(names: Iterable[str], load: Callable[[str], Any], severity: str = "error") -> Iterator[tuple[str, Any]]:
    """Yield what ``load`` makes of each name; what is broken is reported and must not hide the others."""
    for name in names:
        try:
            loaded = load(name)
        except RequestError as error:
            for problem in error.problems:
                output.note(f"{severity}: {problem}")
        else:
            yield name, loaded


def _methods() -> Rows:
    from moalign.methods import registry

    rows = []
    for name, method in _loaded(registry.names(), registry.get, severity="warning"):
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


def _tasks() -> Rows:
    from moalign.config import find
    from moalign.config.load import load_card

    return [
        {
            "name": name,
            "kind": card.kind,
            "objectives": card.objective_names,
            "description": card.description,
            "suite": card.suite,
            "path": str(find.find_task_file(name)),
        }
        for name, card in _loaded(find.list_tasks(), load_card)
    ]


def _recipes() -> Rows:
    from moalign.config import find, yaml_lines

    recipes = {f"{task}/{method}": (task, method, path) for task, method, path in find.list_recipes()}
    rows = []
    for name, document in _loaded(recipes, lambda name: yaml_lines.load(recipes[name][2])):
        task, method, path = recipes[name]
        needs = document.data.get("needs")
        needs = needs if isinstance(needs, dict) else {}
        rows.append(
            {
                "name": name,
                "task": task,
                "method": method,
                "description": str(document.data.get("description", "")),
                "gpu": needs.get("gpu", "none"),
                "minutes": needs.get("minutes"),
                "path": str(path),
            }
        )
    return rows


def _runs(results: Path) -> Rows:
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


def _models() -> Rows:
    from moalign.lm import builtin

    return builtin.listing()


# -- how they are shown --------------------------------------------------------------------------------------------


def _state(row: Row) -> str:
    if row["path"]:
        return "converted"
    return "installed, converted at its first use" if row["installed"] and row["library"] else "not installed"


def _left(heading: str, write: Callable[..., str] = str) -> Column:
    return Column(heading, heading, write, left=True)


_COLUMNS = {
    "methods": (_left("name"), _left("steers"), _left("needs", write=", ".join), _left("summary")),
    "tasks": (_left("name"), _left("objectives", write=", ".join), _left("description")),
    "recipes": (_left("name"), _left("gpu"), _left("minutes"), _left("description")),
    "runs": (
        Column("run", "run_id", left=True, whole=True),
        _left("task"),
        _left("method"),
        Column("seed", "seed", str),
        _left("status"),
        Column(
            "created (UTC)",
            "created",
            lambda created: created[:16].replace("T", " "),
            left=True,
            whole=True,
            optional=True,
        ),
        Column("took", "seconds", duration, optional=True),
        Column("hypervolume", "hypervolume", number, 4),
        Column("optimal share", "optimal_share", percent, 1),
    ),
    "models": (
        _left("name"),
        Column("parameters", "parameters", lambda count: f"{count / 1e6:.0f} M"),
        Column("download", "bytes", lambda size: f"{size / 1e6:.0f} MB"),
        _left("licence"),
        _left("package"),
        Column("state", _state, left=True),
    ),
}

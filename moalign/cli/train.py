"""``moalign train``: train one method on one task, or find the run finished, and show what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output

if TYPE_CHECKING:
    from moalign.config.load import ResolvedRequest
    from moalign.experiment.handle import RunHandle
    from moalign.experiment.train import Plan, TrainRequest
    from moalign.preflight.report import Preflight
    from moalign.runs.record import RunRecord


def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="What to train; moalign ls methods lists them.")],
    task: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Task name or card file.  [default: sandbox]")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recipe file; else the one of this task and method.")
    ] = None,
    prefs: Annotated[
        list[str] | None,
        typer.Option(metavar="W1,W2[,..]", help="Preference to train (on); repeat it for several."),
    ] = None,
    grid: Annotated[int | None, typer.Option(metavar="N", help="Train (on) an even grid of N preferences.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed; else the recipe's.")] = None,
    results: Annotated[Path, typer.Option(metavar="DIR", help="Where runs are kept.")] = output.DEFAULT_RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; nothing is written.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Train only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a method on a task, then evaluate it.

    The same command again finds the finished run; after an interruption it resumes.
    """
    if dry_run:
        from moalign.experiment.train import TrainRequest

        _dry_run(
            TrainRequest(method, task, recipe, tuple(prefs or ()), grid, tuple(set_ or ()), seed, results), as_json
        )
        return
    from moalign import api

    with output.working() as progress:
        run = api.train(
            method,
            task,
            prefs=prefs,
            grid=grid,
            seed=seed,
            settings=set_,
            recipe=recipe,
            results=results,
            evaluate=not no_eval,
            progress=progress,
            planned=_announce,
        )
    if as_json:
        output.as_json(_json(run))
    else:
        _show(run, results)


def _announce(plan: Plan) -> None:
    status = plan.existing_run.status if plan.existing_run else None
    if status not in ("done", "running"):
        verb = "training" if status is None else f"resuming the {status} run of"
        output.note(f"{verb} {plan.method.name} on {plan.task.card.name}, seed {plan.seed}: {plan.folder}")


# -- the plan ------------------------------------------------------------------------------------------------------


def _dry_run(request: TrainRequest, as_json: bool) -> None:
    """Show the plan of a request; what it says without its model, when that would have to be downloaded first."""
    from moalign.experiment import train as workflow
    from moalign.preflight import check, inputs

    resolved = workflow.resolve(request)
    if inputs.must_be_fetched(resolved.card):
        _show_before_download(resolved, check.preview(resolved), as_json)
    else:
        _show_plan(workflow.plan(request), as_json)


def _show_before_download(resolved: ResolvedRequest, report: Preflight, as_json: bool) -> None:
    from moalign.config.describe import yaml_form

    recipe, model = resolved.recipe, f"{resolved.card.model}, revision {resolved.card.model_revision or 'not pinned'}"
    if as_json:
        plan: dict[str, Any] = {"dry_run": True, "run": None, "method": recipe.method, "task": resolved.card.name}
        plan |= {"model": model, "config": recipe.config, "policy": recipe.policy.model_dump(mode="json")}
        output.as_json({**plan, "memory": report.memory, "cost": report.cost, "notes": report.notes})
        return
    output.pairs(
        [
            ("method", recipe.method),
            ("task", f"{resolved.card.name} ({resolved.card_path})"),
            ("model", f"{model}; not here yet, training downloads it"),
            ("objectives", ", ".join(resolved.card.objective_names)),
            ("recipe", str(resolved.as_given["recipe_file"] or "none; the method's defaults")),
            *report.checked,
        ]
    )
    output.line()
    table = output.table("setting", "value")
    for section, values in (("config", recipe.config), ("policy", recipe.policy.model_dump(mode="json"))):
        for key, value in flat(values):
            table.add_row(f"{section}.{key}", yaml_form(value))
    output.show(table)
    for text in [*report.notes, *report.problems]:
        output.note(f"note: {text}")
    output.line("dry run: nothing was downloaded, trained or written")


def _plan_json(plan: Plan, preview: Preflight) -> dict[str, Any]:
    run, recipe = plan.existing_run, plan.recipe
    return {
        "dry_run": True,
        "run": str(plan.folder),
        "run_id": plan.folder.name,
        "method": plan.method.name,
        "task": plan.task.card.name,
        "seed": plan.seed,
        "status": run.status if run else None,
        "recipe": plan.as_given["recipe_file"],
        "card": str(plan.card_path),
        "card_hash": plan.task.hash,
        "objectives": plan.task.names,
        "prefs": [list(row) for row in plan.given] if plan.given else None,
        "holdout": [list(row) for row in plan.holdout] or None,
        "config": recipe.config,
        "policy": recipe.policy.model_dump(mode="json"),
        "set": list(plan.request.overrides),
        "memory": preview.memory,
        "cost": preview.cost,
    }


def _show_plan(plan: Plan, as_json: bool) -> None:
    from moalign.config.describe import yaml_form
    from moalign.core import preferences
    from moalign.preflight import check

    preview = check.preview(plan)
    content = _plan_json(plan, preview)
    if as_json:
        output.as_json(content)
        return
    if plan.given:
        vectors = "  ".join(preferences.label(row) for row in plan.given)
    else:
        vectors = f"the task's own (evaluation grid of {plan.task.card.grid})"
    standing = {None: "does not exist yet", "done": "is finished: the command would only show it"}
    rows = [
        ("method", f"{content['method']} ({plan.method.summary})"),
        ("task", f"{content['task']} ({content['card']})"),
        ("card hash", content["card_hash"]),
        ("objectives", ", ".join(content["objectives"])),
        ("recipe", content["recipe"] or "none; the method's defaults"),
        ("preferences", vectors),
        ("seed", str(content["seed"])),
        ("run", content["run"]),
        ("", standing.get(content["status"], f"is {content['status']}: the command would resume it")),
        *preview.checked,
    ]
    if plan.holdout:
        rows.insert(6, ("held out", "  ".join(preferences.label(row) for row in plan.holdout)))
    output.pairs(rows)
    output.line()
    table = output.table("setting", "value")
    for section in ("config", "policy"):
        for key, value in flat(content[section]):
            table.add_row(f"{section}.{key}", yaml_form(value))
    output.show(table)
    output.line("dry run: nothing was trained or written")


def flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of nested settings, in order."""
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows


# -- the outcome -----------------------------------------------------------------------------------------------------


def _json(run: RunHandle) -> dict[str, Any]:
    record, evaluation = run.record, run.evaluation
    return {
        "run": str(run.path),
        "run_id": record.run_id,
        "method": record.method,
        "task": record.task,
        "seed": record.seed,
        "status": run.status,
        "seconds": record.seconds,
        "cost": record.cost.model_dump(),
        "found": run.reused,
        "card_hash": record.card_hash,
        "notes": record.notes,
        "evaluation": None if evaluation is None else _summary(evaluation.content),
    }


_SUMMARY = ("objectives", "points", "hypervolume", "hypervolume_ci", "ref", "optimal_share", "optimal_share_ci")


def _summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: evaluation[key] for key in (*_SUMMARY, "indicators", "quality", "overlong") if key in evaluation}


def _show(run: RunHandle, results: Path) -> None:
    from moalign.cli.eval import show_points, show_summary
    from moalign.core.preferences import example, label

    record, evaluation = run.record, run.evaluation
    outcome = "found finished, nothing to train" if run.reused else "done"
    output.line(f"{record.method} on {record.task}, seed {record.seed}: {outcome}")
    rows = [("run", str(run.path)), ("cost", cost_of(record))]
    if record.notes.get("overlong") and evaluation is None:  # the evaluation tells it, too
        rows.append(("prompts", output.overlong(record.notes["overlong"])))
    output.pairs(rows)
    output.line()
    shown = example(len(run.objectives))
    if evaluation is not None:
        show_points(evaluation)
        show_summary(evaluation)
        output.line()
        served = [label(point.preference) for point in evaluation.points]
        if served and shown not in served:
            shown = served[len(served) // 2]
    output.next_commands(
        output.command("eval", str(run.path), "--hypervolume"),
        output.command("compare", "--task", str(record.as_given.get("task") or record.task), results=results),
        output.command("generate", str(run.path), "--prefs", shown),
    )


def cost_of(record: RunRecord) -> str:
    """Return what a run took, in one line."""
    cost = record.cost
    return (
        f"{output.duration(record.seconds)}, {output.count(cost.tokens_generated)} tokens generated, "
        f"{output.count(cost.tokens_trained)} trained, {output.count(cost.reward_calls)} scores, "
        f"peak {output.memory(cost.peak_memory_bytes)}"
    )

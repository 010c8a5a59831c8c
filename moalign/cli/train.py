"""``moalign train``: train one method on one task, or find the run finished, and show what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output

if TYPE_CHECKING:
    from moalign.experiment.complete import Outcome
    from moalign.experiment.train import Plan, TrainRequest
    from moalign.preflight.check import Preflight
    from moalign.runs.run import Run


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
    from moalign.experiment import train as workflow

    request = workflow.TrainRequest(
        method=method,
        task=task,
        recipe=recipe,
        prefs=tuple(prefs or ()),
        grid=grid,
        overrides=tuple(set_ or ()),
        seed=seed,
        results=results,
    )
    if dry_run and _shown_before_download(request, as_json):
        return
    made = workflow.plan(request)
    if dry_run:
        _show_plan(made, as_json)
        return
    from moalign.experiment.complete import complete

    _announce(made)
    with output.working() as say:
        outcome = complete(made, say, judge=not no_eval)
    if as_json:
        output.as_json(_told(outcome))
    else:
        _show(outcome, results)


def _announce(made: Plan) -> None:
    status = made.found.status if made.found else None
    if status not in ("done", "running"):
        verb = "training" if status is None else f"resuming the {status} run of"
        output.note(f"{verb} {made.method.name} on {made.task.card.name}, seed {made.seed}: {made.folder}")


def _shown_before_download(request: TrainRequest, as_json: bool) -> bool:
    """Show what a plan says without its model, when that would have to be downloaded first."""
    from moalign.config.describe import yaml_form
    from moalign.experiment import train as workflow
    from moalign.preflight import check

    resolved = workflow.resolve(request)
    if not check.must_be_fetched(resolved.card):
        return False
    report = check.preview(resolved)
    recipe, model = resolved.recipe, f"{resolved.card.model}, revision {resolved.card.model_revision or 'not pinned'}"
    if as_json:
        told: dict[str, Any] = {"dry_run": True, "run": None, "method": recipe.method, "task": resolved.card.name}
        told |= {"model": model, "config": recipe.config, "policy": recipe.policy.model_dump(mode="json")}
        output.as_json({**told, "memory": report.memory, "cost": report.cost, "notes": report.notes})
        return True
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
    output.say()
    table = output.table("setting", "value")
    for section, values in (("config", recipe.config), ("policy", recipe.policy.model_dump(mode="json"))):
        for key, value in flat(values):
            table.add_row(f"{section}.{key}", yaml_form(value))
    output.show(table)
    for text in [*report.notes, *report.problems]:
        output.note(f"note: {text}")
    output.say("dry run: nothing was downloaded, trained or written")
    return True


# -- the plan ------------------------------------------------------------------------------------------------------


def _plan(made: Plan, preview: Preflight) -> dict[str, Any]:
    found = made.found
    recipe = made.resolved.recipe
    return {
        "dry_run": True,
        "run": str(made.folder),
        "run_id": made.folder.name,
        "method": made.method.name,
        "task": made.task.card.name,
        "seed": made.seed,
        "status": found.status if found else None,
        "recipe": made.resolved.as_given["recipe_file"],
        "card": str(made.resolved.card_path),
        "card_hash": made.task.hash,
        "objectives": made.task.names,
        "prefs": [list(row) for row in made.given] if made.given else None,
        "holdout": [list(row) for row in made.holdout] or None,
        "config": recipe.config,
        "policy": recipe.policy.model_dump(mode="json"),
        "set": list(made.request.overrides),
        "memory": preview.memory,
        "cost": preview.cost,
    }


def _show_plan(made: Plan, as_json: bool) -> None:
    from moalign.config.describe import yaml_form
    from moalign.core import preferences
    from moalign.preflight import check

    preview = check.preview(made.resolved)
    plan = _plan(made, preview)
    if as_json:
        output.as_json(plan)
        return
    if made.given:
        vectors = "  ".join(preferences.label(row) for row in made.given)
    else:
        vectors = f"the task's own (evaluation grid of {made.task.card.grid})"
    standing = {None: "does not exist yet", "done": "is finished: the command would only show it"}
    rows = [
        ("method", f"{plan['method']} ({made.method.summary})"),
        ("task", f"{plan['task']} ({plan['card']})"),
        ("card hash", plan["card_hash"]),
        ("objectives", ", ".join(plan["objectives"])),
        ("recipe", plan["recipe"] or "none; the method's defaults"),
        ("preferences", vectors),
        ("seed", str(plan["seed"])),
        ("run", plan["run"]),
        ("", standing.get(plan["status"], f"is {plan['status']}: the command would resume it")),
        *preview.checked,
    ]
    if made.holdout:
        rows.insert(6, ("held out", "  ".join(preferences.label(row) for row in made.holdout)))
    output.pairs(rows)
    output.say()
    table = output.table("setting", "value")
    for section in ("config", "policy"):
        for key, value in flat(plan[section]):
            table.add_row(f"{section}.{key}", yaml_form(value))
    output.show(table)
    output.say("dry run: nothing was trained or written")


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


def _told(outcome: Outcome) -> dict[str, Any]:
    record = outcome.run.record
    return {
        "run": str(outcome.run.path),
        "run_id": record.run_id,
        "method": record.method,
        "task": record.task,
        "seed": record.seed,
        "status": outcome.run.status,
        "seconds": record.seconds,
        "cost": record.cost.model_dump(),
        "found": outcome.found,
        "card_hash": record.card_hash,
        "notes": record.notes,
        "evaluation": _summary(outcome.evaluation),
    }


_SUMMARY = ("objectives", "points", "hypervolume", "hypervolume_ci", "ref", "optimal_share", "optimal_share_ci")


def _summary(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {key: evaluation[key] for key in (*_SUMMARY, "indicators", "quality", "overlong") if key in evaluation}


def _show(outcome: Outcome, results: Path) -> None:
    from moalign.cli.eval import show_points, show_summary
    from moalign.core.preferences import example, label

    run, evaluation = outcome.run, outcome.evaluation
    record = run.record
    said = "found finished, nothing to train" if outcome.found else "done"
    output.say(f"{record.method} on {record.task}, seed {record.seed}: {said}")
    rows = [("run", str(run.path)), ("cost", cost_of(run))]
    if record.notes.get("overlong") and evaluation is None:  # the evaluation tells it, too
        rows.append(("prompts", output.overlong(record.notes["overlong"])))
    output.pairs(rows)
    output.say()
    if evaluation is not None:
        show_points(evaluation)
        show_summary(evaluation)
        output.say()
        names = evaluation["objectives"]
        served = [label(point["prefs"]) for point in evaluation["points"]]
        wanted = example(len(names))
        shown = wanted if wanted in served or not served else served[len(served) // 2]
    else:
        names = [objective["name"] for objective in record.recipe["card"]["objectives"]]
        shown = example(len(names))
    output.next_commands(
        output.command("eval", str(run.path), "--hypervolume"),
        output.command("compare", "--task", _task_option(run), results=results),
        output.command("generate", str(run.path), "--prefs", shown),
    )


def _task_option(run: Run) -> str:
    return str(run.record.as_given.get("task") or run.record.task)


def cost_of(run: Run) -> str:
    """Return what a run took, in one line."""
    record, cost = run.record, run.record.cost
    return (
        f"{output.duration(record.seconds)}, {output.count(cost.tokens_generated)} tokens generated, "
        f"{output.count(cost.tokens_trained)} trained, {output.count(cost.reward_calls)} scores, "
        f"peak {output.memory(cost.peak_memory_bytes)}"
    )

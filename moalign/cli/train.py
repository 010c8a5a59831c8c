"""``moalign train``: train one method on one task, or find the run finished, and show what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, PrefsText, Results, Settings, Task, preferences_of

if TYPE_CHECKING:
    from moalign.config.load import ResolvedRequest
    from moalign.experiment.handle import RunHandle
    from moalign.experiment.train import Plan, TrainRequest


def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="What to train; moalign ls methods lists them.")],
    task: Task = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Recipe file; else the one of this task and method.")
    ] = None,
    prefs: Annotated[
        list[str] | None,
        typer.Option(metavar="W1,W2[,..]", help="Preference to train (on); repeat it for several."),
    ] = None,
    prefs_text: PrefsText = None,
    grid: Annotated[int | None, typer.Option(metavar="N", help="Train (on) an even grid of N preferences.")] = None,
    set_: Settings = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Random seed; else the recipe's.")] = None,
    snapshots: Annotated[
        int | None, typer.Option(min=0, metavar="K", help="Keep K snapshots of each stage, for eval --snapshots.")
    ] = None,
    results: Results = DEFAULT_RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; nothing is written.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Train only.")] = False,
    as_json: Json = False,
) -> None:
    """Train a method on a task, then evaluate it.

    The same command again finds the finished run; after an interruption it resumes.
    """
    prefs, set_ = preferences_of(prefs, prefs_text), _with_snapshots(set_ or [], snapshots)
    if dry_run:
        from moalign.experiment.train import TrainRequest

        _dry_run(TrainRequest(method, task, recipe, tuple(prefs or ()), grid, tuple(set_), seed, results), as_json)
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


def _with_snapshots(settings: list[str], snapshots: int | None) -> list[str]:
    """Return the settings with those of ``--snapshots``; RequestError where they say otherwise."""
    from moalign.experiment.arguments import is_set, refuse_contradiction

    text = f"snapshots={snapshots}"
    if snapshots is None or is_set("snapshots", settings) == text:
        return settings
    refuse_contradiction("--snapshots", "snapshots", settings)
    return [*settings, text]


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
    plan = None if inputs.must_be_fetched(resolved.card) else workflow.plan(request)
    if plan:
        preview, (content, rows) = check.preview(plan, plan.task, plan.given), _planned(plan)
    else:
        seed, given, holdout = workflow.checked(request, resolved)
        preview, (content, rows) = check.preview(resolved, given=given), _before_download(resolved)
        vectors = {"prefs": [list(w) for w in given] if given else None, "holdout": [list(w) for w in holdout] or None}
        content |= {"seed": seed, **vectors, "set": list(request.overrides)}
    content |= {"memory": preview.memory, "cost": preview.cost}
    if as_json:
        output.as_json(content if plan else {**content, "notes": preview.notes})
        return
    output.pairs([*rows, *preview.checked])
    output.line()
    output.settings(output.sections(content, "config", "policy"))
    for text in () if plan else [*preview.notes, *preview.problems]:
        output.note(f"note: {text}")
    output.line(f"dry run: nothing was {'' if plan else 'downloaded, '}trained or written")


def _before_download(resolved: ResolvedRequest) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the plan as JSON and in lines, as far as it is known without the model."""
    recipe, card = resolved.recipe, resolved.card
    model = f"{card.model}, revision {card.model_revision or 'not pinned'}"
    content = {
        "dry_run": True,
        "run": None,
        "method": recipe.method,
        "task": card.name,
        "model": model,
        "config": recipe.config,
        "policy": recipe.policy.model_dump(mode="json"),
    }
    rows = [
        ("method", recipe.method),
        ("task", f"{card.name} ({resolved.card_path})"),
        ("model", f"{model}; not here yet, training downloads it"),
        ("objectives", ", ".join(card.objective_names)),
        ("recipe", str(resolved.as_given["recipe_file"] or "none; the method's defaults")),
    ]
    return content, rows


def _planned(plan: Plan) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Return the plan as JSON and in lines."""
    from moalign.core import preferences

    status = plan.existing_run.status if plan.existing_run else None
    content = {
        "dry_run": True,
        "run": str(plan.folder),
        "run_id": plan.folder.name,
        "method": plan.method.name,
        "task": plan.task.card.name,
        "seed": plan.seed,
        "status": status,
        "recipe": plan.as_given["recipe_file"],
        "card": str(plan.card_path),
        "card_hash": plan.task.hash,
        "objectives": plan.task.names,
        "prefs": [list(row) for row in plan.given] if plan.given else None,
        "holdout": [list(row) for row in plan.holdout] or None,
        "config": plan.recipe.config,
        "policy": plan.recipe.policy.model_dump(mode="json"),
        "set": list(plan.request.overrides),
    }
    listed = "  ".join(preferences.label(row) for row in plan.given or ())
    held_out = "  ".join(preferences.label(row) for row in plan.holdout)
    state = {None: "does not exist yet", "done": "is finished: the command would only show it"}
    rows = [
        ("method", f"{plan.method.name} ({plan.method.summary})"),
        ("task", f"{plan.task.card.name} ({plan.card_path})"),
        ("card hash", plan.task.hash),
        ("objectives", ", ".join(plan.task.names)),
        ("recipe", content["recipe"] or "none; the method's defaults"),
        ("preferences", listed or f"the task's own (evaluation grid of {plan.task.card.grid})"),
        *([("held out", held_out)] if held_out else []),
        ("seed", str(plan.seed)),
        ("run", str(plan.folder)),
        ("", state.get(status, f"is {status}: the command would resume it")),
    ]
    return content, rows


# -- the outcome -----------------------------------------------------------------------------------------------------


def _json(run: RunHandle) -> dict[str, Any]:
    record, evaluation = run.record, run.evaluation
    kept = "objectives points hypervolume hypervolume_ci ref optimal_share optimal_share_ci indicators quality"
    content = None if evaluation is None else evaluation.content
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
        "evaluation": None
        if content is None
        else {key: content[key] for key in [*kept.split(), "overlong", "warnings"] if key in content},
    }


def _show(run: RunHandle, results: Path) -> None:
    from moalign.cli.outcome import cost_of, overlong, show_points, show_summary
    from moalign.core.preferences import served_example
    from moalign.report.units import of_judge

    record, evaluation = run.record, run.evaluation
    outcome = "found finished, nothing to train" if run.reused else "done"
    output.line(f"{record.method} on {record.task}, seed {record.seed}: {outcome}")
    rows = [("run", str(run.path)), ("cost", cost_of(record))]
    if record.notes.get("overlong") and evaluation is None:  # the evaluation tells it, too
        rows.append(("prompts", overlong(record.notes["overlong"])))
    rows += [(f"judge {name}", of_judge(usage)) for name, usage in record.notes.get("judges", {}).items()]
    rows += [("warning", text) for text in record.notes.get("warnings", ()) if evaluation is None]
    output.pairs(rows)
    output.line()
    if evaluation is not None:
        show_points(evaluation)
        show_summary(evaluation)
        output.line()
    served = [point.preference for point in evaluation.points] if evaluation is not None else record.preferences
    # With other settings of the card it is another task.
    card = [part for text in record.as_given.get("set") or () if text.startswith("task.") for part in ("--set", text)]
    task = ("--task", str(record.as_given.get("task") or record.task), *card)
    compared = task if record.recipe["card"].get("suite") else (str(run.path),)  # without one there is no other to name
    output.next_commands(
        output.command("eval", str(run.path), "--hypervolume"),
        output.command("compare", *compared, results=results),
        output.command("generate", str(run.path), "--prefs", served_example(served or (), len(run.objectives))),
    )

"""``moalign reward``: train reward models and judge them."""

from __future__ import annotations

import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, folder
from moalign.cli.outcome import cost_of
from moalign.report.tables import Column
from moalign.report.units import interval, number

if TYPE_CHECKING:
    from moalign.reward_models.runs import RewardRequest
    from moalign.runs.run import Run

app = typer.Typer(
    name="reward",
    help="Reward models: Bradley-Terry or MORE; accuracy, calibration error, reliability diagram.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)

Pairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pairs",
        metavar="[NAME=]FILE",
        help="Preference pairs (prompt, chosen, rejected, or whole dialogues; a column group names who labelled); "
        "repeatable: one data set each.",
    ),
]
Task = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help="Take a task's pairs; the sandbox's come from its annotators.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting (lr=1e-4); repeatable.")
]
Revision = Annotated[str | None, typer.Option(metavar="REV", help="Revision of a hub model.")]
Results = Annotated[Path, typer.Option(metavar="DIR", parser=folder, help="Where reward models are kept.")]


@app.command("train")
def train(
    pairs: Pairs = None,
    task: Task = None,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER|ID", help="Backbone: a language model or classifier.")
    ] = None,
    revision: Revision = None,
    loss: Annotated[str | None, typer.Option(metavar="bt|multitask|more", help="bt: one data set.")] = None,
    members: Annotated[
        int | None, typer.Option(metavar="K", help="An ensemble: K models, each on its own bootstrap sample.")
    ] = None,
    set_: Set = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of heads and of the order of pairs.")] = 0,
    results: Results = DEFAULT_RESULTS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; train nothing.")] = False,
    no_eval: Annotated[bool, typer.Option("--no-eval", help="Do not judge the model on held-out pairs.")] = False,
    as_json: Json = False,
) -> None:
    """Train a reward model on preference pairs; it is judged on held-out pairs and usable as an objective."""
    from moalign.experiment import reward as workflow

    request = workflow.RewardTrainRequest(
        tuple(pairs or ()), task, tuple(set_ or ()), results, model, revision, loss, seed, members
    )
    with output.working() as progress:
        plan = workflow.plan(request, progress)
    if plan.notice is not None:
        output.note(f"note: {plan.notice}")
    if dry_run:
        _show_plan(plan, as_json)
        return
    with output.working() as progress:
        run, trained_before, evaluation = workflow.train(plan, progress, judge=not no_eval)
    if as_json:
        output.as_json(_json(run, trained_before, evaluation))
    else:
        _show(run, trained_before, evaluation, results)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run of reward train, folder or hub id.")],
    pairs: Pairs = None,
    task: Task = None,
    split: Annotated[str, typer.Option(metavar="eval|calibration|train|all", help="Which pairs.")] = "eval",
    label: Annotated[str | None, typer.Option(metavar="INDEX|NAME", help="Which output is the reward.")] = None,
    template: Annotated[str | None, typer.Option(metavar="TEXT", help="E.g. '{prompt}{response}'.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", min=8, help="Most tokens read.")] = None,
    minimise: Annotated[bool, typer.Option("--minimise", help="Smaller scores are better (a cost).")] = False,
    revision: Revision = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write numbers and figures there.")] = None,
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Judge a reward model: accuracy, calibration error, reliability diagram, per data set."""
    from moalign.experiment import reward as workflow

    request = workflow.PairsRequest(tuple(pairs or ()), task, tuple(set_ or ()), results)
    head = int(label) if label is not None and label.isdecimal() else label
    reading = workflow.Reading(head, template, max_length, minimise, split)
    with output.working() as progress:
        evaluation = workflow.judge(model, request, reading, revision, out, progress)
    if as_json:
        output.as_json(evaluation)
    else:
        show_evaluation(evaluation)


def _show_plan(request: RewardRequest, as_json: bool) -> None:
    sizes = {split: {pairs.name: len(pairs) for pairs in sets} for split, sets in request.parts.items()}
    settings = request.settings.model_dump(mode="json")
    if as_json:
        plan = {"dry_run": True, "name": request.name, "model": request.backbone, "seed": request.seed}
        output.as_json({**plan, "pairs": sizes, "settings": settings, "said": request.notice})
        return
    rows = [("backbone", str(request.backbone)), ("seed", str(request.seed))]
    rows += [(f"pairs, {split}", ", ".join(f"{k} {v}" for k, v in sets.items())) for split, sets in sizes.items()]
    output.pairs(rows)
    output.line()
    output.settings(output.flat(settings))
    output.line("dry run: nothing was trained or written")


def _json(run: Run, trained_before: bool, evaluation: dict[str, Any] | None) -> dict[str, Any]:
    record = run.record
    return {
        "run": str(run.path),
        "run_id": record.run_id,
        "model": str(run.path / "model"),
        "loss": record.method,
        "seed": record.seed,
        "status": run.status,
        "seconds": record.seconds,
        "cost": record.cost.model_dump(),
        "found": trained_before,
        "notes": record.notes,
        "objectives": _objectives(run),
        "evaluation": evaluation,
    }


def _objectives(run: Run) -> list[dict[str, Any]]:
    """Return the model as a task card names it, one objective per head."""
    from moalign.core.text import distinct
    from moalign.reward_models import runs

    heads = run.record.notes["heads"]
    several = len(heads) > 1
    names = distinct([_identifier(head) for head in heads])
    specs = [runs.objective(run, name, head if several else None) for name, head in zip(names, heads, strict=True)]
    return [spec.model_dump(mode="json", exclude_defaults=True) for spec in specs]


def _identifier(name: str) -> str:
    """Return what a task card may call an objective."""
    kept = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    if not kept.strip("-_"):
        return "head"
    return kept if kept[0].isalpha() else f"r{kept}"


def _show(run: Run, trained_before: bool, evaluation: dict[str, Any] | None, results: Path) -> None:
    from moalign.config.describe import yaml_form

    outcome = "found trained" if trained_before else "done"
    output.line(f"reward model, loss {run.record.method}, seed {run.record.seed}: {outcome}")
    output.pairs([("model", str(run.path / "model")), ("cost", cost_of(run.record))])
    output.line()
    if evaluation is not None:
        show_evaluation(evaluation)
    output.line("as an objective of a task card:")
    for spec in _objectives(run):
        output.line(f"  - {yaml_form(spec)}")
    output.next_commands(output.command("reward", "eval", str(run.path), results=results))


def _with_interval(digits: int) -> Callable[[tuple[float, list[float]]], str]:
    return lambda value: f"{number(value[0], digits)} {interval(value[1])}"


_COLUMNS = (
    Column("data set", "name", left=True),
    Column("pairs", "pairs"),
    Column("accuracy", itemgetter("accuracy", "accuracy_ci"), _with_interval(3)),
    Column("ECE (10 bins)", lambda row: (row["ece"]["10"], row["ece_ci"]["10"]), _with_interval(4)),
    Column("by chance", "ece_by_chance.10", number, 4),
    Column("5 bins", "ece.5", number, 4),
    Column("20 bins", "ece.20", number, 4),
    Column("log loss", "log_loss", number, 4),
    Column("temperature", "temperature", number, 2),
    Column("true ECE", "truth.ece.10", number, 4, needs="truth"),
)


def show_evaluation(content: dict[str, Any]) -> None:
    """Print accuracy and calibration of a reward model, one row per data set."""
    rows = content["datasets"]
    output.table([column for column in _COLUMNS if column.applies(rows)], rows)
    mean = content["mean"]
    output.line(
        f"mean over data sets: accuracy {mean['accuracy']:.4f}, ECE {mean['ece']['10']:.4f} (10 bins); "
        "by chance: what a calibrated model would get on so few pairs"
    )
    for path in content["figures"]:
        output.line(f"figure: {path}")

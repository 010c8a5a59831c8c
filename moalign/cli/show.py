"""``moalign show``: a run, a recipe, a method or a task card, in full."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moalign.cli import output
from moalign.cli.options import DEFAULT_RESULTS, Json, Results
from moalign.cli.outcome import cost_of, show_points, show_summary
from moalign.core.errors import RequestError
from moalign.core.text import PROSE
from moalign.report.tables import Column
from moalign.report.units import NONE, interval, number

if TYPE_CHECKING:
    from moalign.config.recipe import Recipe
    from moalign.config.yaml_lines import Document
    from moalign.report.record import Row
    from moalign.runs.run import Run


def show(
    name: Annotated[
        str, typer.Argument(metavar="RUN|RECIPE|METHOD|TASK|CARD", help="What to show: a name, a file or a folder.")
    ],
    results: Results = DEFAULT_RESULTS,
    as_json: Json = False,
) -> None:
    """Show a run, recipe, method or task in full.

    A run: record, cost, evaluation. A recipe: every setting with its source. A method: what it does and its settings.
    A task, by name, card file or the folder of its card: every setting of the card.
    """
    from moalign.config import find
    from moalign.methods import registry
    from moalign.runs.store import RunStore

    recipes = {f"{task}/{method}": path for task, method, path in find.list_recipes()}
    if name in registry.names():
        _method(name, as_json)
    elif (card := find.find_card(name)) is not None:
        _task(name, card, results, as_json)
    elif name in recipes or name.endswith((".yaml", ".yml")):
        _recipe(name, find.find_recipe(name), as_json)
    else:
        try:
            run = RunStore(results).find(name)
        except RequestError as error:
            raise _nothing_called(name, error, [*recipes, *registry.names(), *find.list_tasks()]) from error
        _run(run, as_json)


def _nothing_called(name: str, error: RequestError, others: list[str]) -> RequestError:
    """Return the error for a name that fits nothing; when it looks like a recipe or method, that is offered."""
    from moalign.core.errors import nearest

    near = nearest(name, others)
    if near is None or "did you mean" in str(error) or "runs fit" in str(error) or os.path.exists(name):
        return error
    return RequestError(f"no run, recipe, method or task is called {name!r}; did you mean {near!r}?")


# -- method and task ---------------------------------------------------------------------------------------------------


def _method(name: str, as_json: bool) -> None:
    from dataclasses import asdict

    from moalign.config import describe
    from moalign.methods import registry

    method = registry.get(name)
    module = inspect.getmodule(type(method))
    text = inspect.cleandoc((module.__doc__ if module else None) or type(method).__doc__ or method.summary)
    settings = [row._asdict() for row in describe.fields(method.Config)]
    can = asdict(method.capabilities)
    if as_json:
        content = {"method": name, "summary": method.summary, "description": text}
        output.as_json({**content, "capabilities": can, "settings": settings})
        return
    output.line(f"{name}: {method.summary}\n\n{text}\n", PROSE)
    words = {key: ("no", "yes")[value] if isinstance(value, bool) else str(value) for key, value in can.items()}
    output.pairs([(key.replace("_", " "), word) for key, word in words.items()])
    output.line()
    headings = {"setting": "name", "allowed": "type", "default": "default", "meaning": "doc"}
    output.table([Column(heading, key, left=True) for heading, key in headings.items()], settings)
    output.next_commands(output.command("train", name), output.command("train", name, "--dry-run"))


def _task(name: str, path: Path, results: Path, as_json: bool) -> None:
    from moalign.config.load import load_card
    from moalign.preflight.scales import scales

    card = load_card(path)
    settings, fitted = card.model_dump(mode="json"), scales(card, results)
    if as_json:
        more = {"normaliser": fitted} if fitted else {}
        output.as_json({"task": card.name, "path": str(path), "card": settings, **more})
        return
    output.line(f"{card.name}: {card.description}")
    output.line(str(path))
    output.line()
    output.settings(
        (key, item)
        for key, value in output.flat(settings)
        if key not in ("name", "description")
        for item in (value if key in ("objectives", "gold_objectives") and value else [value])
    )
    if fitted:
        output.line(
            "normaliser: raw scores (larger is better) of the calibration split; low and high become 0 and 1 in "
            "normalised units; bounds: of the data's responses; published: what a paper reports"
        )
        columns = [Column("objective", "objective", left=True), Column("count", "count")]
        columns += [Column(heading, heading, number) for heading in ("mean", "sd", "low", "high")]
        columns += [Column("bounds", "bounds", interval), Column("published", _of_paper)]
        output.table(columns, fitted)
    output.next_commands(output.command("check", name), output.command("preview", "--task", name))


def _of_paper(row: Row) -> str:
    paper = row["published"]
    return NONE if paper is None else f"{number(paper['mean'])} (sd {number(paper['sd'])})"


# -- recipe ------------------------------------------------------------------------------------------------------------


def _recipe(name: str, path: Path, as_json: bool) -> None:
    from moalign.config import load, yaml_lines
    from moalign.config.describe import yaml_form
    from moalign.methods import registry

    method, _ = load.recipe_names(path)
    resolved = load.load_recipe(path, method, None, (), registry.get(method).Config)
    recipe, task = resolved.recipe, resolved.card.name
    document, lines = yaml_lines.load(path), path.read_text(encoding="utf-8").splitlines()
    values = output.sections(recipe.model_dump(mode="json"), "seed", "prefs", "config", "policy")
    settings = [
        {"setting": key, "value": value, "source": _source(key, recipe, document, lines)} for key, value in values
    ]
    if as_json:
        output.as_json(
            {
                "recipe": str(path),
                "method": method,
                "task": task,
                "description": recipe.description,
                "needs": recipe.needs.model_dump(),
                "reported": [paper.model_dump() for paper in recipe.reported],
                "settings": settings,
            }
        )
        return
    output.pairs(_about(path, recipe, task))
    output.line()
    columns = output.columns("setting", "value", "source", left=True)
    output.table(columns, [{**row, "value": yaml_form(row["value"])} for row in settings])
    own = name == f"{path.parent.name}/{path.stem}"
    train = ("--task", path.parent.name) if own else ("--recipe", name)
    output.next_commands(output.command("check", name), output.command("train", method, *train))


def _about(path: Path, recipe: Recipe, task: str) -> list[tuple[str, str]]:
    """Return what a recipe is for and what it needs, in lines."""
    from moalign.config.describe import yaml_form

    needs = recipe.needs
    rows = [("recipe", str(path)), ("method", recipe.method), ("task", task)]
    rows += [("about", recipe.description)] if recipe.description else []
    rows += [
        ("gpu", needs.gpu + (f", {needs.gpu_memory_gib:g} GiB" if needs.gpu_memory_gib is not None else "")),
        ("minutes", number(needs.minutes, 1)),
        ("peak memory", NONE if needs.peak_gib is None else f"{needs.peak_gib:g} GiB"),
        ("measured", needs.measured),
    ]
    rows += [("quick budget", yaml_form(recipe.quick))] if recipe.quick else []
    return rows + _reported(paper.model_dump() for paper in recipe.reported)


def _reported(papers: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return what papers report for a recipe, in lines: never measured here, and in their setting and units."""
    rows = []
    for paper in papers:
        origin = "; ".join(filter(None, (paper["source"], paper.get("setting"))))
        rows.append((f"reported {paper['method']}", f"{paper['metric']} {paper['value']:g} ({origin})"))
    return rows


def _source(key: str, recipe: Recipe, document: Document, lines: list[str]) -> str:
    """Return where a value comes from.

    The recipe's ``sources`` for it or its section, else the comment on its line or its section's, else ``recipe``;
    ``default`` when the recipe does not set it.
    """
    parts = key.split(".")
    for end in range(len(parts), 0, -1):
        for name in (".".join(parts[:end]), ".".join(parts[1:end])):
            if name in recipe.sources:
                return recipe.sources[name]
    if not document.has(*parts):
        return "default"
    for end in range(len(parts), 0, -1):
        comment = comment_of(lines[document.line(*parts[:end]) - 1])
        if comment:
            return comment
    return "recipe"


def comment_of(line: str) -> str:
    """Return the comment at the end of a YAML line; empty without one.

    >>> comment_of("name: 'a # b'  # the name")
    'the name'
    """
    quote = ""
    for index, character in enumerate(line):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (index == 0 or line[index - 1] in " [{,:"):
            quote = character
        elif character == "#" and (index == 0 or line[index - 1].isspace()):
            return line[index + 1 :].strip()
    return ""


# -- run ---------------------------------------------------------------------------------------------------------------


def _run(run: Run, as_json: bool) -> None:
    from moalign.cli.reward import show_evaluation
    from moalign.config.describe import yaml_form
    from moalign.evaluation.result import EvalResult
    from moalign.experiment.reward import stored_evaluation
    from moalign.experiment.train import damaged, is_reward_model

    record = run.record
    path = run.path / "eval.json"
    reward_model = is_reward_model(run)
    evaluation = EvalResult.load(path) if path.is_file() and not reward_model else None
    judged = stored_evaluation(run) if reward_model else None
    if as_json:
        content = record.model_dump(mode="json")
        stored = judged if evaluation is None else evaluation.content
        output.as_json({**content, "status": run.status, "run": str(run.path), "evaluation": stored})
        return
    with damaged(run):
        rows = _about_run(run)
    if reward_model:
        rows = [row for row in rows if row[0] not in ("task", "preferences")]  # a policy's
    output.pairs([*rows, *((f"note {key}", yaml_form(value)) for key, value in record.notes.items())])
    output.line()
    output.settings(output.sections(record.recipe, "config", "policy", "settings"))
    if judged is not None:
        show_evaluation(judged)
    if evaluation is not None:
        show_points(evaluation)
        show_summary(evaluation)
    if papers := record.recipe.get("reported"):
        output.line("what papers report, each in its own setting and from its own reference point:")
        output.pairs(_reported(papers))


def _about_run(run: Run) -> list[tuple[str, str]]:
    """Return what a run's record says of it, in lines."""
    from moalign.core.preferences import label

    record, environment = run.record, run.record.environment
    commit = f"commit {environment['commit']}" if environment.get("commit") else "no commit known"
    local = ", with local changes" if environment.get("dirty") else ""
    return [
        ("run", str(run.path)),
        ("method", record.method),
        ("task", f"{record.task} (card {record.card_hash})"),
        ("seed", str(record.seed)),
        ("preferences", "  ".join(map(label, record.preferences)) if record.preferences else "the task's own"),
        ("status", run.status + (f": {record.error}" if record.error else "")),
        ("created", record.created.isoformat(timespec="seconds")),
        ("cost", cost_of(record)),
        ("phases", ", ".join(record.phases) or "none"),
        ("moalign", f"{record.moalign_version or 'not installed'}, {commit}{local}"),
        ("machine", f"{environment.get('cpu')}, {', '.join(environment.get('gpus') or []) or 'no GPU'}"),
    ]

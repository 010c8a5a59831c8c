"""``moalign check``: preflight of a recipe or a task card. Everything that can be known before training is checked,
every problem is collected, and nothing is written and no model loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moalign.config import find, load, validate, yaml_lines
from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.yaml_lines import Document
from moalign.core.errors import RequestError, unknown
from moalign.core.preferences import Preference
from moalign.methods import registry
from moalign.methods.base import Method
from moalign.policies.control_spec import ControlSpec
from moalign.preflight import fit
from moalign.preflight.inputs import check_inputs, is_local, named_model, require_rows
from moalign.preflight.report import Preflight
from moalign.preflight.request import of_recipe, require_sound, require_suited, to_train
from moalign.preflight.sizes import check_sizes
from moalign.tasks.task import Task
from moalign.training.settings import GroupsUsers, NamesFiles, NamesModels


def check(
    name_or_path: str, overrides: Sequence[str] = (), results: Path = Path("results"), gpu: str | None = None
) -> Preflight:
    """Check a recipe or a card and everything that it points to.

    ``task/method`` may also name a recipe that the task borrows (``recipes_from``). ``gpu`` is a card's memory, such as
    ``24GB``, for which settings are looked for; None: three sizes, for a recipe that needs a GPU. Raises RequestError
    only when there is no such recipe or card, and for a ``gpu`` that is no size; other problems are in ``problems``.
    """
    gib = None if gpu is None else fit.gib_of(gpu)
    card_file = find.find_card(name_or_path)
    if card_file is not None:
        if gpu is not None:
            raise RequestError(f"--gpu: {name_or_path} is a task card; name a recipe, like {card_file.parent.name}/sft")
        return _check_card(card_file, overrides, results)
    path, task = _borrowed(name_or_path) or (find.find_recipe(name_or_path, "RECIPE|CARD"), None)
    report = Preflight(path)
    resolved = _check_recipe(report, path, overrides, task)
    if resolved is not None:
        trains = registry.get(resolved.recipe.method).capabilities.trains
        lora = resolved.recipe.policy.lora if trains else None
        inputs = check_inputs(report, resolved.card, results, lora=lora)
        if isinstance(resolved.config, NamesModels):
            for name, named in resolved.config.models.items():
                report.look(name, partial(named_model, report, name, named))
        if trains and resolved.card.template.chat and inputs.model is not None and inputs.task is not None:
            with report.collecting():
                require_rows(inputs.task, resolved.config)
        control = getattr(resolved.config, "control", None)
        here = resolved.card.built_in_base or is_local(str(resolved.card.model))
        if isinstance(control, ControlSpec) and control.form == "adapter" and inputs.task is not None and here:
            report.look("control", partial(inputs.task.examine, control.lora, "control.lora"))
        if isinstance(resolved.config, NamesFiles):
            report.look("files", partial(_files, resolved.config))
        if isinstance(resolved.config, GroupsUsers) and inputs.task is not None:
            report.look("users", partial(_users, inputs.task, resolved.config.clusters))
        needs = resolved.recipe.needs
        shown = fit.SHOWN if needs.gpu != "none" or needs.gpu_memory_gib is not None else ()
        cards = shown if gib is None else (gib,)
        check_sizes(report, resolved, inputs.model, inputs.task, cards=cards, required=gib is not None)
        return report
    card, with_options = _card_alone(path, overrides)
    if card is not None:
        check_inputs(report, card, results, with_options)
    return report


def _files(config: NamesFiles) -> str:
    return ", ".join(config.contents()) or "none beside the task's"


def _users(task: Task, clusters: int) -> str:
    task.require_groups(clusters, "clusters")
    return f"{len(task.users)} label {sum(map(len, task.users))} pairs to learn from"


def preview(
    resolved: ResolvedRequest, task: Task | None = None, given: Sequence[Preference] | None = None
) -> Preflight:
    """Return memory and cost of a request alone: what a dry run shows, before anything is downloaded.

    ``task`` and ``given`` as :func:`moalign.preflight.cost.estimate` has them.
    """
    report = Preflight(resolved.recipe_path or Path(resolved.recipe.method))
    check_sizes(report, resolved, None, task, given)
    return report


def _check_card(path: Path, overrides: Sequence[str], results: Path) -> Preflight:
    """Check a card, what it points to, and the settings of the recipes beside it."""
    report = Preflight(path, of_card=True)
    with report.collecting():
        card = load.load_card(path, overrides)
        report.add("card", f"{path}: task {card.name}: {', '.join(card.objective_names)}")
        with report.collecting():
            _require_known(card, load.card_origin(path, overrides))
        check_inputs(report, card, results)
    for file in sorted(path.parent.glob("*.yaml")):
        if find.find_card(str(file)) is None:
            with report.collecting():  # the card's own problems are among them, and reported once
                method = registry.get(load.recipe_names(file)[0])
                resolved = load.load_recipe(file, method.name, path, overrides, method.Config)
                report.add("recipe", f"{file}: {len(resolved.config.model_dump())} settings of {method.name}")
                _check_request(report, method, resolved)
    return report


def _require_known(card: TaskCard, origin: validate.Origin) -> None:
    """Raise RequestError for methods of a card's suites, and a task whose recipes it borrows, that there are not."""
    problems: list[str] = []
    known = registry.names()
    for key in ("suite", "quick_suite"):
        names = getattr(card, key)
        for index, name in enumerate(names):
            if name not in known:
                problems.append(origin.sentence((key, index), str(unknown("method", name, known))))
            elif name in names[:index]:
                problems.append(origin.sentence((key, index), f"found {name!r} twice; allowed: each method once"))
    if card.recipes_from is not None:
        try:
            find.find_task_file(card.recipes_from, origin.sentence(("recipes_from",), ""))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(*problems)


def _check_request(report: Preflight, method: Method, resolved: ResolvedRequest) -> None:
    """Refuse what training would refuse before it looks at anything."""
    with report.collecting():
        require_sound(method, resolved, resolved.recipe.seed)
    with report.collecting():
        require_suited(resolved, to_train(method, resolved, of_recipe(resolved))[0])


def _check_recipe(
    report: Preflight, path: Path, overrides: Sequence[str], task: str | None = None
) -> ResolvedRequest | None:
    """Read recipe, method config and card; None when one of them is wrong."""
    with report.collecting():
        method = _method_of(path, yaml_lines.load(path), overrides)
        resolved = load.load_recipe(path, method.name, task, overrides, method.Config)
        report.add("recipe", f"{path}: {len(resolved.config.model_dump())} settings of {method.name}")
        report.add("card", f"{resolved.card_path}: {', '.join(resolved.card.objective_names)}")
        _check_request(report, method, resolved)
        return resolved
    return None


def _method_of(path: Path, document: Document, overrides: Sequence[str]) -> Method:
    """Return a recipe's method; without one its settings cannot be checked, but the rest of the recipe is."""
    try:
        return registry.get(load.recipe_names(path)[0])
    except RequestError as error:
        own = f"{document.source}:"
        where = f"{own}{document.line('method')}: "
        problems = [text if text.startswith(own) else where + text for text in error.problems]
        card = _card_alone(path, overrides)[0]
        others = load.check_recipe(document.data, validate.Origin(document.source, document), card)[1]
        raise RequestError(*problems, *others) from None


def _borrowed(name: str) -> tuple[Path, str] | None:
    """Return (file, task) when ``task/method`` names a recipe of another task that this one borrows."""
    task, _, method = name.partition("/")
    known = {f"{task_name}/{method_name}" for task_name, method_name, _ in find.list_recipes()}
    if not method or name in known or os.path.isfile(name) or task not in find.list_tasks():
        return None
    path = find.find_recipe_file(task, method)
    return None if path is None else (path, task)


def _card_alone(path: Path, overrides: Sequence[str]) -> tuple[TaskCard | None, bool]:
    """Return the card of a recipe that has problems, so that what it points to is checked too.

    The flag is True when the card holds the options for it: when one of those is wrong, the card is read without them.
    None when the card is wrong itself; its problems are among the recipe's, which the caller has already.
    """
    try:
        name = yaml_lines.load(path).data.get("task")
    except RequestError:
        return None, False
    if not isinstance(name, str):
        return None, False
    beside = path.parent / name if find.is_path(name) else name
    card_options = [text for text in overrides if text.startswith("task.")]
    for texts, with_options in ((card_options, True), ([], not card_options)):
        try:
            return load.load_card(beside, texts), with_options
        except RequestError:
            continue
    return None, False

"""From a name or a file, and ``--set`` options, to a checked card, recipe and method config.

All problems of the card, the recipe, the method's config and the options are raised together.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from moalign.config import find, overrides, yaml_lines
from moalign.config.card import TaskCard
from moalign.config.describe import bare, key_paths, schema_of
from moalign.config.recipe import Recipe
from moalign.config.strict import Strict
from moalign.config.validate import Origin, check, check_places
from moalign.config.yaml_lines import Document, Key
from moalign.core import errors, preferences
from moalign.core.errors import RequestError
from moalign.core.paths import shown

_RECIPE_KEYS = tuple(name for name in Recipe.model_fields if name not in {"method", "task"})
_DATA_FILE = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
_SCORER_FILE = re.compile(r"^(?P<file>.+\.py)(?P<attribute>:[^/]*)$")


@dataclass(frozen=True)
class ResolvedRequest:
    """One training request, checked: what is run, and what the user wrote."""

    recipe: Recipe
    """``recipe.config`` holds every setting of the method, defaults included."""
    config: Strict
    """The method's own ``Config``."""
    card: TaskCard
    """The recipe's ``policy.dtype`` and ``policy.load_in_4bit`` are in it."""
    as_given: dict[str, Any]
    """Method, task, the recipe file with its unchanged content, the ``--set`` texts: for the run record."""
    card_path: Path
    recipe_path: Path | None


class _Set(NamedTuple):
    """One ``--set``: the key path inside the card or the recipe, and the label that messages use."""

    keys: tuple[str, ...]
    value: Any
    label: str


def load_card(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TaskCard:
    """Return the checked card of a task's name, a card file, or a folder that holds ``task.yaml``.

    ``overrides`` are ``--set`` texts, each ``task.key=value``. Paths in the card (``model``, ``data.*.path``, a
    classifier's ``model``, the file of a ``function``, a judge's ``template``) become absolute when such a file or
    folder exists: relative to the card's folder, or to the current directory for ``--set``. Hub ids stay. Raises
    RequestError with every problem.
    """
    problems: list[str] = []
    card_sets, _ = _sort(overrides, None, problems)
    card, _ = _card(name_or_path, card_sets, "--task", problems)
    if card is None or problems:
        raise RequestError(*problems)
    return card


def card_origin(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Origin:
    """Return where the keys of a card stand, for messages: lines of its file, or the ``--set`` texts.

    Raises RequestError when there is no such card or its file is broken.
    """
    return _origin(yaml_lines.load(find.find_task_file(name_or_path)), _sort(overrides, None, [])[0])


def recipe_names(path: str | Path) -> tuple[str, str]:
    """Return ``(method, task)`` of a recipe file, read before the method's ``Config`` is known.

    Raises RequestError when the file is broken or does not name both; other problems are left to
    :func:`load_recipe`.
    """
    document = yaml_lines.load(path)
    problems = []
    for key in ("method", "task"):
        name = document.data.get(key)
        if not isinstance(name, str):
            state = "missing" if name is None else f"found {name!r}"
            near = errors.nearest(key, document.data.keys() - Recipe.model_fields) if name is None else None
            hint = f"; found the key {near!r}; did you mean {key!r}?" if near else ""
            place = f"{document.source}:{document.line(near or key)}: {key}"
            problems.append(f"{place}: {state}; allowed: the name of a {key}{hint}")
    if problems:
        raise RequestError(*problems)
    return document.data["method"], document.data["task"]


def load_recipe(
    path: str | Path | None,
    method: str,
    task: str | Path | None = None,
    overrides: Sequence[str] = (),
    config_class: type[Strict] = Strict,
) -> ResolvedRequest:
    """Return the checked recipe, method config and card of one training request.

    Args:
        path: the recipe file; None for a method's defaults.
        method: the requested method; a recipe of another method is refused.
        task: task name or card file; None for the recipe's own. It goes before the recipe's.
        overrides: ``--set`` texts. ``task.X`` goes to the card; ``policy.X``, ``config.X``, ``needs.X``, ``seed``,
            ``budget`` and the like go to the recipe; ``X`` alone, a key of ``config_class``, is short for ``config.X``.
        config_class: the method's ``Config``.

    Raises RequestError with every problem of recipe, config, card and options.
    """
    problems: list[str] = []
    card_sets, recipe_sets = _sort(overrides, config_class, problems)
    document: Document | None = None
    content: dict[str, Any] | None = {"method": method, "task": "sandbox"}
    given: dict[str, Any] = {}
    if path is not None:
        try:
            document = yaml_lines.load(path)
            content = document.data
        except RequestError as error:
            problems += error.problems
            content = None
    origin = _origin(document, recipe_sets, f"{method} without a recipe")
    requested, where = task, "--task"
    if content is not None:
        content = content if task is None else {**content, "task": str(task)}
        of_budget = [item for item in recipe_sets if item.keys[0] in {"budget", "quick"}]
        given = _apply(content, of_budget, problems)
        others = [item for item in recipe_sets if item not in of_budget]
        content = _apply(_within_budget(given, origin, problems), others, problems)
        if task is None:
            requested, where = _named_task(content, path), f"{origin.at(('task',))}: task"
    card, card_path = (None, None) if requested is None else _card(requested, card_sets, where, problems)
    recipe = config = None
    if content is not None:
        recipe = _recipe(content, origin, method, card, problems)
        config = _config(content, given, origin, config_class, requested if card else None, problems)
    if problems or recipe is None or config is None or card is None or card_path is None:
        raise RequestError(*problems)
    as_given = {
        "method": method,
        "task": str(requested),
        "recipe_file": None if path is None else shown(path),
        "recipe": None if document is None else document.data,
        "set": list(overrides),
    }
    recipe = recipe.model_copy(update={"config": config.model_dump(mode="json")})
    held = recipe.policy.model_dump(include={"dtype", "load_in_4bit"}, exclude_defaults=True)
    card = card.model_copy(update=held)  # what a base is, is the card's: all that is made with it goes by its hash
    return ResolvedRequest(recipe, config, card, as_given, card_path, None if path is None else Path(path))


# --- options ----------------------------------------------------------------------------------------------------


def _sort(
    texts: Sequence[str], config_class: type[Strict] | None, problems: list[str]
) -> tuple[list[_Set], list[_Set]]:
    """Parse ``--set`` texts; return those of the card and those of the recipe.

    Without ``config_class`` only keys of the card are allowed.
    """
    card: list[_Set] = []
    recipe: list[_Set] = []
    for text in texts:
        try:
            keys, value = overrides.parse(text)
        except RequestError as error:
            problems += error.problems
            continue
        label = f"--set {'.'.join(keys)}"
        if keys[0] == "task" and len(keys) > 1:
            card.append(_Set(keys[1:], value, label))
        elif config_class and keys[0] in _RECIPE_KEYS:
            recipe.append(_Set(keys, value, label))
        elif config_class and keys[0] in config_class.model_fields:
            recipe.append(_Set(("config", *keys), value, label))
        else:
            problems.append(f"{label}: {unknown_setting(keys, [config_class] if config_class else [])}")
    return card, recipe


def unknown_setting(
    keys: tuple[str, ...], configs: Collection[type[Strict]], methods: Mapping[str, type[Strict]] | None = None
) -> str:
    """Return what is wrong with a setting that no config has: what is allowed, and the nearest with its section.

    ``methods``, where a setting may be given to one method alone (``METHOD.key``): the configs by name. Without any
    config only keys of the card are allowed.
    """
    if keys[0] in {"task", "method"}:
        option = "--task NAME, and its keys with --set task.KEY" if keys[0] == "task" else "the argument METHOD"
        return f"the {keys[0]} itself is not a setting; name it with {option}"
    own = list(dict.fromkeys(path for config in configs for path in key_paths(config)))
    shared: list[str] = []
    if configs:
        shared = [path for path in key_paths(Recipe) if path in _RECIPE_KEYS or "." in path]
        shared += [f"{section}.{path}" for section in ("config", "quick") for path in own]
    kinds = {name: bare(place).get("type") for name, place in schema_of(Recipe)["properties"].items()}
    allowed = [path for path in own if "." not in path]
    allowed += [f"{name}.KEY" if kinds[name] == "object" else name for name in shared if "." not in name]
    allowed += ["task.KEY"]
    alone = [f"{name}.{path}" for name, config in (methods or {}).items() for path in key_paths(config)]
    if methods:
        allowed.append(f"METHOD.KEY for one alone (METHOD: {', '.join(methods)})")
    hint = overrides.did_you_mean(keys, own, shared, [f"task.{path}" for path in key_paths(TaskCard)], alone)
    return f"unknown setting; allowed: {', '.join(allowed)}{hint}"


def _apply(data: Mapping[str, Any], sets: Sequence[_Set], problems: list[str]) -> dict[str, Any]:
    """Return a copy of ``data`` with the options in it."""
    result = copy.deepcopy(dict(data))
    for keys, value, label in sets:
        if problem := overrides.put(result, keys, value):
            problems.append(f"{label}: {problem}")
    return result


def _origin(document: Document | None, sets: Sequence[_Set], source: str = "") -> Origin:
    return Origin(document.source if document else source, document, (), {item.keys: item.label for item in sets})


# --- the card ---------------------------------------------------------------------------------------------------


def _card(
    name_or_path: str | Path, sets: Sequence[_Set], where: str, problems: list[str]
) -> tuple[TaskCard | None, Path | None]:
    try:
        file = find.find_task_file(name_or_path, where)
        document = yaml_lines.load(file)
    except RequestError as error:
        problems += error.problems
        return None, None
    data, origin = _apply(document.data, sets, problems), _origin(document, sets)
    tops = [name for name in ("model", "data", "objectives", "gold_objectives") if name in data]
    absent: list[tuple[tuple[Key, ...], str]] = []
    for holder, place in itertools.chain.from_iterable(_paths(data, (name,)) for name in tops):
        base = Path.cwd() if origin.option(place) else file.resolve().parent
        if problem := _resolve_path(holder, str(place[-1]), base):
            absent.append((place, origin.sentence(place, problem)))
    card, wrong = check_places(TaskCard, data, origin)
    places = {place for place, _ in wrong if place}
    # What stands in a wrong place is no path.
    problems += [text for place, text in absent if not any(place[: len(outer)] == outer for outer in places)]
    problems += dict.fromkeys(text for _, text in wrong)
    return card, file


def _paths(holder: Any, place: tuple[Key, ...]) -> Iterator[tuple[dict[str, Any], tuple[Key, ...]]]:
    """Yield every path at and below a place of the card, as the section that holds it and its place."""
    key, value = place[-1], holder[place[-1]]
    judged = isinstance(holder, dict) and holder.get("kind") == "judge"  # its model is elsewhere, its template a file
    if key in ({"template"} if judged else {"path", "model", "function"}) and isinstance(value, str):
        yield holder, place
    elif isinstance(value, dict | list) and key not in {"columns", "options"}:
        for below in value if isinstance(value, dict) else range(len(value)):
            yield from _paths(value, (*place, below))


def _resolve_path(holder: dict[str, Any], key: str, base: Path) -> str | None:
    """Make an existing path absolute, in place; return what is wrong with one that cannot be a hub id."""
    value: str = holder[key]
    scorer = _SCORER_FILE.match(value) if key == "function" else None
    if key == "function" and scorer is None:
        return None  # a dotted path or an entry point
    path = base / os.path.expanduser(scorer["file"] if scorer else value)
    if os.path.isfile(path) if scorer else os.path.exists(path):  # a Path's own raise for a name that is too long
        holder[key] = str(path.resolve()) + (scorer["attribute"] if scorer else "")
    elif key == "template":
        folder = Path(path).parent
        beside = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        return f"found {value!r}; there is no such file: {path}{errors.did_you_mean(Path(path).name, beside)}"
    elif scorer or value.startswith(("/", "./", "../", "~")) or (key == "path" and _DATA_FILE.search(value)):
        kind = "file" if scorer else "file or folder" if key == "path" else "model folder"
        return f"found {value!r}; there is no such {kind}: {path}"
    return None


# --- the recipe -------------------------------------------------------------------------------------------------


def _within_budget(content: dict[str, Any], origin: Origin, problems: list[str]) -> dict[str, Any]:
    """Return the recipe with the settings of its ``quick`` section, where that budget is asked for."""
    settings, quick = content.get("config", {}), content.get("quick")
    if content.get("budget") == "quick" and not isinstance(quick, dict):
        problems.append(origin.sentence(("budget",), f"found 'quick', but {origin.source} has no section quick"))
    elif content.get("budget") == "quick" and isinstance(settings, dict):
        return {**content, "config": _merged(settings, quick)}
    return content


def _merged(settings: Any, changes: Any) -> Any:
    """Return settings with those of ``changes`` in their place, section by section."""
    if not (isinstance(settings, dict) and isinstance(changes, dict)):
        return changes
    return {**settings, **{key: _merged(settings.get(key), value) for key, value in changes.items()}}


@dataclass(frozen=True)
class _QuickOrigin(Origin):
    """Where the settings of ``config`` with those of ``quick`` in their place came from."""

    config: Any = None
    quick: Any = None

    def sentence(self, path: tuple[Key, ...], text: str, anchor: tuple[Key, ...] | None = None) -> str:
        place = path if anchor is None else anchor
        in_config, in_quick = _depth(self.config, place), _depth(self.quick, place)
        by_quick = self.option(place) is None and (in_quick > in_config or in_quick == len(place))
        return Origin.sentence(replace(self, prefix=("quick",)) if by_quick else self, path, text, anchor)


def _depth(section: Any, place: tuple[Key, ...]) -> int:
    """Return how many keys of a place, from the first, stand in a section."""
    for depth, key in enumerate(place):
        try:
            section = section[key]
        except (LookupError, TypeError):
            return depth
    return len(place)


def _named_task(content: Mapping[str, Any], path: str | Path | None) -> str | Path | None:
    """Return the task that a recipe names; a path is relative to the recipe."""
    name = content.get("task")
    if not isinstance(name, str):
        return None
    return Path(path).parent / os.path.expanduser(name) if path is not None and find.is_path(name) else name


def _recipe(
    content: Mapping[str, Any], origin: Origin, method: str, card: TaskCard | None, problems: list[str]
) -> Recipe | None:
    recipe, more = check_recipe(content, origin, card)
    problems += more
    name = content.get("method")
    if isinstance(name, str) and name != method:
        text = f"found {name!r}, but the method asked for is {method!r}; give the recipe of {method}, or train {name}"
        problems.append(origin.sentence(("method",), text))
    return recipe


def check_recipe(content: Mapping[str, Any], origin: Origin, card: TaskCard | None) -> tuple[Recipe | None, list[str]]:
    """Check all of a recipe but its method and the settings of that, with the objectives of ``card`` where it is known.

    Returns as :func:`moalign.config.validate.check`.
    """
    recipe, wrong = check_places(Recipe, content, origin)
    problems = list(dict.fromkeys(text for _, text in wrong))
    if card is None:
        return recipe, problems
    refused = {place[:2] for place, _ in wrong}
    for key in ("prefs", "holdout"):
        rows = content.get(key)
        for index, row in enumerate(rows if isinstance(rows, list) else ()):
            if refused & {(key,), (key, index)}:
                continue
            try:
                preferences.validate(row, card.objective_names, origin.sentence((key, index), "found"))
            except RequestError as error:
                problems += error.problems
    return recipe, problems


def _config(
    content: Mapping[str, Any],
    given: Mapping[str, Any],
    origin: Origin,
    config_class: type[Strict],
    task: str | Path | None,
    problems: list[str],
) -> Strict | None:
    """Return the method's config; what is wrong with the settings of ``quick`` is a problem whatever the budget.

    ``given`` is the recipe before its budget, and the options that change its config, went into ``content``.
    """
    section, settings, quick = content.get("config", {}), given.get("config", {}), given.get("quick")
    if not isinstance(section, dict):
        return None
    plain = replace(origin, prefix=("config",))
    with_quick = _QuickOrigin(plain.source, plain.lines, plain.prefix, plain.given, settings, quick)
    by_quick = content.get("budget") == "quick"
    config, more = check(config_class, _filled(section, config_class, task), with_quick if by_quick else plain)
    problems += more
    if isinstance(quick, dict) and isinstance(settings, dict) and not by_quick:
        known = check(config_class, _filled(settings, config_class, task), plain)[1]
        more = check(config_class, _filled(_merged(settings, quick), config_class, task), with_quick)[1]
        problems += [text for text in more if text not in known]
    return config


def _filled(section: dict[str, Any], config_class: type[Strict], task: str | Path | None) -> dict[str, Any]:
    """Return a method's settings, sections that it borrows filled in from the task's recipes of other methods."""
    borrowed = [] if task is None else config_class.borrows(section).items()
    files = {name: task and find.find_recipe_file(task, lender) for name, lender in borrowed}
    for name, file in files.items():
        config = yaml_lines.load(file).data.get("config") if file is not None else None
        defaults, settings = config.get(name) if isinstance(config, dict) else None, section.get(name, {})
        if isinstance(defaults, dict) and isinstance(settings, dict):
            section = {**section, name: {**defaults, **settings}}
    return section

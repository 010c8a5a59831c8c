"""From a name or a file, and ``--set`` options, to a checked card, recipe and method config.

All problems of the card, the recipe, the method's config and the options are raised together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from moalign.config import find, overrides, yaml_lines
from moalign.config.card import TaskCard
from moalign.config.describe import is_model
from moalign.config.recipe import PolicySpec, Recipe
from moalign.config.strict import Strict
from moalign.config.validate import Origin, check
from moalign.config.yaml_lines import Document
from moalign.core import errors, preferences
from moalign.core.errors import RequestError

_RECIPE_KEYS = tuple(name for name in Recipe.model_fields if name not in {"method", "task"})
_DATA_FILE = re.compile(r"\.(jsonl|json|csv|parquet)(\.gz)?$")
_SCORER_FILE = re.compile(r"^(?P<file>.+\.py):(?P<attribute>[^/]*)$")


@dataclass(frozen=True)
class ResolvedRequest:
    """One training request, checked: what is run, and what the user wrote."""

    recipe: Recipe
    """``recipe.config`` holds every setting of the method, defaults included."""
    config: Strict
    """The method's own ``Config``."""
    card: TaskCard
    as_given: dict[str, Any]
    """Method, task, the recipe file with its unchanged content, the ``--set`` texts: for the run record."""
    card_path: Path
    recipe_path: Path | None


@dataclass(frozen=True)
class _Set:
    """One ``--set``: the key path inside the card or the recipe, and the label that messages use."""

    keys: tuple[str, ...]
    value: Any
    label: str


@dataclass
class _Section:
    """A file's data with the options applied, and where each value came from."""

    data: dict[str, Any]
    document: Document | None
    sets: Sequence[_Set]
    source: str

    def origin(self, *prefix: str) -> Origin:
        """Return where the values below ``prefix`` came from."""
        size = len(prefix)
        labels = {item.keys[size:]: item.label for item in self.sets if item.keys[:size] == prefix}
        return Origin(self.source, self.document, prefix, labels)


def load_card(name_or_path: str | Path, overrides: Sequence[str] = ()) -> TaskCard:
    """Return the checked task card.

    Args:
        name_or_path: a task's name, a card file, or a folder that holds ``task.yaml``.
        overrides: ``--set`` texts, each ``task.key=value``.

    Paths in the card (``model``, ``data.*.path``, a classifier's ``model``, the file of a ``function``) become absolute
    when such a file or folder exists: relative to the card's folder, or to the current directory for ``--set``. Hub
    ids stay.

    Raises:
        RequestError: every problem of the card and of the options.
    """
    card_sets, _, problems = _sort(overrides, None)
    card, _, more = _card(name_or_path, card_sets, "--task")
    if card is None or problems:
        raise RequestError(*problems, *more)
    return card


def recipe_names(path: str | Path) -> tuple[str, str]:
    """Return ``(method, task)`` of a recipe file, read before the method's ``Config`` is known.

    Raises RequestError when the file is broken or does not name both; other problems are left to
    :func:`load_recipe`.
    """
    document = yaml_lines.load(path)
    names = [document.data.get(key) for key in ("method", "task")]
    wrong = [
        f"{document.source}:{document.line(key)}: {key}: "
        + ("missing" if name is None else f"found {name!r}")
        + f"; allowed: the name of a {key}"
        + (errors.did_you_mean(key, [str(k) for k in document.data]) if name is None else "")
        for key, name in zip(("method", "task"), names, strict=True)
        if not isinstance(name, str)
    ]
    if wrong:
        raise RequestError(*wrong)
    return str(names[0]), str(names[1])


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
        overrides: ``--set`` texts. ``task.X`` goes to the card; ``policy.X``, ``config.X``, ``needs.X``, ``seed``
            and the like go to the recipe; ``X`` alone, a key of ``config_class``, is short for ``config.X``.
        config_class: the method's ``Config``.

    Raises:
        RequestError: every problem of recipe, config, card and options at once.
    """
    card_sets, recipe_sets, problems = _sort(overrides, config_class)
    section, more = _recipe_section(path, method, task, recipe_sets)
    problems += more
    requested, where = _requested_task(section, path, task)
    card, card_path, more = _card(requested, card_sets, where) if requested is not None else (None, None, [])
    problems += more
    recipe, config = None, None
    if section is not None:
        recipe, config, more = _recipe(section, method, config_class, card, requested)
        problems += more
    if problems or recipe is None or config is None or card is None or card_path is None:
        raise RequestError(*problems)
    as_given = {
        "method": method,
        "task": str(requested),
        "recipe_file": None if path is None else yaml_lines.shown(path),
        "recipe": section.document.data if section and section.document else None,
        "set": list(overrides),
    }
    return ResolvedRequest(recipe, config, card, as_given, card_path, None if path is None else Path(path))


# --- options ----------------------------------------------------------------------------------------------------


def _sort(texts: Sequence[str], config_class: type[Strict] | None) -> tuple[list[_Set], list[_Set], list[str]]:
    """Parse ``--set`` texts; return those of the card, those of the recipe, and the problems.

    Without ``config_class`` only keys of the card are allowed.
    """
    card: list[_Set] = []
    recipe: list[_Set] = []
    problems: list[str] = []
    config_keys = set(config_class.model_fields) if config_class else set()
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
        elif keys[0] in config_keys:
            recipe.append(_Set(("config", *keys), value, label))
        else:
            problems.append(f"{label}: {_not_a_setting(keys, config_class)}")
    return card, recipe, problems


def _not_a_setting(keys: tuple[str, ...], config_class: type[Strict] | None) -> str:
    """Return the allowed settings as text; for a bare key of the card or the policy, suggest it with its section."""
    if keys[0] in {"task", "method"}:
        option = "--task NAME, and its keys with --set task.KEY" if keys[0] == "task" else "the argument METHOD"
        return f"the {keys[0]} itself is not a setting; name it with {option}"
    offered = {name: f"task.{name}" for name in TaskCard.model_fields} | {"task": "task"}
    allowed = ["task.KEY"]
    if config_class is not None:
        config_keys = list(config_class.model_fields)
        offered |= {name: f"policy.{name}" for name in PolicySpec.model_fields}
        offered |= {name: name for name in (*_RECIPE_KEYS, *config_keys)}
        sections = [f"{name}.KEY" if _is_section(name) else name for name in _RECIPE_KEYS]
        allowed = [*config_keys, *sections, *allowed]
    near = errors.nearest(keys[0], offered)
    hint = f"; did you mean {'.'.join((offered[near], *keys[1:]))!r}?" if near else ""
    return f"unknown setting; allowed: {', '.join(allowed)}{hint}"


def _is_section(name: str) -> bool:
    annotation = Recipe.model_fields[name].annotation
    return is_model(annotation) or get_origin(annotation) is dict


def _apply(data: Mapping[str, Any], sets: Sequence[_Set]) -> tuple[dict[str, Any], list[str]]:
    result, problems = dict(data), []
    for item in sets:
        try:
            result = overrides.apply(result, [(item.keys, item.value)])
        except RequestError as error:
            problems += [f"{item.label}: {text.split(': ', 1)[1]}" for text in error.problems]
    return result, problems


# --- the card ---------------------------------------------------------------------------------------------------


def _card(name_or_path: str | Path, sets: Sequence[_Set], where: str) -> tuple[TaskCard | None, Path | None, list[str]]:
    try:
        file = find.find_task_file(name_or_path, where)
        document = yaml_lines.load(file)
    except RequestError as error:
        return None, None, list(error.problems)
    data, problems = _apply(document.data, sets)
    section = _Section(data, document, sets, document.source)
    problems += _resolve_paths(section, file)
    card, more = check(TaskCard, data, section.origin())
    problems += more
    return (None if problems else card), file, problems


def _resolve_paths(section: _Section, file: Path) -> list[str]:
    """Make the card's existing relative paths absolute, in place; return those that cannot be a hub id."""
    data, origin, problems = section.data, section.origin(), []
    places: list[tuple[str | int, ...]] = [("model",)]
    if isinstance(data.get("data"), dict):
        places += [("data", name, "path") for name in ("prompts", "responses", "pairs")]
        pairs = data["data"].get("pairs")
        if isinstance(pairs, dict) and "path" not in pairs:
            places += [("data", "pairs", name, "path") for name, source in pairs.items() if isinstance(source, dict)]
    if isinstance(data.get("objectives"), list):
        places += [
            ("objectives", index, key) for index in range(len(data["objectives"])) for key in ("model", "function")
        ]
    for place in places:
        holder: Any = data
        for key in place[:-1]:
            holder = holder.get(key) if isinstance(holder, dict) else holder[key]
        value = holder.get(place[-1]) if isinstance(holder, dict) else None
        if not isinstance(value, str):
            continue
        base = Path.cwd() if origin.option(place) else file.resolve().parent
        scorer = _SCORER_FILE.match(value) if place[-1] == "function" else None
        if place[-1] == "function" and scorer is None:
            continue  # a dotted path or an entry point
        path = base / os.path.expanduser(scorer["file"] if scorer else value)
        if scorer:
            holder[place[-1]] = f"{path.resolve()}:{scorer['attribute']}"
            if not path.is_file():
                problems.append(origin.sentence(place, f"found {value!r}; there is no such file: {path}"))
        elif os.path.exists(path):
            holder[place[-1]] = str(path.resolve())
        elif value.startswith(("/", "./", "../", "~")) or (place[-1] == "path" and _DATA_FILE.search(value)):
            kind = "file or folder" if place[-1] == "path" else "model folder"
            problems.append(origin.sentence(place, f"found {value!r}; there is no such {kind}: {path}"))
    return problems


# --- the recipe -------------------------------------------------------------------------------------------------


def _recipe_section(
    path: str | Path | None, method: str, task: str | Path | None, sets: Sequence[_Set]
) -> tuple[_Section | None, list[str]]:
    if path is None:
        document, source = None, f"{method} without a recipe"
        data: dict[str, Any] = {"method": method, "task": str(task) if task is not None else "sandbox"}
    else:
        try:
            document = yaml_lines.load(path)
        except RequestError as error:
            return None, list(error.problems)
        data, source = dict(document.data), document.source
        if task is not None:
            data["task"] = str(task)
    data, problems = _apply(data, sets)
    return _Section(data, document, sets, source), problems


def _requested_task(
    section: _Section | None, path: str | Path | None, task: str | Path | None
) -> tuple[str | Path | None, str]:
    """Return the task to load, and what messages name when it does not exist."""
    if task is not None or section is None:
        return task, "--task"
    name = section.data.get("task")
    if not isinstance(name, str):
        return None, ""
    beside = Path(path).parent / os.path.expanduser(name) if path is not None else name
    # A path in a recipe is relative to the recipe.
    return (beside if find.is_path(name) else name), f"{section.origin().at(('task',))}: task"


def _recipe(
    section: _Section, method: str, config_class: type[Strict], card: TaskCard | None, requested: str | Path | None
) -> tuple[Recipe | None, Strict | None, list[str]]:
    recipe, problems = check(Recipe, section.data, section.origin())
    name = section.data.get("method")
    if isinstance(name, str) and name != method:
        text = f"found {name!r}, but the method asked for is {method!r}; give the recipe of {method}, or train {name}"
        problems.append(section.origin().sentence(("method",), text))
    plain = section.data.get("config", {})
    config: Strict | None = None
    if isinstance(plain, dict):
        if card is not None and requested is not None:
            plain = {**plain, **_borrowed(config_class.borrows(plain), plain, requested)}
        config, more = check(config_class, plain, section.origin("config"))
        problems += more
    if recipe is not None and card is not None:
        for key in ("prefs", "holdout"):
            for index, weights in enumerate(getattr(recipe, key) or ()):
                try:
                    preferences.validate(
                        weights, card.objective_names, section.origin().sentence((key, index), "found")
                    )
                except RequestError as error:
                    problems += error.problems
    if problems or recipe is None or config is None:
        return None, None, problems
    return recipe.model_copy(update={"config": config.model_dump(mode="json")}), config, []


def _borrowed(sections: Mapping[str, str], plain: Mapping[str, Any], task: str | Path) -> dict[str, Any]:
    """Return the config sections that the task's recipes of other methods fill in."""
    filled = {}
    for section, method in sections.items():
        file = find.find_recipe_file(task, method)
        config = yaml_lines.load(file).data.get("config") if file is not None else None
        defaults, settings = config.get(section) if isinstance(config, dict) else None, plain.get(section, {})
        if isinstance(defaults, dict) and isinstance(settings, dict):
            filled[section] = {**defaults, **settings}
    return filled

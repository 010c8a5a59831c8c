"""Where recipes and task cards are, and how a name finds its file.

Layout: ``<root>/<task>/task.yaml`` is a card, ``<root>/<task>/<method>.yaml`` a recipe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moalign.config import yaml_lines
from moalign.core import errors
from moalign.core.errors import RequestError

CARD = "task.yaml"
_SUFFIXES = (".yaml", ".yml")
_TASK_AND_METHOD = re.compile(r"[^/.~][^/]*/[^/]+")


def recipes_root() -> Path:
    """Return the folder of the recipes: inside an installed wheel, else that of the checkout."""
    package = Path(__file__).resolve().parent.parent
    packed = package / "_recipes"
    return packed if packed.is_dir() else package.parent / "recipes"


def list_tasks() -> list[str]:
    """Return the names of the tasks that have a card, sorted."""
    return sorted(card.parent.name for card in recipes_root().glob(f"*/{CARD}"))


def list_recipes() -> list[tuple[str, str, Path]]:
    """Return ``(task, method, file)`` of every recipe, sorted by task and method."""
    files = (file for file in recipes_root().glob("*/*.yaml") if file.name != CARD)
    return sorted((file.parent.name, file.stem, file) for file in files)


def is_path(name: str) -> bool:
    """Return whether ``name`` is written as a path (a separator, ``~`` or a YAML suffix), not as a name."""
    return os.sep in name or name.startswith("~") or name in {".", ".."} or name.endswith(_SUFFIXES)


def find_task_file(name_or_path: str | Path, where: str = "--task") -> Path:
    """Return the card's file for a task name, a card file or a folder that holds ``task.yaml``.

    A task's name goes before a folder of that name here; ``./name`` is the folder in any case. Raises RequestError for
    an unknown name (with the nearest) or a path that does not exist; ``where`` is the option, or the file and line,
    that messages name.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, str) and not is_path(name):
        tasks = list_tasks()
        if name in tasks:
            return recipes_root() / name / CARD
        if not name or not os.path.isfile(Path(name) / CARD):
            raise errors.unknown("task", name, tasks, where)
    path = Path(os.path.expanduser(name))
    file = path / CARD if os.path.isdir(path) else path  # a Path's own raises for a name that is too long
    if not os.path.isfile(file):
        raise RequestError(f"{where}: no task card {file}; give a .yaml file or one of: {', '.join(list_tasks())}")
    return file


def find_card(name: str) -> Path | None:
    """Return the card that ``name`` means; None when it means something else.

    A card is a task's name, a folder that holds ``task.yaml``, a file of that name, or a YAML file that lists
    ``objectives`` and names no ``method``.
    """
    path = Path(os.path.expanduser(name))
    if name in list_tasks() or (name and os.path.isfile(path / CARD)):
        return find_task_file(name)
    if not os.path.isfile(path) or path.suffix not in _SUFFIXES:
        return None
    if path.name == CARD:
        return path
    try:
        data = yaml_lines.load(path).data
    except RequestError:
        return None  # whoever reads it as a recipe or a card reports what is broken
    return path if "objectives" in data and "method" not in data else None


def find_recipe_file(task: str | Path, method: str) -> Path | None:
    """Return the recipe of ``method`` for ``task``; None without one.

    It stands beside the task's card, or beside the card that the task's ``recipes_from`` names. Raises RequestError
    when a task does not exist or its card is broken.
    """
    card = find_task_file(task)
    file = card.parent / f"{method}.yaml"
    if os.path.isfile(file):
        return file
    document = yaml_lines.load(card)
    lender = document.data.get("recipes_from")
    if not isinstance(lender, str):
        return None
    where = f"{document.source}:{document.line('recipes_from')}: recipes_from"
    borrowed = find_task_file(lender, where).parent / f"{method}.yaml"
    return borrowed if os.path.isfile(borrowed) else None


def find_recipe(name_or_path: str | Path, where: str = "RECIPE") -> Path:
    """Return the file of a recipe named ``task/method`` or given as a path.

    Raises RequestError for a path that does not exist, or an unknown name, with the nearest: of a task, too, for those
    who take either (:func:`find_card`).
    """
    name = str(name_or_path)
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    known = {f"{task}/{method}": file for task, method, file in list_recipes()}
    if name in known:
        return known[name]
    if isinstance(name_or_path, Path) or name.endswith(_SUFFIXES):
        raise RequestError(f"{where}: no recipe file {path}")
    if is_path(name) and (os.path.isdir(path) or not _TASK_AND_METHOD.fullmatch(name)):
        state = f"a folder without {CARD}" if os.path.isdir(path) else "no such file or folder"
        raise RequestError(f"{where}: {state}: {path}")
    tasks = list_tasks()
    hint = errors.did_you_mean(name, [*tasks, *known])
    allowed = f"a file, TASK or TASK/METHOD with TASK one of {', '.join(tasks)}"
    raise RequestError(f"{where}: unknown recipe or task {name!r}; allowed: {allowed}{hint}")

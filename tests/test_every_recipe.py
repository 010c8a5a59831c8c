"""Walks ``recipes/``: every file loads with its method's own settings, says how it is run, and sources its numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from moalign.config import find, load, yaml_lines
from moalign.config.yaml_lines import Document
from moalign.methods import registry

CARDS = find.list_tasks()
RECIPES = find.list_recipes()
NAMES = [f"{task}/{method}" for task, method, _ in RECIPES]
FILES = [find.find_task_file(task) for task in CARDS] + [path for _, _, path in RECIPES]
IDS = [f"{path.parent.name}/{path.stem}" for path in FILES]

Keys = tuple[str | int, ...]


def numbers(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Yield the key path of every number below ``value``; true and false are no numbers."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            yield from numbers(below, (*keys, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, below in enumerate(value):
            yield from numbers(below, (*keys, index))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield keys


def sourced_keys(document: Document) -> set[str]:
    """Return the dotted paths that the file's own ``sources`` names; ``config.`` may be left out."""
    told = {str(key) for key in document.data.get("sources") or {}}
    measured = {"needs"} if (document.data.get("needs") or {}).get("measured") else set()
    # Every number that a paper reports has its source beside it: the recipe is not valid without.
    return told | {f"config.{key}" for key in told} | measured | {"reported"}


def without_source(path: Path) -> list[str]:
    """Return the numbers of a file that neither ``sources`` nor a comment on their line or section explains.

    What a recipe ``needs`` is explained by its field ``measured``.
    """
    document, lines = yaml_lines.load(path), path.read_text(encoding="utf-8").splitlines()
    told = sourced_keys(document)
    missing = []
    for keys in numbers(document.data):
        names = [str(key) for key in keys if isinstance(key, str)]
        prefixes = {".".join(names[: size + 1]) for size in range(len(names))}
        # A comment explains its line: the number itself, or the section that begins there.
        at = {document.line(*keys[: size + 1]) for size in range(len(keys))}
        if not (prefixes & told or any("#" in lines[line - 1] for line in at)):
            missing.append(f"{path.name}:{document.line(*keys)}: {'.'.join(str(key) for key in keys)}")
    return missing


def test_there_are_recipes() -> None:
    assert {"sandbox", "sandbox-3", "sandbox-cold", "stories"} <= set(CARDS)
    assert {"sandbox/sft", "sandbox/ric", "sandbox/mo-odpo", "sandbox/best-of-n"} <= set(NAMES)


@pytest.mark.parametrize("task", CARDS)
def test_card_is_valid_and_named_as_its_folder(task: str) -> None:
    card = load.load_card(task)
    assert card.name == task
    assert card.description
    unknown = set(card.suite) - set(registry.names())
    assert not unknown, f"the suite of {task} names no method: {sorted(unknown)}"


@pytest.mark.parametrize(("task", "method", "path"), RECIPES, ids=NAMES)
def test_recipe_is_valid_with_the_settings_of_its_method(task: str, method: str, path: Path) -> None:
    resolved = load.load_recipe(path, method, None, (), registry.get(method).Config)
    assert (resolved.recipe.task, resolved.recipe.method) == (task, method)
    assert resolved.card.name == task
    assert set(yaml_lines.load(path).data.get("config") or {}) <= set(type(resolved.config).model_fields)


@pytest.mark.parametrize(("task", "method", "path"), RECIPES, ids=NAMES)
def test_a_quick_budget_changes_only_what_it_names(task: str, method: str, path: Path) -> None:
    quick = yaml_lines.load(path).data.get("quick")
    if quick is None:
        return
    full, less = (
        load.load_recipe(path, method, None, [f"budget={name}"], registry.get(method).Config).recipe.config
        for name in ("full", "quick")
    )
    named = {".".join(map(str, keys)) for keys in numbers(quick)}
    changed = {".".join(map(str, keys)) for keys in numbers(less) if at(less, keys) != at(full, keys)}
    assert changed == named


def at(value: Any, keys: Keys) -> Any:
    """Return what stands at a key path."""
    return at(value[keys[0]], keys[1:]) if keys else value


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_header_says_the_command_and_what_it_needs(path: Path) -> None:
    header = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        header.append(line)
    commands = [match[1] for line in header if (match := re.match(r"# command:\s*(moalign \S.*)", line))]
    assert len(commands) == 1, f"{path.name}: one header line '# command: moalign ...'"
    assert any(re.match(r"# needs:\s*\S", line) for line in header), f"{path.name}: a header line '# needs: ...'"
    if path.name != find.CARD:
        assert f" {path.stem}" in commands[0]
        assert path.parent.name in commands[0] or path.parent.name == "sandbox"  # the default task


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_every_number_has_a_source(path: Path) -> None:
    missing = without_source(path)
    assert not missing, "no comment and no entry in 'sources' explains: " + "; ".join(missing)


def test_a_number_without_source_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "method: x\ntask: t\nconfig:\n  steps: 3\n  lr: 1e-4  # paper, table 2\n  online: {batch: 8}\n"
        "  offline:  # appendix B\n    steps: 7\n  beta: 0.1\n  on: true\nsources:\n  config.beta: paper\n"
    )
    assert without_source(path) == ["x.yaml:4: config.steps", "x.yaml:6: config.online.batch"]

"""Names and paths of tasks and recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.config import find
from moalign.core.errors import RequestError


def test_the_root_is_the_wheels_folder_when_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "moalign"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr(find, "__file__", str(package / "config" / "find.py"))
    assert find.recipes_root() == tmp_path.resolve() / "recipes"
    assert find.list_tasks() == []  # no such folder: nothing listed, nothing raised
    assert find.list_recipes() == []
    (package / "_recipes").mkdir()
    assert find.recipes_root() == package.resolve() / "_recipes"


def test_lists(recipes: Path) -> None:
    (recipes / "alpha").mkdir()
    (recipes / "alpha" / "task.yaml").touch()
    (recipes / "alpha" / "mo-odpo.yaml").touch()
    (recipes / "notes").mkdir()
    assert find.list_tasks() == ["alpha", "demo"]
    assert find.list_recipes() == [
        ("alpha", "mo-odpo", recipes / "alpha" / "mo-odpo.yaml"),
        ("demo", "ric", recipes / "demo" / "ric.yaml"),
    ]


def test_a_task_by_name_file_or_folder(recipes: Path) -> None:
    card = recipes / "demo" / "task.yaml"
    assert find.find_task_file("demo") == card
    assert find.find_task_file(str(card)) == card
    assert find.find_task_file(card.parent) == card
    assert find.find_task_file("recipes/demo") == Path("recipes/demo/task.yaml")
    assert find.find_task_file("./recipes/demo/task.yaml") == Path("recipes/demo/task.yaml")


def test_a_folder_here_does_not_hide_a_task_of_that_name(recipes: Path) -> None:
    Path("demo").mkdir()
    assert find.find_task_file("demo") == recipes / "demo" / "task.yaml"


def test_a_folder_here_with_a_card_needs_no_slash(recipes: Path) -> None:
    Path("mine").mkdir()
    with pytest.raises(RequestError, match="unknown task 'mine'"):
        find.find_task_file("mine")
    Path("mine/task.yaml").touch()
    assert find.find_task_file("mine") == Path("mine/task.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dmeo", "--task: unknown task 'dmeo'; allowed: demo; did you mean 'demo'?"),
        ("zzz", "--task: unknown task 'zzz'; allowed: demo"),
        ("", "--task: unknown task ''; allowed: demo"),
        ("none.yaml", "--task: no task card none.yaml; give a .yaml file or one of: demo"),
        ("recipes", "--task: unknown task 'recipes'; allowed: demo"),
        ("./recipes", "--task: no task card recipes/task.yaml"),
        ("~nobody-of-this-name/x", "--task: no task card ~nobody-of-this-name/x"),
    ],
)
def test_unknown_tasks(recipes: Path, name: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        find.find_task_file(name)
    assert str(caught.value).startswith(expected)


def test_recipes_of_a_task(recipes: Path) -> None:
    recipe = recipes / "demo" / "ric.yaml"
    assert find.find_recipe_file("demo", "ric") == recipe
    assert find.find_recipe_file(recipes / "demo" / "task.yaml", "ric") == recipe
    assert find.find_recipe_file("demo", "sft") is None
    with pytest.raises(RequestError, match="unknown task"):
        find.find_recipe_file("demos", "ric")


def test_a_recipe_by_name_or_path(recipes: Path) -> None:
    recipe = recipes / "demo" / "ric.yaml"
    assert find.find_recipe("demo/ric") == recipe
    assert find.find_recipe(str(recipe)) == recipe
    assert find.find_recipe(recipe) == recipe
    listed = "allowed: a file, TASK or TASK/METHOD with TASK one of demo; did you mean"
    with pytest.raises(RequestError, match=rf"^RECIPE: unknown recipe or task 'demo/rick'; {listed} 'demo/ric'\?$"):
        find.find_recipe("demo/rick")
    with pytest.raises(RequestError, match=rf"^RECIPE: unknown recipe or task 'dmeo'; {listed} 'demo'\?$"):
        find.find_recipe("dmeo")
    with pytest.raises(RequestError, match=r"^--recipe: no recipe file none.yaml"):
        find.find_recipe("none.yaml", "--recipe")


@pytest.mark.parametrize("name", ["./none", "/none", "~/none", "none/", "a/b/none", ".", "..", "./recipes"])
def test_what_is_written_as_a_path_is_looked_for_as_one(recipes: Path, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        find.find_recipe(name)
    (text,) = caught.value.problems
    state = "a folder without task.yaml" if name in {".", "..", "./recipes"} else "no such file or folder"
    assert text.startswith(f"RECIPE: {state}: ") and "did you mean" not in text


def test_a_task_that_lends_recipes_and_does_not_exist_has_its_line(recipes: Path) -> None:
    card = recipes / "demo" / "task.yaml"
    card.write_text(card.read_text() + "recipes_from: dmeo\n")
    line = len(card.read_text().splitlines())
    with pytest.raises(RequestError, match=rf"^recipes/demo/task\.yaml:{line}: recipes_from: unknown task 'dmeo'; "):
        find.find_recipe_file("demo", "sft")

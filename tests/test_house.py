"""The house has an order: a room imports from itself and from those before it in the list, for typing, too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOMS = (
    "core",
    "config",
    "pareto",
    "runs",
    "report",
    "data",
    "lm",
    "losses",
    "rewards",
    "reward_models",
    "tasks",
    "training",
    "policies",
    "methods",
    "preflight",
    "evaluation",
    "experiment",
    "comparison",
    "api",
    "cli",
)
"""From the ground up: what stands lower never imports what stands above it. CONTRIBUTING.md says what each is for.

A room is a package, or a module that stands alone (``api.py``)."""

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = {"moalign/__init__.py", "moalign/__main__.py"}
"""The front doors: they belong to no room, and no room imports them."""


def _imports(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of everything that a file imports from moalign, wherever in it that stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module == "moalign":
                for alias in node.names:
                    yield node.lineno, f"moalign.{alias.name}"
            elif node.module:
                yield node.lineno, node.module


def faults(root: Path) -> list[str]:
    """Return what is wrong with the order of the package below ``root``, one line each, sorted by file and line."""
    height = {room: floor for floor, room in enumerate(ROOMS)}
    found: list[str] = []
    for path in sorted((root / "moalign").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        if file in OUTSIDE:
            continue
        part = path.relative_to(root / "moalign").parts[0]
        room = part.removesuffix(".py") if part.removesuffix(".py") in height else part
        if room not in height:
            found.append(f"{file}: {room} is no room of the house; they are listed in tests/test_house.py")
            continue
        for line, name in sorted(_imports(path.read_text(encoding="utf-8"))):
            if name.startswith("."):
                found.append(f"{file}:{line} imports {name}: write the whole name")
                continue
            parts = name.split(".")
            if parts[0] != "moalign" or len(parts) == 1:
                continue
            other = parts[1]
            if other not in height:
                if not other.startswith("__"):  # moalign.__version__
                    found.append(f"{file}:{line} imports {name}: {other} is no room of the house")
            elif height[other] > height[room]:
                found.append(f"{file}:{line} imports {name}: {other} stands above {room}")
    return found


def test_no_room_imports_from_one_above_it() -> None:
    assert faults(ROOT) == []


def test_every_room_of_the_list_is_there_and_told_of() -> None:
    """A room that was left must go from the list and from the picture for contributors, which is in the same order."""
    packages = {path.parent.name for path in (ROOT / "moalign").glob("*/__init__.py")}
    alone = {path.stem for path in (ROOT / "moalign").glob("*.py") if f"moalign/{path.name}" not in OUTSIDE}
    assert packages | alone == set(ROOMS)
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("moalign/")
    told = [line.split()[0].rstrip("/").removesuffix(".py") for line in lines[start + 1 : start + 1 + len(ROOMS)]]
    assert told == list(ROOMS)


def test_a_wrong_import_is_found_wherever_it_stands(tmp_path: Path) -> None:
    """At the top, for typing, inside a function, of the package itself: each is named with its line."""
    house = tmp_path / "moalign"
    for name, text in {
        "__init__.py": "from moalign.cli import main\n",
        "core/good.py": "import json\nfrom moalign.core import errors\nfrom moalign import __version__\n",
        "lm/bad.py": (
            "from typing import TYPE_CHECKING\n"
            "from moalign.core import errors\n"
            "from moalign.tasks.task import Task\n"
            "if TYPE_CHECKING:\n"
            "    import moalign.cli.main\n"
            "def late():\n"
            "    from moalign import methods, pareto\n"
            "    from .chat import Codec\n"
            "    from moalign.workflow import train\n"
        ),
        "api.py": "from moalign.experiment import train\nfrom moalign.cli import output\n",
        "attic/old.py": "",
        "loose.py": "from moalign.core import errors\n",
    }.items():
        path = house / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert faults(tmp_path) == [
        "moalign/api.py:2 imports moalign.cli: cli stands above api",
        "moalign/attic/old.py: attic is no room of the house; they are listed in tests/test_house.py",
        "moalign/lm/bad.py:3 imports moalign.tasks.task: tasks stands above lm",
        "moalign/lm/bad.py:5 imports moalign.cli.main: cli stands above lm",
        "moalign/lm/bad.py:7 imports moalign.methods: methods stands above lm",
        "moalign/lm/bad.py:8 imports .chat: write the whole name",
        "moalign/lm/bad.py:9 imports moalign.workflow: workflow is no room of the house",
        "moalign/loose.py: loose.py is no room of the house; they are listed in tests/test_house.py",
    ]

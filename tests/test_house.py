"""The house has an order: a room imports from itself and from those before it in the list, for typing, too.

And a method can be followed: from its ``train`` to its loss a reader opens few files, those that CONTRIBUTING.md names.
"""

from __future__ import annotations

import ast
import re
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


# -- who knows whom by name ------------------------------------------------------------------------------------------

NAMED = {
    "cli/init.py": {"mo-odpo"},  # the recipe that `moalign init` writes
    "experiment/init.py": {"mo-odpo"},
    "training/distil.py": {"hindsight"},  # the value of a setting, warm_start
    "training/settings.py": {"hindsight"},
}
"""What is named away from its package all the same."""


def named_elsewhere(package: Path) -> list[str]:
    """Return where a method's name or a kind of task stands outside ``methods/`` and ``tasks/``, docstrings apart.

    Others ask capabilities, settings or the task itself, so that a plugin's are treated like our own.
    """
    trees = {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }
    names = {Path(file).stem.replace("_", "-") for file in trees if file.startswith("methods/")} - {"base", "registry"}
    for file, tree in trees.items():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and file.startswith("tasks/")]
        names |= {kind.name for kind in classes if any(ast.unparse(base) == "Task" for base in kind.bases)}
    return [
        f"{file}:{node.lineno} names {name}"
        for file, tree in trees.items()
        if not file.startswith(("methods/", "tasks/"))
        for node in ast.walk(tree)
        for name in sorted(names - NAMED.get(file, set()))
        if (isinstance(node, ast.Constant) and node.value == name) or (isinstance(node, ast.Name) and node.id == name)
    ]


def test_methods_and_kinds_of_task_are_named_in_their_packages_alone() -> None:
    assert named_elsewhere(ROOT / "moalign") == []


def test_a_method_or_a_kind_of_task_that_is_named_elsewhere_is_found(tmp_path: Path) -> None:
    for name, text in {
        "methods/my_method.py": "NAME = 'my-method'\n",
        "tasks/task.py": "class Task: ...\nclass ToyTask(Task): ...\n",
        "core/known.py": "'As my-method, ToyTask.'\nif method.name == 'my-method': pass\nisinstance(a, ToyTask)\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert named_elsewhere(tmp_path) == ["core/known.py:2 names my-method", "core/known.py:3 names ToyTask"]


# -- to follow a method ----------------------------------------------------------------------------------------------

FOLLOWED = ("MOC", "RiC", "MO-ODPO", "MODPO", "ParetoHqD")
MOST_FILES, MOST_LINES = 3, 700

BESIDE = {
    "methods.base",  # the contract of all methods
    "training.actor",  # what samples and scores: the adapter and its reference, or a control model of experts
    "training.callbacks",  # order of rows, optimizer, log, checkpoints of trl's trainers
    "training.checkpoints",
    "training.constant_rewards",  # a warning
    "training.diagnostics",  # means of the log's last lines
    "training.distil",  # a stage before, off by default
    "training.dropout",
    "training.grid",  # which adapter is trained
    "training.job",
    "training.kl_budget",  # off by default, as is support
    "training.means",  # of what is logged
    "training.preference_draws",
    "training.reference",  # log-probabilities of fixed rows, kept on disk
    "training.rollout",  # sampling and scoring
    "training.settings",
    "training.support",
}
"""What the files on the way import from these rooms without its being on the way. A module between a method and its
loss belongs into the table of CONTRIBUTING.md, not here."""


def followed(text: str) -> dict[str, tuple[list[str], int]]:
    """Return files (below moalign/) and lines of every row of the table in CONTRIBUTING.md's "To follow a method"."""
    section = text.split("## To follow a method\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    return {name: (re.findall(r"`(\w+/\w+\.py)`", files), int(lines)) for name, files, lines in rows[1:]}


def off_the_way(package: Path, files: list[str]) -> list[str]:
    """Return modules of methods, training and losses that the files import, neither among them nor beside the way.

    Where a loss is among the files, others are not on the way: the online trainer imports PPO's, which MO-ODPO has no
    use for.
    """
    own = {file.removesuffix(".py").replace("/", ".") for file in files}
    rooms = {"methods", "training"} | ({"losses"} if not any(name.startswith("losses.") for name in own) else set())
    found = set()
    for file in files:
        for node in ast.walk(ast.parse((package / file).read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            for module in (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)):
                room, _, rest = module.removeprefix("moalign.").partition(".")
                if room in rooms and (package / room / f"{rest}.py").is_file():
                    found.add(f"{room}.{rest}")
    return sorted(found - own - BESIDE)


def test_a_method_is_followed_in_three_files_and_700_lines() -> None:
    table = followed((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert tuple(table) == FOLLOWED
    for name, (files, said) in table.items():
        lines = sum(len((ROOT / "moalign" / file).read_text(encoding="utf-8").splitlines()) for file in files)
        assert len(files) <= MOST_FILES, f"{name}: {len(files)} files"
        assert lines <= MOST_LINES, f"{name}: {lines} lines in {', '.join(files)}"
        assert abs(lines - said) <= 20, f"{name}: CONTRIBUTING.md says {said} lines, it is {lines}"
        assert files[0] == f"methods/{name.lower().replace('-', '_')}.py"
        assert off_the_way(ROOT / "moalign", files) == [], f"{name}: these are not in CONTRIBUTING.md's table"


def test_a_file_between_a_method_and_its_loss_is_found(tmp_path: Path) -> None:
    for name, text in {
        "methods/mine.py": "from moalign.training.job import Job\nfrom moalign.training.middle import go\n",
        "training/middle.py": "def go():\n    from moalign.losses import dpo\n",
        "training/job.py": "",
        "losses/dpo.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert off_the_way(tmp_path, ["methods/mine.py"]) == ["training.middle"]
    assert off_the_way(tmp_path, ["methods/mine.py", "training/middle.py"]) == ["losses.dpo"]
    assert off_the_way(tmp_path, ["methods/mine.py", "training/middle.py", "losses/dpo.py"]) == []

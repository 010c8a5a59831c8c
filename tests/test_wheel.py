"""The wheel: built from the checkout, installed into a new virtual environment, used outside the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from moalign.config import find

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=told | environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="the extra 'dev' is not installed")
    folder = tmp_path_factory.mktemp("dist")
    done = run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, checkout, cwd=folder
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``moalign`` command of a new environment that holds the wheel; the test environment lends the libraries."""
    root = tmp_path_factory.mktemp("elsewhere")
    assert run(sys.executable, "-m", "venv", root / "venv", cwd=root).returncode == 0
    python = root / "venv" / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=root)
    assert done.returncode == 0, done.stderr
    # Libraries come after the environment's own packages, and .pth files of theirs (an editable moalign) are not read.
    (site,) = (root / "venv" / "lib").glob("python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "venv" / "bin" / "moalign"


def test_it_holds_the_package_the_recipes_and_nothing_else(wheel: Path, checkout: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"moalign"}
    assert "moalign/py.typed" in names
    assets = {path.name for path in (checkout / "moalign" / "report" / "assets").iterdir()}
    assert {"page.html", "page.css"} <= assets <= {Path(name).name for name in names}
    templates = {path.name for path in (checkout / "moalign" / "experiment" / "templates").glob("*.j*")}
    assert {"task.yaml.j2", "prompts.jsonl"} <= templates <= {Path(name).name for name in names}
    files = [path for path in (checkout / "recipes").rglob("*") if path.is_file()]
    recipes = {str(path.relative_to(checkout / "recipes")) for path in files}
    assert {path.suffix for path in files} == {".yaml", ".jsonl", ".gz", ".md"}
    assert recipes == {name.removeprefix("moalign/_recipes/") for name in names if name.startswith("moalign/_recipes/")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_package_is_the_installed_one(installed: Path, tmp_path: Path, checkout: Path) -> None:
    python = installed.parent / "python"
    done = run(python, "-c", "import moalign; print(moalign.__file__, moalign.__version__)", cwd=tmp_path)
    where, version = done.stdout.split()
    assert Path(where).is_relative_to(installed.parents[1])
    assert not Path(where).is_relative_to(checkout)
    assert f'version = "{version}"' in (checkout / "pyproject.toml").read_text()


def test_ls_recipes(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "ls", "recipes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for task, method, _ in find.list_recipes():
        assert any(task in line and method in line for line in done.stdout.splitlines()), (task, method)


def test_train_dry_run_writes_nothing(installed: Path, tmp_path: Path) -> None:
    done = run(installed, "train", "ric", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["method"], told["task"]) == ("ric", "sandbox")
    assert not list(tmp_path.iterdir())


def test_eval_points(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("helpfulness,harmlessness\n1,3\n2,2\n3,1\n")
    done = run(installed, "eval", "--points", "points.csv", "--hypervolume", "--ref", "0,0", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told == {
        "hypervolume": 6.0, "points": 3, "front": 3, "objectives": ["helpfulness", "harmlessness"], "ref": [0.0, 0.0]
    }  # fmt: skip

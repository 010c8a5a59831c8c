"""A third party's package adds a method: found by its entry point, trained and evaluated by the same code.

The package under ``plugin_package/`` is made visible as an installer would do it, by a real ``*.dist-info`` on
``sys.path`` whose entry points are those of the package's own ``pyproject.toml``; nothing is installed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moalign.cli.main import main
from moalign.core.errors import RequestError
from moalign.methods import registry

PACKAGE = Path(__file__).resolve().parent / "plugin_package"
ROOT = PACKAGE.parents[1]
RECIPE = PACKAGE / "recipes" / "toy-temperature.yaml"
SMALL = [
    option
    for key in (
        "grid=3",
        "evaluation.prompts=24",
        "evaluation.samples=1",
        "evaluation.bootstrap=100",
        "pool.prompts=24",
    )
    for option in ("--set", f"task.{key}")
]


def write_dist_info(folder: Path, project: Path) -> None:
    """Write what an installer leaves behind for ``project``: METADATA and entry_points.txt."""
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    info = folder / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n")
    lines = [
        line
        for group, points in told["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The two folders that make the plugin visible when they are on ``sys.path``."""
    site = tmp_path_factory.mktemp("site")
    write_dist_info(site, PACKAGE)
    return [str(site), str(PACKAGE)]


@pytest.fixture
def plugin(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin visible in this process, for one test."""
    for folder in installed:
        monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_moalign"]:
        del sys.modules[name]


def run(installed: list[str], *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*installed, str(ROOT)])
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, cwd=cwd, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_without_the_package_there_is_no_such_method() -> None:
    assert "toy-temperature" not in registry.names()
    with pytest.raises(RequestError, match="toy-temperature"):
        registry.get("toy-temperature")


def test_ls_methods_shows_it_beside_our_own(installed: list[str], tmp_path: Path) -> None:
    done = run(installed, "-m", "moalign", "ls", "methods", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "toy-temperature" in done.stdout
    assert "mo-odpo" in done.stdout


@pytest.mark.slow
def test_its_own_test_passes(installed: list[str], tmp_path: Path) -> None:
    tests = str(PACKAGE / "tests")
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, tests, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.usefixtures("plugin")
def test_it_keeps_the_contract() -> None:
    assert "toy-temperature" in registry.names()
    method = registry.get("toy-temperature")
    assert method.name == "toy-temperature"
    assert not method.capabilities.trains
    assert method.Config().model_dump() == {"temperature": 0.5}


@pytest.mark.slow
@pytest.mark.usefixtures("plugin")
def test_it_trains_and_evaluates_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "results"), "--json"]
    asked = ["train", "toy-temperature", "--recipe", str(RECIPE), *SMALL, *where]
    assert main(asked) == 0
    trained = json.loads(capsys.readouterr().out)
    assert (trained["method"], trained["task"], trained["status"]) == ("toy-temperature", "sandbox", "done")
    record = json.loads((Path(trained["run"]) / "run.json").read_text())
    assert record["notes"]["temperature"] == 0.5

    assert main(["eval", trained["run"], *where]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [point["prefs"] for point in told["points"]] == [[0, 1], [0.5, 0.5], [1, 0]]
    assert np.isfinite([point["mean"] for point in told["points"]]).all()
    assert told["optimal_share"] > 0

    assert main(asked) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["run"] == trained["run"]


@pytest.mark.usefixtures("plugin")
def test_a_wrong_setting_of_it_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--results", str(tmp_path / "results")]
    assert main(["train", "toy-temperature", "--recipe", str(RECIPE), "--set", "temprature=1", *where]) == 2
    assert "temperature" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_a_plugin_that_cannot_be_imported_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "broken"\nversion = "1"\n'
        '[project.entry-points."moalign.methods"]\nbroken-one = "no_such_package_anywhere:Method"\n'
    )
    write_dist_info(tmp_path / "site", project)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    registry._entry_points.cache_clear()
    try:
        assert "broken-one" in registry.names()
        with pytest.raises(RequestError, match="no_such_package_anywhere"):
            registry.get("broken-one")
    finally:
        registry._entry_points.cache_clear()

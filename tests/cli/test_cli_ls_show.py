"""``moalign ls`` and ``moalign show`` as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moalign.cli import ls, output
from moalign.cli.show import comment_of
from moalign.config import find
from moalign.core.errors import RequestError
from moalign.lm import builtin
from moalign.methods import registry

CARD = Path(find.recipes_root()) / "sandbox" / "task.yaml"
RECIPE = """\
method: ric
task: demo
description: a recipe for tests
needs: {gpu: A6000 48GB, gpu_memory_gib: 48, minutes: 90}
reported:
  - {method: RiC, metric: hypervolume, value: 0.8, source: "arXiv 2402.10207, table 2"}
policy:
  lora: {r: 8, alpha: 16}  # small
config:
  offline: {steps: 7, lr: 1e-4}
  online_rounds: 2
  offline_part: 5
sources:
  config.offline: paper, section 4
  online_rounds: code
  config.offline.lr: table 9
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes folder with one sound task and recipe."""
    root = tmp_path / "my-recipes"
    (root / "demo").mkdir(parents=True)
    (root / "demo" / "task.yaml").write_text(CARD.read_text().replace("name: sandbox\n", "name: demo\n"))
    (root / "demo" / "ric.yaml").write_text(RECIPE)
    monkeypatch.setattr(find, "recipes_root", lambda: root)
    return root


# -- ls --------------------------------------------------------------------------------


def test_methods_are_listed_with_what_they_need(moalign: Any) -> None:
    content = json.loads(moalign("ls", "methods", "--json").out)
    assert [row["name"] for row in content["methods"]] == registry.names()
    by_name = {row["name"]: row for row in content["methods"]}
    assert by_name["ric"]["needs"] == ["rewards while training"]
    assert by_name["prompting"]["trains"] is False
    out = moalign("ls", "methods").out
    assert "arXiv 2402.10207" in out


def test_a_broken_plugin_does_not_hide_the_others(moalign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    get = registry.get

    def broken(name: str) -> Any:
        if name == "sft":
            raise RequestError("method 'sft': its entry point cannot be loaded")
        return get(name)

    monkeypatch.setattr(registry, "get", broken)
    ended = moalign("ls", "methods", "--json")
    assert ended.code == 0
    assert ended.err == "warning: method 'sft': its entry point cannot be loaded\n"
    assert "ric" in [row["name"] for row in json.loads(ended.out)["methods"]]


def test_tasks_and_recipes_are_listed(moalign: Any, recipes: Path) -> None:
    tasks = json.loads(moalign("ls", "tasks", "--json").out)["tasks"]
    assert [(row["name"], row["objectives"]) for row in tasks] == [("demo", ["helpfulness", "harmlessness"])]
    (row,) = json.loads(moalign("ls", "recipes", "--json").out)["recipes"]
    assert (row["name"], row["gpu"], row["minutes"]) == ("demo/ric", "A6000 48GB", 90)
    assert "demo/ric" in moalign("ls", "recipes").out
    assert "helpfulness, harmlessness" in moalign("ls", "tasks").out


def test_a_broken_card_is_told_and_the_others_are_listed(moalign: Any, recipes: Path) -> None:
    (recipes / "other").mkdir()
    (recipes / "other" / "task.yaml").write_text("name: other\n")
    ended = moalign("ls", "tasks", "--json")
    assert [row["name"] for row in json.loads(ended.out)["tasks"]] == ["demo"]
    assert "task.yaml" in ended.errors[0]


@pytest.mark.slow
def test_runs_are_listed_newest_first_with_their_hypervolume(moalign: Any, toys: None) -> None:
    first = json.loads(moalign("train", "toy", "--json").out)
    moalign("train", "toy", "--seed", "1", "--set", "fail=interrupt")
    rows = json.loads(moalign("ls", "runs", "--json").out)["runs"]
    assert [(row["seed"], row["status"]) for row in rows] == [(1, "interrupted"), (0, "done")]
    assert rows[1]["hypervolume"] == first["evaluation"]["hypervolume"]
    assert rows[0]["hypervolume"] is None
    assert first["run_id"] in moalign("ls", "runs").out


def test_a_narrow_list_of_runs_leaves_identifiers_whole(
    moalign: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns time and day go; at 200, that of a pipe, all is there."""
    row = {
        "run_id": "c228921317d1", "task": "sandbox", "method": "mo-odpo", "seed": 0, "status": "done",
        "created": "2026-11-27T17:21:05", "seconds": 75.0, "hypervolume": 0.5, "optimal_share": 0.8,
    }  # fmt: skip
    for width, there in ((80, False), (200, True)):
        monkeypatch.setattr(output, "PIPED_WIDTH", width)
        output.table(ls._COLUMNS["runs"], [row])
        out = capsys.readouterr().out
        assert "c228921317d1" in out and max(map(len, out.splitlines())) <= width
        assert ("2026-11-27 17:21" in out) == there


def test_without_runs_the_list_is_empty_and_says_how_to_start(moalign: Any) -> None:
    ended = moalign("ls", "runs")
    assert (ended.code, ended.out) == (0, "")
    assert "moalign train METHOD" in ended.err
    assert json.loads(moalign("ls", "runs", "--json").out) == {"runs": []}


def test_models_are_listed_with_what_brings_them(moalign: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "installed", lambda name: None)
    (row,) = json.loads(moalign("ls", "models", "--json").out)["models"]
    assert (row["name"], row["licence"], row["installed"], row["path"]) == (
        "smollm2-135m-instruct", "Apache-2.0", False, None
    )  # fmt: skip
    ended = moalign("ls", "models")
    assert "not installed" in ended.out
    assert "make llm" in ended.out + ended.err


def test_an_unknown_list_names_the_nearest(moalign: Any) -> None:
    ended = moalign("ls", "metods")
    assert ended.code == 2
    assert ended.errors == [
        "unknown list 'metods'; allowed: methods, models, recipes, runs, tasks; did you mean 'methods'?"
    ]


# -- show --------------------------------------------------------------------------------


def test_a_method_is_shown_with_the_defaults_that_it_really_has(moalign: Any) -> None:
    content = json.loads(moalign("show", "ric", "--json").out)
    settings = {row["name"]: row for row in content["settings"]}
    config = registry.get("ric").Config().model_dump()
    assert settings["offline.steps"]["default"] == repr(config["offline"]["steps"])
    assert settings["online.lr"]["default"] == repr(config["online"]["lr"])
    assert settings["filter"]["type"] == "'any_quantile' or 'nondominated'"
    out = moalign("show", "ric").out
    assert "Rewards-in-Context" in out and "preference_map" in out


def test_a_recipe_is_shown_with_the_source_of_every_value(moalign: Any, recipes: Path) -> None:
    content = json.loads(moalign("show", "demo/ric", "--json").out)
    rows = {row["setting"]: row for row in content["settings"]}
    assert (rows["config.offline.lr"]["value"], rows["config.offline.lr"]["source"]) == (1e-4, "table 9")
    assert rows["config.offline.steps"]["source"] == "paper, section 4"
    assert rows["config.online_rounds"]["source"] == "code"
    assert (rows["policy.lora.r"]["value"], rows["policy.lora.r"]["source"]) == (8, "small")
    assert rows["policy.lora.dropout"]["source"] == "default"
    assert rows["config.offline_part"]["source"] == "recipe"
    out = moalign("show", "demo/ric").out
    assert "A6000 48GB, 48 GiB" in out and "moalign train ric --task demo" in out
    by_path = moalign("show", str(recipes / "demo" / "ric.yaml"))
    assert f"--recipe {recipes / 'demo' / 'ric.yaml'}" in by_path.out


@pytest.mark.parametrize(
    ("line", "comment"),
    [
        ("steps: 3  # paper", "paper"),
        ("# all of it", "all of it"),
        ("name: 'a # b'", ""),
        ("name: it's  # ours", "ours"),
        ("colour: a#b", ""),
        ('{a: "x # y"}  # z', "z"),
    ],
)
def test_a_comment_is_told_from_text(line: str, comment: str) -> None:
    assert comment_of(line) == comment


def test_a_task_is_shown_in_full(moalign: Any) -> None:
    assert "evaluation.bootstrap" in moalign("show", "sandbox").out
    assert json.loads(moalign("show", "sandbox", "--json").out)["card"]["grid"] == 11


def test_a_task_is_shown_with_its_scale_once_that_was_fitted_beside_what_a_paper_reports(
    moalign: Any, tmp_path: Path
) -> None:
    from moalign.config.load import load_card
    from moalign.rewards.normaliser import Normaliser
    from moalign.tasks.load import make_task

    (tmp_path / "own").mkdir()
    text = CARD.read_text().replace("name: sandbox\n", "name: own\n")
    (tmp_path / "own" / "task.yaml").write_text(text + "published: {helpfulness: {mean: 0.25, sd: 2}}\n")
    assert "normaliser" not in json.loads(moalign("show", "own", "--json").out)
    folder = make_task(load_card("own"), Path("results")).folder
    scale = Normaliser(
        ("helpfulness", "harmlessness"), (0.5, -1), (1.5, 2), (-3, -4), (3, 4), ((-3.5, 3.25), (-4, 4)), count=320
    )
    scale.to_json(folder / "normaliser.json")
    rows = json.loads(moalign("show", "own", "--json").out)["normaliser"]
    assert rows[0] == {
        "objective": "helpfulness", "count": 320, "mean": 0.5, "sd": 1.5, "low": -3.0, "high": 3.0,
        "bounds": [-3.5, 3.25], "published": {"mean": 0.25, "sd": 2.0},
    }  # fmt: skip
    assert (rows[1]["objective"], rows[1]["published"]) == ("harmlessness", None)
    lines = moalign("show", "own").out.splitlines()
    (line,) = [line.split() for line in lines if line.startswith("helpfulness ")]
    assert line == [
        "helpfulness",
        "320",
        "0.500",
        "1.500",
        "-3.000",
        "3.000",
        "[-3.500,",
        "3.250]",
        "0.250",
        "(sd",
        "2.000)",
    ]
    other = json.loads(moalign("show", "own", "--results", "elsewhere", "--json").out)
    assert "normaliser" not in other


def test_a_run_is_shown_with_what_papers_report(moalign: Any, toys: None, tmp_path: Path) -> None:
    paper = '{method: Toy, metric: hypervolume, value: 1.5, source: "arXiv 1, table 2", setting: "reference point 0"}'
    (tmp_path / "toy.yaml").write_text(f"method: toy\ntask: sandbox\nreported: [{paper}]\n")
    run = json.loads(moalign("train", "toy", "--recipe", "toy.yaml", "--json").out)["run"]
    out = moalign("show", run).out
    assert "what papers report, each in its own setting and from its own reference point:" in out
    assert "reported Toy  hypervolume 1.5 (arXiv 1, table 2; reference point 0)" in out


def test_a_card_is_shown_by_file_or_folder(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "task.yaml").write_text(CARD.read_text().replace("name: sandbox\n", "name: own\n"))
    for name in ("mine", "mine/", "./mine", "mine/task.yaml"):
        content = json.loads(moalign("show", name, "--json").out)
        assert (content["task"], Path(content["path"])) == ("own", Path("mine/task.yaml"))
    (tmp_path / "mine" / "task.yaml").rename(tmp_path / "card.yml")
    out = moalign("show", "card.yml").out
    assert out.startswith("own: ") and "evaluation.bootstrap" in out and "moalign check card.yml" in out


def test_a_broken_card_is_told_with_its_lines(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("name: own\nmethod: ric\n")
    ended = moalign("show", "task.yaml")
    assert ended.code == 2
    assert "task.yaml:2: method: unknown key" in "\n".join(ended.errors)


def test_a_run_is_shown_with_record_and_evaluation(moalign: Any, toys: None) -> None:
    trained = json.loads(moalign("train", "toy", "--json").out)
    content = json.loads(moalign("show", trained["run_id"][:6], "--json").out)
    assert (content["run"], content["status"], content["notes"]["dropped"]) == (trained["run"], "done", 2)
    assert content["evaluation"]["hypervolume"] == trained["evaluation"]["hypervolume"]
    out = moalign("show", trained["run"]).out
    assert "note dropped" in out and "config.steps" in out and "hypervolume" in out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demo/rick", "did you mean 'demo/ric'?"),
        ("ricc", "did you mean 'ric'?"),
        ("nowhere.yaml", "no recipe file nowhere.yaml"),
        ("0123", "unknown run '0123'"),
    ],
)
def test_unknown_names(moalign: Any, recipes: Path, name: str, message: str) -> None:
    ended = moalign("show", name)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]

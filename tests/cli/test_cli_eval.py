"""``moalign eval`` as typed: runs, other preferences and reference points, and the calculator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

POINTS = "helpfulness,harmlessness\n1,3\n2,2\n3,1\n"


@pytest.fixture
def run(moalign: Any, toys: None) -> dict[str, Any]:
    """One finished, evaluated run."""
    content: dict[str, Any] = json.loads(moalign("train", "toy", "--set", "task.evaluation.samples=1", "--json").out)
    return content


def test_without_a_run_the_newest_finished_one_is_told(moalign: Any, run: dict[str, Any]) -> None:
    ended = moalign("eval", "--hypervolume", "--json")
    assert ended.code == 0
    assert run["run"] in ended.err
    content = json.loads(ended.out)
    assert content["run"] == run["run"]
    assert content["objectives"] == ["helpfulness", "harmlessness"]
    assert set(content["points"][0]) >= {"prefs", "mean", "ci"}
    assert {"hypervolume", "hypervolume_ci", "ref", "optimal_share", "indicators"} <= set(content)


def test_text_shows_points_unless_only_the_hypervolume_is_wanted(moalign: Any, run: dict[str, Any]) -> None:
    whole, short = moalign("eval", run["run_id"]).out, moalign("eval", run["run_id"], "--hypervolume").out
    assert "0.5,0.5" in whole and "Kendall's tau" in whole
    assert "0.5,0.5" not in short and "Kendall's tau" not in short
    assert "hypervolume" in short and "optimal share" in short


def test_kl_to_base_and_spacing_are_told_where_they_are_known(
    moalign: Any, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from moalign.cli.outcome import show_summary
    from moalign.evaluation.result import EvalResult

    def shown(**changes: Any) -> str:
        show_summary(EvalResult.model_validate({**content, **changes}))
        return capsys.readouterr().out

    content = json.loads(moalign("eval", run["run_id"], "--json").out)
    points, quality = content["points"], content["quality"]
    assert "KL to base" not in shown()  # the toy tells nothing of its tokens
    assert f"(*), spacing {content['indicators']['spacing']:.3f}\n" in shown() and content["front"] >= 2
    assert "spacing" not in shown(front=1)
    assert "spacing" not in moalign("eval", run["run_id"], "--hypervolume").out
    each = [{**point, "kl": 1.0 + 0.1 * k} for k, point in enumerate(points)]
    moved = shown(points=each, quality={**quality, "kl": 1.5, "kl_bound": False})
    assert re.search(r"^KL to base +1.50 nats per response, 1.00 to 2.00 over the preferences$", moved, re.MULTILINE)
    same = [{**point, "kl": 0.6363} for point in points]
    bound = shown(points=same, quality={**quality, "kl": 0.6363, "kl_bound": True})
    assert re.search(r"^KL to base +≤ 0.64 nats per response$", bound, re.MULTILINE)


def test_an_evaluation_from_before_these_were_kept_is_read(moalign: Any, run: dict[str, Any]) -> None:
    path = Path(run["run"]) / "eval.json"
    content = json.loads(path.read_text())
    spacing = content["indicators"]["spacing"]
    del content["version"], content["indicators"]["spacing"], content["quality"]["kl"], content["quality"]["kl_bound"]
    for point in content["points"]:
        del point["kl"], point["kl_bound"]
    path.write_text(json.dumps(content))
    shown = moalign("eval", run["run_id"])
    assert shown.code == 0 and "collapse rate" in shown.out and "KL to base" not in shown.out
    read = json.loads(moalign("eval", run["run_id"], "--json").out)
    assert read["quality"] == {**content["quality"], "kl": None, "kl_bound": False}
    assert read["indicators"]["spacing"] == spacing, "it follows from the points"


@pytest.mark.slow
def test_held_out_preferences_are_told_beside_the_trained_ones(moalign: Any, toys: None) -> None:
    held = ("train", "toy", "--set", "holdout=[[0.3, 0.7], [0.8, 0.2]]")
    dry = json.loads(moalign(*held, "--dry-run", "--json").out)
    assert dry["holdout"] == [[0.3, 0.7], [0.8, 0.2]]
    assert len(dry["prefs"]) == 9
    assert "held out" in moalign(*held, "--dry-run").out
    ended = moalign(*held)
    assert "9 preferences: hypervolume" in ended.out
    assert "2 preferences: hypervolume" in ended.out
    content = json.loads(moalign("eval", "--json").out)
    assert content["generalisation"]["held_out"]["prefs"] == [[0.3, 0.7], [0.8, 0.2]]
    assert len(content["points"]) == 11
    assert "generalisation" not in json.loads(moalign("eval", "--ref", "0.1,0.1", "--json").out)


def test_several_runs_come_as_a_list(moalign: Any, run: dict[str, Any]) -> None:
    other = json.loads(moalign("train", "toy", "--seed", "7", "--json").out)
    content = json.loads(moalign("eval", run["run_id"], other["run"], "--json").out)
    assert [item["seed"] for item in content["runs"]] == [0, 7]
    item = json.loads(moalign("eval", run["run_id"], run["run"], "--json").out)
    assert item["run_id"] == run["run_id"]  # named twice, told once


def test_other_preferences_are_evaluated_and_kept_apart(moalign: Any, run: dict[str, Any]) -> None:
    content = json.loads(moalign("eval", run["run_id"], "--prefs", "0.25,0.75", "--prefs", "1,0", "--json").out)
    assert [point["prefs"] for point in content["points"]] == [[0.25, 0.75], [1.0, 0.0]]
    assert len(json.loads(moalign("eval", run["run_id"], "--grid", "3", "--json").out)["points"]) == 3
    assert len(json.loads((Path(run["run"]) / "eval.json").read_text())["points"]) == 11


def test_more_answers_to_each_prompt(moalign: Any, run: dict[str, Any]) -> None:
    plain = json.loads(moalign("eval", run["run_id"], "--json").out)
    content = json.loads(moalign("eval", run["run_id"], "--samples", "3", "--json").out)
    assert (plain["samples"], content["samples"]) == (1, 3)
    assert content["prompts"] == plain["prompts"]
    assert content["cost"]["tokens_generated"] > 2 * plain["cost"]["tokens_generated"]
    kept = {file.name for file in Path(run["run"]).glob("eval*.json")}
    assert kept == {"eval.json", "eval-x3.json"}
    on_three = json.loads(moalign("eval", run["run_id"], "--samples", "3", "--grid", "3", "--json").out)
    assert (len(on_three["points"]), on_three["samples"]) == (3, 3)
    assert on_three["points"][0]["mean"] == content["points"][0]["mean"]  # (0, 1), from the same random numbers


def test_another_reference_point_changes_the_hypervolume_only(moalign: Any, run: dict[str, Any]) -> None:
    plain = json.loads(moalign("eval", run["run_id"], "--json").out)
    same = json.loads(moalign("eval", run["run_id"], "--ref", "0,0", "--json").out)
    assert same["hypervolume"] == pytest.approx(plain["hypervolume"])
    assert same["hypervolume_ci"] == pytest.approx(plain["hypervolume_ci"])
    assert same["optimal_share"] == pytest.approx(plain["optimal_share"])
    moved = json.loads(moalign("eval", run["run_id"], "--ref", "0.2,-0.1", "--json").out)
    means = [point["mean"] for point in moved["points"]]
    front = sorted({tuple(mean) for mean in means}, reverse=True)
    area, top = 0.0, -0.1  # by hand: slabs from the right, each above the last
    for x, y in front:
        if x > 0.2 and y > top:
            area += (x - 0.2) * (y - top)
            top = y
    assert moved["hypervolume"] == pytest.approx(area)
    assert moved["ref"] == [0.2, -0.1]
    assert moved["points"] == plain["points"]
    stored = json.loads((Path(run["run"]) / "eval.json").read_text())
    assert stored["ref"] == [0.0, 0.0]


def test_a_reference_point_above_the_optimum_leaves_no_share(moalign: Any, run: dict[str, Any]) -> None:
    content = json.loads(moalign("eval", run["run_id"], "--ref", "9,9", "--json").out)
    assert (content["hypervolume"], content["optimal_share"]) == (0.0, None)
    assert "optimal share" not in moalign("eval", run["run_id"], "--ref", "9,9").out


def test_a_run_named_by_its_path_brings_its_results_folder(
    moalign: Any, run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (tmp_path / run["run"]).resolve()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = json.loads(moalign("eval", str(path), "--json").out)
    assert content["run"] == str(path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown run 'nothing'; runs in results/runs: sandbox/toy/"),
        (["--prefs", "3,7"], "did you mean --prefs 0.3,0.7?"),
        (["--prefs", "1,0", "--grid", "3"], "--prefs and --grid exclude each other"),
        (["--grid", "1"], "--grid 1"),
        (["--samples", "0"], "'--samples': Input should be greater than or equal to 1"),
        (["--ref", "0"], "--ref 0: found 1 number; the task has 2 objectives (helpfulness, harmlessness)"),
        (["--ref", "0,high"], "--ref 0,high: 'high' is not a finite number"),
        (["--minimise"], "--minimise belongs to --points"),
    ],
)
def test_wrong_requests(moalign: Any, run: dict[str, Any], arguments: list[str], message: str) -> None:
    ended = moalign("eval", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]


def test_fixed_preferences_serve_no_others(moalign: Any, toys: None) -> None:
    content = json.loads(moalign("train", "fixed-toy", "--prefs", "0,1", "--prefs", "1,0", "--json").out)
    ended = moalign("eval", content["run"], "--prefs", "0.5,0.5")
    assert ended.code == 2
    assert "answers only for the preferences it was trained on: 0,1; 1,0" in ended.errors[0]


def test_without_runs_the_way_to_one_is_named(moalign: Any) -> None:
    ended = moalign("eval")
    assert ended.code == 2
    assert "no finished run; train one: moalign train METHOD" in ended.errors[0]


def test_an_unfinished_run_is_refused(moalign: Any, toys: None) -> None:
    moalign("train", "toy", "--set", "fail=interrupt")
    (record,) = Path("results").rglob("run.json")
    ended = moalign("eval", str(record.parent))
    assert ended.code == 2
    assert "it is interrupted, not done" in ended.errors[0]


# -- the calculator --------------------------------------------------------------------------------


@pytest.fixture
def points(tmp_path: Path, moalign: Any) -> Path:
    """The table of the contract."""
    path = tmp_path / "points.csv"
    path.write_text(POINTS)
    return path


def test_the_calculator_prints_the_contract_s_object(moalign: Any, points: Path) -> None:
    ended = moalign("eval", "--points", "points.csv", "--hypervolume", "--ref", "0,0", "--json")
    assert ended.code == 0
    assert json.loads(ended.out) == {
        "hypervolume": 6.0,
        "points": 3,
        "front": 3,
        "objectives": ["helpfulness", "harmlessness"],
        "ref": [0.0, 0.0],
    }
    assert ended.err == ""


def test_the_calculator_in_words_with_a_preference(moalign: Any, points: Path) -> None:
    out = moalign("eval", "--points", "points.csv", "--ref", "0,0", "--prefs", "0.25,0.75").out
    assert out.splitlines()[0].split() == ["hypervolume", "6"]
    assert out.splitlines()[-1].split() == ["expected", "utility", "2.5"]


def test_the_calculator_minimises_on_request(moalign: Any, points: Path) -> None:
    content = json.loads(moalign("eval", "--points", "points.csv", "--ref", "4,4", "--minimise", "--json").out)
    assert (content["hypervolume"], content["ref"]) == (6.0, [4.0, 4.0])


def test_points_beyond_the_reference_are_mentioned_on_stderr(moalign: Any, points: Path) -> None:
    ended = moalign("eval", "--points", "points.csv", "--ref", "1,0", "--json")
    assert json.loads(ended.out)["hypervolume"] == 3.0
    assert ended.err.startswith("warning: points.csv: 1 of 3 points add nothing")


@pytest.mark.parametrize(
    ("table", "arguments", "message"),
    [
        ("a,b\n1,2\n3,nan\n", ["--ref", "0,0"], "points.csv:3: row 2, column b: found nan"),
        ("a,b\n1,-inf\n", ["--ref", "0,0"], "points.csv:2: row 1, column b: found -inf"),
        ("a,b\n1,x\n", ["--ref", "0,0"], "row 1, column b: found 'x'"),
        ("a,b\n", ["--ref", "0,0"], "no rows after the header"),
        ("", ["--ref", "0,0"], "empty file"),
        (POINTS, [], "--ref is missing"),
        (POINTS, ["--ref", "0"], "--ref 0: found 1 number"),
        (POINTS, ["--ref", "0,inf"], "'inf' is not a finite number"),
        (POINTS, ["--ref", "0,0", "--prefs", "1,1"], "the weights sum to 2, not 1"),
        (POINTS, ["--ref", "0,0", "--grid", "3"], "--grid is for runs"),
        (POINTS, ["--ref", "0,0", "--samples", "2"], "--samples is for runs"),
        (POINTS, ["--ref", "0,0", "a-run"], "--points and RUN exclude each other"),
    ],
)
def test_faulty_tables_and_options(moalign: Any, points: Path, table: str, arguments: list[str], message: str) -> None:
    points.write_text(table)
    ended = moalign("eval", "--points", "points.csv", "--json", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]


def test_a_table_that_is_not_there(moalign: Any) -> None:
    ended = moalign("eval", "--points", "nowhere.csv", "--ref", "0,0")
    assert ended.code == 2
    assert "nowhere.csv: no such file" in ended.errors[0]

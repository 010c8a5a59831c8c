"""``moalign compare --html``, and every comparison that is refused: one message, exit 2, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.report import figures
from moalign.runs.run import Run

SMALL = [
    "--set",
    "task.evaluation.samples=1",
    "--set",
    "task.evaluation.bootstrap=100",
    "--set",
    "task.evaluation.prompts=6",
    "--set",
    "task.grid=3",
]
TWO = ["compare", "--methods", "toy,fixed-toy", *SMALL, "--json"]

Compare = Callable[..., Any]


@pytest.fixture
def compare(moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """``compare()`` the two toys, or whatever is asked; one figure of no cost stands for all."""
    monkeypatch.setattr(figures, "ALL", {"fronts": lambda record, suffix: b"\x89PNG a figure"})
    return lambda *more: moalign(*TWO, *more)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that keeps the two runs, so that they are trained once."""
    return tmp_path_factory.mktemp("kept") / "results"


@pytest.fixture
def runs(compare: Compare, kept: Path) -> list[Path]:
    """The folders of two finished, evaluated runs."""
    if kept.exists():
        shutil.copytree(kept, "results")
    else:
        ended = compare()
        assert ended.code == 0, ended.err
        shutil.copytree("results", kept)
    (record,) = Path("results/compare").glob("*/compare.json")
    return [Path(run["run"]) for row in json.loads(record.read_text())["rows"] for run in row["runs"]]


def refused(ended: Any, *words: str) -> None:
    """One message on stderr and nothing on stdout."""
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert len(ended.errors) == 1, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.errors[0]


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_is_written_with_every_answer(compare: Compare, tmp_path: Path) -> None:
    ended = compare("--html", "out/page.html")
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert content["html"] == "out/page.html"
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', Path("out/page.html").read_text())
    held, answers = (json.loads(block) for block in blocks)
    assert [row["label"] for row in held["rows"]] == [row["label"] for row in content["rows"]]
    assert held["bounds"] == {"lo": [-8.0, -8.0], "hi": [8.0, 8.0]}
    assert set(answers["rows"]) == {"toy", "fixed-toy"} and len(answers["prompts"]) == 6
    import pandas as pd

    run = next(row for row in content["rows"] if row["label"] == "toy")["runs"][0]
    table = pd.read_parquet(Path(run["run"]) / next(Path(run["run"]).glob("responses*.parquet")).name)
    kept = answers["rows"]["toy"]
    for k, preference in enumerate(("0,1", "0.5,0.5", "1,0")):
        part = table[table["preference"] == preference]
        assert [answers["texts"][i] for i in kept["texts"][k]] == part["response"].tolist()
        assert kept["scores"][k] == pytest.approx(part[["helpfulness", "harmlessness"]].to_numpy(), rel=1e-3)


@pytest.mark.slow
def test_the_page_is_named_in_the_table_and_in_the_markdown(moalign: Any, compare: Compare) -> None:
    ended = moalign(*TWO[:-1], "--html", "page.html")
    assert "html     page.html" in ended.out
    content = json.loads(compare("--html", "page.html").out)
    assert "answers](../../../page.html)" in Path(content["markdown"]).read_text()


def test_numbers_of_papers_stand_apart(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.comparison import jobs
    from moalign.config.recipe import ReportedSpec

    paper = ReportedSpec(method="RiC", metric="hypervolume", value=0.8, source="arXiv 2402.10207, table 2")
    planned = jobs.planned

    def with_numbers(plan: Any) -> Any:
        plan.recipe.reported.append(paper)
        return planned(plan)

    monkeypatch.setattr(jobs, "planned", with_numbers)
    content = json.loads(compare("--html", "page.html").out)
    assert content["reported"] == [paper.model_dump()], "once, though two recipes carry it"
    assert {row["label"] for row in content["rows"]} == {"toy", "fixed-toy"}
    text = Path(content["markdown"]).read_text()
    assert text.index("## Reported by papers, not measured here") > text.index("## Quality and cost")
    assert "| RiC | hypervolume |  | arXiv 2402.10207, table 2 | 0.8 |" in text


def test_a_warning_of_training_is_in_every_output(
    moalign: Any, compare: Compare, monkeypatch: pytest.MonkeyPatch, toys: None
) -> None:
    """The run's record, its evaluation, the verdict of a comparison, its Markdown and its page."""
    from moalign.methods import registry

    method, text = type(registry.get("toy")), "phase online: brevity scored all responses of a step alike in 40 steps"
    train = method.train

    def flat(self: Any, job: Any) -> None:
        train(self, job)
        job.warn([text] if self.name == "toy" else [])  # the other inherits it

    monkeypatch.setattr(method, "train", flat)
    content = json.loads(compare("--html", "page.html").out)
    assert f"toy: {text}." in content["verdict"] and f"fixed-toy: {text}." not in content["verdict"]
    for name in ("markdown", "html"):
        assert text in Path(content[name]).read_text()
    (run,) = (row["runs"][0]["run_id"] for row in content["rows"] if row["label"] == "toy")
    assert json.loads(moalign("eval", run, "--json").out)["warnings"] == [text]
    assert all(f"warning {text}" in " ".join(moalign(verb, run).out.split()) for verb in ("eval", "show"))
    again = moalign("train", "toy", "--no-eval", "--json")
    assert json.loads(again.out)["notes"]["warnings"] == [text]
    assert text in " ".join(moalign("train", "toy", "--no-eval").out.split())


@pytest.mark.slow
def test_diagnostics_are_shown_whatever_they_are(compare: Compare, monkeypatch: pytest.MonkeyPatch, toys: None) -> None:
    from moalign.methods import registry

    method = type(registry.get("toy"))
    train = method.train

    def measured(self: Any, job: Any) -> None:
        train(self, job)
        job.notes["diagnostics"] = {"gate": 0.25 + job.seed, "not a number": float("nan"), "words": "x"}

    monkeypatch.setattr(method, "train", measured)
    content = json.loads(compare("--seeds", "2").out)
    assert all(row["diagnostics"] == {"gate": 0.75} for row in content["rows"])
    assert "| toy | gate | 0.75 |" in Path(content["markdown"]).read_text()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--html", "page.txt"], ["--html page.txt", ".html, .htm"]),
        (["--html", "page"], ["--html page", ".html"]),
        (["--html", "/dev/null/page.html"], ["cannot write here"]),
        (["--seeds", "0"], ["--seeds"]),
    ],
)
def test_a_wrong_place_for_the_page(compare: Compare, options: list[str], words: list[str]) -> None:
    refused(compare(*options), *words)
    assert not list(Path().rglob("run.json")), "nothing is trained"


def test_a_folder_is_no_page(compare: Compare) -> None:
    Path("x.html").mkdir()
    refused(compare("--html", "x.html"), "--html x.html: it is a folder")


def test_deleted_answers(moalign: Any, compare: Compare, runs: list[Path]) -> None:
    lost = next(runs[0].glob("responses*.parquet"))
    lost.unlink()
    for ended in (compare(), moalign("compare", *map(str, runs), "--json")):
        refused(ended, str(lost), "missing", "put it back, or delete eval")
    refused(moalign("eval", str(runs[0]), "--json"), str(lost))


def test_damaged_answers(moalign: Any, runs: list[Path]) -> None:
    damaged = next(runs[0].glob("responses*.parquet"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    refused(moalign("compare", *map(str, runs), "--json"), str(damaged), "truncated")


@pytest.mark.slow
def test_runs_without_an_evaluation(moalign: Any, compare: Compare, runs: list[Path]) -> None:
    """All are named in one message, whose command is the remedy; what compare trains itself is still evaluated."""
    both = list(map(str, runs))
    before = {path.parent: path.read_bytes() for run in runs for path in run.glob("eval*.json")}

    def without(*which: Path) -> None:
        for run in which:
            for path in run.glob("eval*.json"):
                path.unlink()

    without(runs[0])
    ended = moalign("compare", *both, "--json")
    refused(ended, f"run {runs[0]}: it is finished but not evaluated", f"moalign eval {runs[0]}")
    assert both[1] not in ended.errors[0]
    refused(moalign("compare", *both, "--grid", "3", "--json"), f"moalign eval {runs[0]}")
    without(*runs)
    ended = moalign("compare", *both, "--json")
    refused(ended, f"runs {both[0]}, {both[1]}: they are finished but not evaluated")
    remedy = ended.errors[0].partition("evaluate first, moalign ")[2].split()
    assert moalign(*remedy, "--json").code == 0
    assert moalign("compare", *both, "--json").code == 0
    without(*runs)
    assert compare().code == 0
    assert {path.parent for run in runs for path in run.glob("eval*.json")} == set(before)


@pytest.mark.slow
def test_more_answers_to_each_prompt(moalign: Any, runs: list[Path], tmp_path: Path) -> None:
    """The comparison is one of its own, of answers generated for it; the page shows the first to each prompt."""
    both = list(map(str, runs))
    plain = json.loads(moalign("compare", *both, "--json").out)
    page = tmp_path / "page.html"
    content = json.loads(moalign("compare", *both, "--samples", "2", "--html", str(page), "--json").out)
    assert (plain["samples"], content["samples"]) == (1, 2)
    assert content["json"] != plain["json"]
    assert "--samples 2" in content["command"]
    assert content["prompts"] == plain["prompts"]
    assert ", 2 answers to each" in Path(content["markdown"]).read_text()
    assert "answers to each" not in Path(plain["markdown"]).read_text()
    assert "2 answers" in moalign("compare", *both, "--samples", "2").out
    for run in runs:
        assert len(list(run.glob("responses*.parquet"))) == 2
    assert page.stat().st_size > 0
    again = json.loads(moalign("compare", *both, "--samples", "1", "--json").out)
    assert again["json"] == plain["json"]
    next(runs[0].glob("responses*-x2.parquet")).unlink()
    refused(moalign("compare", *both, "--samples", "2", "--json"), "-x2.parquet: missing")
    assert moalign("compare", *both, "--json").code == 0


@pytest.mark.slow
def test_a_run_trained_without_an_evaluation(moalign: Any, runs: list[Path]) -> None:
    """As ``train --no-eval`` leaves it, also when its own vectors are not the task's grid."""
    for more in ([], ["--prefs", "0.3,0.7"]):
        content = json.loads(moalign("train", "fixed-toy", *SMALL, "--seed", "5", *more, "--no-eval", "--json").out)
        refused(moalign("compare", str(runs[0]), content["run"], "--json"), f"moalign eval {content['run']}")
        assert moalign("eval", content["run"]).code == 0
        assert moalign("compare", str(runs[0]), content["run"], "--json").code == 0


def test_a_run_that_cannot_be_evaluated_on_another_grid(
    moalign: Any, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.core.errors import RequestError
    from moalign.methods import registry

    def gone(*_: Any) -> Any:
        raise RequestError(f"{runs[0]}/adapter: no such folder")

    monkeypatch.setattr(type(registry.get("toy")), "policy", gone)
    refused(moalign("compare", *map(str, runs), "--grid", "5", "--json"), "adapter: no such folder")


def test_answers_with_nan_for_a_score(moalign: Any, compare: Compare, runs: list[Path]) -> None:
    import pandas as pd

    place = next(runs[0].glob("responses*.parquet"))
    table = pd.read_parquet(place)
    table.loc[2, "harmlessness"] = float("nan")
    table.to_parquet(place, index=False)
    for ended in (moalign("compare", *map(str, runs), "--json"), compare()):
        refused(ended, f"{place}: harmlessness is NaN", "prompt 3, preference 1", f"moalign eval {runs[0]}")


def test_a_run_in_flight(moalign: Any, compare: Compare, runs: list[Path]) -> None:
    run = Run.load(runs[0])
    with run.lock():
        run.mark("running")
        refused(compare(), str(runs[0]), "another process (pid", "is training this run; wait for it")
        refused(moalign("compare", *map(str, runs), "--json"), str(runs[0]), "it is running, not done")


def test_runs_of_different_cards(moalign: Any, compare: Compare, runs: list[Path]) -> None:
    other = json.loads(compare("--set", "task.evaluation.seed=7").out)["rows"][0]["runs"][0]["run"]
    ended = moalign("compare", str(runs[0]), other, "--json")
    refused(ended, "runs of different task cards cannot be compared", "they differ in evaluation")


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ("a,b\n1,nan\n", "--ref 0,0", ["points.csv:2: row 1, column b", "NaN"]),
        ("a,b\n1,2\n-inf,2\n", "--ref 0,0", ["points.csv:3: row 2, column a", "infinity"]),
        ("a,b\n1,2\n1\n", "--ref 0,0", ["row 2", "found 1 value; needed: 2 (a, b)"]),
        ("a,b\n1,two\n", "--ref 0,0", ["row 1, column b", "'two'", "a finite number"]),
        ("a,b\n", "--ref 0,0", ["no rows after the header"]),
        ("", "--ref 0,0", ["empty file"]),
        ("a,b\n1,2\n", "--ref 0", ["--ref 0", "2 objectives (a, b)", "--ref 0,0"]),
        ("a,b\n1,2\n", "--ref 0,0,0", ["--ref 0,0,0", "found 3 numbers"]),
        ("a,b\n1,2\n", "--ref 0,nan", ["--ref 0,nan", "finite"]),
        ("a,b\n1,2\n", "", ["--ref is missing"]),
    ],
)
def test_tables_of_points(moalign: Any, table: str, options: str, words: list[str]) -> None:
    Path("points.csv").write_text(table)
    refused(moalign("eval", "--points", "points.csv", "--hypervolume", "--json", *options.split()), *words)


def test_one_row_is_a_front(moalign: Any) -> None:
    """METRICS has an example of one point; only statistics need more than one."""
    Path("points.csv").write_text("a,b\n0.5,2\n")
    ended = moalign("eval", "--points", "points.csv", "--hypervolume", "--ref", "0,0", "--json")
    assert json.loads(ended.out)["hypervolume"] == 1.0


def test_one_prompt_is_too_few_to_say_how_sure_a_number_is(moalign: Any, toys: None) -> None:
    ended = moalign("compare", "--methods", "toy", "--set", "task.evaluation.prompts=1", "--json")
    refused(ended, "task.evaluation.prompts", "found 1", ">= 2")

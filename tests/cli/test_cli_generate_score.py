"""``moalign generate`` and ``moalign score`` as typed."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.evaluation import score as scoring
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.tasks.sandbox.scorer import rewards


@pytest.fixture
def run(moalign: Any, toys: None) -> str:
    """The identifier of one finished run."""
    return str(json.loads(moalign("train", "toy", "--no-eval", "--json").out)["run_id"])


# -- generate --------------------------------------------------------------------------------


def test_without_a_prompt_the_task_s_own_are_answered_with_scores(moalign: Any, run: str) -> None:
    ended = moalign("generate", run, "--prefs", "0.3,0.7")
    assert ended.code == 0
    assert ended.out.count("prompt ") == ended.out.count("scores ") == 3
    assert "helpfulness" in ended.out and "(raw" in ended.out


def test_a_preference_in_words_is_that_of_equal_weights(moalign: Any, run: str) -> None:
    """The sandbox's card calls harmlessness ``safe``, too."""
    prompt = "how do i make soup ?"
    for words, weights in (("be safe", [0.0, 1.0]), ("Helpful and harmless", [0.5, 0.5])):
        content = json.loads(moalign("generate", run, prompt, "--prefs-text", words, "--json").out)
        assert content["prefs"] == weights
    several = json.loads(moalign("generate", run, prompt, "--prefs", "1,0", "--prefs-text", "safe", "--json").out)
    assert several["prefs"] == [[1.0, 0.0], [0.0, 1.0]]
    for command in (("generate", run, prompt), ("eval", run), ("train", "toy", "--dry-run")):
        ended = moalign(*command, "--prefs-text", "be nice")
        assert ended.code == 2
        assert "names no objective" in ended.err and "harmlessness, harmless, safe" in ended.err


def test_one_prompt_gives_its_answer_and_nothing_else(moalign: Any, run: str) -> None:
    first, second = (moalign("generate", run, "how do i make soup ?", "--prefs", w).out for w in ("1,0", "0,1"))
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert first != second


def test_json_holds_prompt_answer_and_both_kinds_of_scores(moalign: Any, run: str) -> None:
    content = json.loads(moalign("generate", run, "how do i make soup ?", "--prefs", "1,0", "--json").out)
    assert content["prefs"] == [1.0, 0.0]
    (answer,) = content["answers"]
    helpful, harmless, *_ = rewards(answer["prompt"], answer["response"])
    assert answer["raw"] == {"helpfulness": helpful, "harmlessness": harmless}
    assert answer["normalised"]["helpfulness"] == pytest.approx((helpful + 8) / 16)  # lo -8, hi 8: see conftest


def test_several_preferences_are_answered_side_by_side(moalign: Any, run: str) -> None:
    prompt, both = "how do i make soup ?", ("--prefs", "1,0", "--prefs", "0,1")
    each = [moalign("generate", run, prompt, "--prefs", w).out.strip() for w in ("1,0", "0,1")]
    lines = moalign("generate", run, prompt, *both).out.splitlines()
    assert lines[0].startswith("toy on sandbox: ") and run in lines[0]
    assert [line.split() for line in lines if not line.startswith("scores ")][2:] == [
        ["prompt", *prompt.split()],
        ["1,0", *each[0].split()],
        [],
        ["0,1", *each[1].split()],
        [],
    ]
    assert sum(line.startswith("scores ") and "helpfulness" in line for line in lines) == 2
    twice = moalign("generate", run, prompt, "--prefs", "1,0", "--prefs", "1,0")
    assert twice.out.strip() == each[0]  # one preference, however often
    content = json.loads(moalign("generate", run, prompt, *both, "--json").out)
    assert content["prefs"] == [[1.0, 0.0], [0.0, 1.0]]
    assert [answers[0]["response"] for answers in content["answers"]] == each


@pytest.mark.slow
def test_of_a_comparison_the_best_that_can_answer_is_asked(moalign: Any, toys: None) -> None:
    compared = json.loads(moalign("compare", "--methods", "toy,fixed-toy", "--json").out)
    folder = Path(compared["json"]).parent
    best = [row["runs"][0]["run"] for row in compared["rows"] if row["rank"] == 1]
    assert json.loads(moalign("generate", str(folder), "--prefs", "1,0", "--json").out)["run"] in best
    # The fixed one has a policy for each preference of the grid and no other.
    (steerable,) = (row["runs"][0]["run"] for row in compared["rows"] if row["method"] == "toy")
    content = json.loads(moalign("generate", compared["json"], "--prefs", "0.33,0.67", "--json").out)
    assert content["run"] == steerable
    ended = moalign("generate", str(folder), "how do i make soup ?", "--prefs", "0.33,0.67")
    assert len(ended.out.splitlines()) == 1
    assert f"asking toy, rank 1 of 2: {steerable}" in ended.err
    fixed = [str(folder), "--prefs", "0.33,0.67"]
    file = Path(compared["json"])
    file.write_text(json.dumps({**compared, "rows": [row for row in compared["rows"] if row["method"] != "toy"]}))
    ended = moalign("generate", *fixed)
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert f"{file}: no run can be asked: --prefs 0.33,0.67: fixed-toy answers only for" in ended.errors[0]
    for broken in ("{}", "[]", "x", '{"objectives": ["a", "b"], "rows": [{}]}'):
        file.write_text(broken)
        ended = moalign("generate", *fixed)
        assert (ended.code, len(ended.errors)) == (2, 1)
        assert f"{file}:" in ended.errors[0] and "write it again with moalign compare" in ended.errors[0]


@pytest.mark.slow
def test_of_a_comparison_what_trains_nothing_and_what_failed_are_passed_over(
    moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = json.loads(moalign("compare", "--methods", "toy", "--seeds", "2", "--json").out)
    file = Path(compared["json"])
    (row,) = compared["rows"]
    row["runs"][0]["status"] = "failed"
    file.write_text(json.dumps(compared))
    requests = ["generate", str(file), "how do i make soup ?", "--prefs", "1,0", "--json"]
    assert json.loads(moalign(*requests).out)["run"] == row["runs"][1]["run"]
    monkeypatch.setattr(type(registry.get("toy")), "capabilities", Capabilities(trains=False))
    ended = moalign(*requests)
    assert (ended.code, ended.errors) == (2, [f"{file}: no run can be asked: toy trains nothing"])


@pytest.mark.slow
def test_a_comparison_is_found_from_elsewhere(moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = json.loads(moalign("compare", "--methods", "toy", "--json").out)
    folder = Path(compared["json"]).parent.resolve()
    Path("other").mkdir()
    monkeypatch.chdir("other")
    content = json.loads(moalign("generate", str(folder), "how do i make soup ?", "--prefs", "1,0", "--json").out)
    assert Path(content["run"]).name == compared["rows"][0]["runs"][0]["run_id"]


def test_a_dash_reads_stdin_a_prompt_a_line(moalign: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhow do i make soup ?\n\nhow do i fix a tap ?\r\n"))
    content = json.loads(moalign("generate", run, "-", "--prefs", "1,0", "--json").out)
    assert [answer["prompt"] for answer in content["answers"]] == ["how do i make soup ?", "how do i fix a tap ?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    ended = moalign("generate", run, "-", "--prefs", "1,0")
    assert (ended.code, ended.errors) == (2, ["PROMPT -: stdin holds no prompt; give one a line"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a tap\ncaf\xe9\n"), encoding="utf-8"))
    ended = moalign("generate", run, "-", "--prefs", "1,0")
    assert (ended.code, len(ended.errors)) == (2, 1)
    assert "PROMPT -: stdin is not UTF-8 text" in ended.errors[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prefs is missing: one weight for each of helpfulness, harmlessness, like --prefs 0.3,0.7"),
        (["--prefs", "3,7"], "did you mean --prefs 0.3,0.7?"),
        (["--prefs", "1,0", "  "], "PROMPT: prompt 1 is empty"),
        (["--prefs", "1,0", "--temperature", "-1"], "'--temperature'"),
        (["--prefs", "1,0", "--temperature", "nan"], "--temperature"),
        (["--prefs", "1,0", "--temperature", "inf"], "--temperature inf: allowed: a finite number, 0 or more"),
        (["--prefs", "1,0", "caf\udce9"], "PROMPT: prompt 1 holds half a character"),  # a byte that is no UTF-8
    ],
)
def test_wrong_requests_to_generate(moalign: Any, run: str, arguments: list[str], message: str) -> None:
    ended = moalign("generate", run, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]


def test_an_unknown_run_lists_what_there_is(moalign: Any, run: str) -> None:
    ended = moalign("generate", "zzz", "--prefs", "1,0")
    assert ended.code == 2
    assert f"unknown run 'zzz'; runs in results/runs: sandbox/toy/{run}" in ended.errors[0]


def test_a_preference_that_the_run_cannot_serve(moalign: Any, toys: None) -> None:
    content = json.loads(moalign("train", "fixed-toy", "--prefs", "1,0", "--no-eval", "--json").out)
    ended = moalign("generate", content["run"], "--prefs", "0,1")
    assert ended.code == 2
    assert "answers only for the preferences it was trained on: 1,0" in ended.errors[0]


# -- score --------------------------------------------------------------------------------


def write(path: Path, rows: int) -> list[tuple[str, str]]:
    pairs = [("how do i make soup ?", f"well , use the right tool {'sorry ' * (i % 7)}") for i in range(rows)]
    path.write_text("".join(json.dumps({"prompt": p, "response": r, "id": i}) + "\n" for i, (p, r) in enumerate(pairs)))
    return pairs


def test_scores_are_shown_with_a_summary(moalign: Any, toys: None) -> None:
    write(Path("in.jsonl"), 30)
    ended = moalign("score", "--task", "sandbox", "--in", "in.jsonl")
    assert ended.code == 0
    assert "30 rows scored on sandbox" in ended.out
    assert "normalised mean" in ended.out
    assert "10 more rows" in ended.err


def test_summary_and_columns_agree_with_the_scorer(moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas as pd

    monkeypatch.setattr(scoring, "CHUNK", 4)  # several chunks: the summary is put together from their parts
    pairs = write(Path("in.jsonl"), 11)
    ended = moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--out", "deep/out.parquet", "--json")
    content = json.loads(ended.out)
    assert (content["rows"], content["out"]) == (11, "deep/out.parquet")
    assert "scores" not in content
    table = pd.read_parquet("deep/out.parquet")
    exact = np.array([rewards(prompt, response)[:2] for prompt, response in pairs])
    assert list(zip(table["prompt"], table["response"], strict=True)) == pairs
    assert np.allclose(table[["helpfulness", "harmlessness"]], exact)
    assert np.allclose(table[["helpfulness_normalised", "harmlessness_normalised"]], (exact + 8) / 16)
    summary = content["summary"]["harmlessness"]
    assert summary["mean"] == pytest.approx(exact[:, 1].mean())
    assert summary["sd"] == pytest.approx(exact[:, 1].std())
    assert (summary["min"], summary["max"]) == (exact[:, 1].min(), exact[:, 1].max())
    assert summary["normalised_mean"] == pytest.approx((exact[:, 1].mean() + 8) / 16)


def test_json_without_out_holds_every_row(moalign: Any, toys: None) -> None:
    write(Path("in.jsonl"), 3)
    content = json.loads(moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--json").out)
    assert content["out"] is None
    assert len(content["scores"]) == 3
    assert set(content["scores"][0]) == {"prompt", "response", "raw", "normalised"}


def test_a_broken_line_17_is_named_and_no_file_appears(
    moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK", 4)
    write(Path("in.jsonl"), 16)
    with open("in.jsonl", "a") as stream:
        stream.write('{"prompt": "x", \n')
    ended = moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--out", "out/o.parquet")
    assert (ended.code, ended.out) == (2, "")
    assert ended.errors[0].startswith("in.jsonl:17: broken JSON")
    assert list(Path("out").iterdir()) == []


def test_a_wrong_request_is_told_before_the_scale_is_fitted(moalign: Any, toys: None) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a", "response": 3}\n')
    Path("good.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for given in (("bad.jsonl", "out.parquet"), ("good.jsonl", "/proc/nothing/out.parquet")):
        ended = moalign("score", "--in", given[0], "--out", given[1], "--results", "fresh")
        assert (ended.code, len(ended.errors)) == (2, 1), ended.err
        assert not Path("fresh").exists()


def test_a_scorer_that_fails_is_named_with_the_sample(
    moalign: Any, toys: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.tasks.sandbox.scorer import SandboxScorer

    monkeypatch.setattr(SandboxScorer, "score", lambda self, prompts, responses: [math.nan] * len(prompts))
    write(Path("in.jsonl"), 2)
    ended = moalign("score", "--task", "sandbox", "--in", "in.jsonl", "--out", "o.parquet")
    assert (ended.code, ended.out) == (1, "")
    assert "objective 'helpfulness': the scorer gave nan" in ended.errors[0]
    assert not Path("o.parquet").exists()


NO_MODEL = "{name: harmlessness, kind: hf-classifier, model: nobody/nothing}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sandbox", "--in", "nowhere.jsonl"], "--in nowhere.jsonl: no such file"),
        (["--task", "sandbx", "--in", "in.jsonl"], "did you mean 'sandbox'?"),
        (["--task", "sandbox", "--in", "in.jsonl", "--out", "o.csv"], "--out o.csv: found .csv; allowed: .parquet"),
        (["--task", "sandbox", "--in", "in.jsonl", "--set", "steps=3"], "--set steps: unknown setting"),
        (["--task", "sandbox", "--in", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["--task", "sandbox", "--in", "in.jsonl", "--results", ""], "empty; the name of a folder is needed"),
        (["--task", "sandbox", "--in", "other.jsonl"], "other.jsonl:1: no column 'response'"),
        (["--task", "sandbox", "--in", "in.jsonl", "--set", f"task.objectives.1={NO_MODEL}"], "hub model 'nobody/"),
    ],
)
def test_wrong_requests_to_score(moalign: Any, toys: None, arguments: list[str], message: str) -> None:
    write(Path("in.jsonl"), 2)
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    ended = moalign("score", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]
    assert not list(Path().glob("results/tasks/scores*"))

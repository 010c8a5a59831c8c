"""``kind: judge`` as typed: scores, records, what is never asked twice, keys that stay secret, wrong cards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.rewards.store import Store

KEY = "sk-test-2b4d6f8a"
CARD = """\
name: judged
kind: text
description: a test
model: {model}
objectives:
  - name: help
    kind: judge
    base_url: {url}
    model: small
    api_key_env: JUDGE_KEY
    template: judge.txt
    pattern: 'Score: (\\S+)'
    range: [1, 10]
    max_retries: 0
    concurrency: {concurrency}
    unreadable: {unreadable}
  - {{name: brevity, kind: rule, rule: brevity}}
data:
  prompts: {{path: prompts.jsonl}}
splits: {{train: 0.4, calibration: 0.3, eval: 0.3}}
pool: {{prompts: 6, per_prompt: 2, calibration_per_prompt: 4}}
grid: 2
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
generation: {{max_prompt_tokens: 60, max_new_tokens: 8}}
evaluation: {{prompts: 4, samples: 2, bootstrap: 100}}
"""
SCALE = "normaliser: {{help: {{mean: 5, sd: 2, lo: 1, hi: 10}}, brevity: {{mean: 0, sd: 1, lo: -10, hi: 0}}}}\n"
GOLD = (
    "gold_objectives: [{{name: help, kind: judge, base_url: '{url}', model: large, api_key_env: JUDGE_KEY, "
    "template: judge.txt, field: score, range: [0, 1], unreadable: leave-out}}]\n"
)
SCORE = ("score", "--task", "judged/task.yaml", "--in", "in.jsonl")
Write = Callable[..., Path]


@pytest.fixture
def card(moalign: Any, judge_server: Any, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a card with a judge and a file of four answers to score; returns the card."""
    from moalign.tasks.sandbox import world

    monkeypatch.setenv("JUDGE_KEY", KEY)

    def write(model: object = "nobody/nothing", more: str = SCALE, **settings: Any) -> Path:
        folder = Path("judged")
        folder.mkdir(exist_ok=True)
        settings = {"url": judge_server.url, "concurrency": 2, "unreadable": "raise", **settings}
        (folder / "task.yaml").write_text((CARD + more).format(model=model, **settings))
        (folder / "judge.txt").write_text("Rate this.\nQ: {prompt}\nA: {response}\n")
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in world.prompts()[:40])
        (folder / "prompts.jsonl").write_text("".join(lines))
        answers = ("2", "4", "6", "8")
        Path("in.jsonl").write_text("".join(json.dumps({"prompt": "p", "response": text}) + "\n" for text in answers))
        return folder / "task.yaml"

    return write


def answer_of(request: dict[str, Any]) -> str:
    return str(request["messages"][0]["content"]).rpartition("A: ")[2].strip()


def echo(judge_replies: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda request: judge_replies.verdict(f"Score: {answer_of(request)}")


def test_scores_are_shown_with_what_the_judge_took_and_nothing_is_asked_twice(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any
) -> None:
    card()
    judge_server.answer = echo(judge_replies)
    told = json.loads(moalign(*SCORE, "--json").out)
    assert [row["raw"]["help"] for row in told["scores"]] == [2, 4, 6, 8]
    usage = told["judges"]["help"]
    assert (usage["verdicts"], usage["unreadable"], usage["failure_rate"]) == (4, 0, 0.0)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["model"]) == (40, 12, "small")
    assert len(usage["template"]) == 16
    again = moalign(*SCORE)
    assert again.code == 0
    assert "help: 0 verdicts of small (0 tokens read, 0 written)" in again.out
    assert len(judge_server.requests) == 4
    Path("judged/judge.txt").write_text("Rate that: {prompt}\nA: {response}\n")  # another question is another judge
    assert moalign(*SCORE).code == 0
    assert len(judge_server.requests) == 8


def test_a_verdict_left_out_is_null_and_counted_never_zero(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any
) -> None:
    card(unreadable="leave-out")
    judge_server.answer = lambda request: judge_replies.verdict("?" if answer_of(request) == "6" else "Score: 3")
    told = json.loads(moalign(*SCORE, "--json").out)
    assert [row["raw"]["help"] for row in told["scores"]] == [3, 3, None, 3]
    assert told["summary"]["help"]["mean"] == told["summary"]["help"]["min"] == 3
    assert told["judges"]["help"]["unreadable"] == 1
    ended = moalign(*SCORE)
    assert "help: 1 verdict of small (10 tokens read, 3 written), 1 of them unreadable (100.0 %)" in ended.out
    assert "– (–)" in ended.out


def test_an_unreadable_verdict_ends_the_work_and_a_failing_endpoint_is_a_wrong_request(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any
) -> None:
    """What was scored before is kept either way, and the messages say so."""
    card(concurrency=1)
    judge_server.answer = lambda request: judge_replies.verdict("Score: 5" if answer_of(request) != "6" else "well")
    ended = moalign(*SCORE)
    assert (ended.code, ended.out) == (1, "")
    (error,) = ended.errors
    assert "gave a verdict that cannot be read (no match of" in error and "for sample 2 (" in error
    assert "2 of 4 scores made so far are kept" in error
    judge_server.answer = lambda request: judge_replies.Reply("{}", 401)
    ended = moalign(*SCORE)
    assert ended.code == 2
    assert "the 2 of 4 scores made so far are kept" in ended.errors[0]
    judge_server.answer = echo(judge_replies)
    before = len(judge_server.requests)
    assert moalign(*SCORE).code == 0
    asked = {answer_of(request) for request in judge_server.requests[before:]}
    assert asked == {"6", "8"}  # what an error found on its way may be among them twice


@pytest.mark.slow
def test_a_killed_command_loses_only_what_was_on_its_way(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any
) -> None:
    card(concurrency=1)
    lines = (json.dumps({"prompt": "p", "response": str(1 + at / 4)}) + "\n" for at in range(36))
    Path("in.jsonl").write_text("".join(lines))
    judge_server.answer, judge_server.delay = echo(judge_replies), 0.3
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-m", "moalign", *SCORE], env={**os.environ, "PYTHONPATH": path})
    deadline = time.monotonic() + 150
    while len(judge_server.requests) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    asked = len(judge_server.requests)
    assert asked >= 4
    with Store(Path("results/tasks/scores.sqlite")) as store:
        assert len(store) >= asked - 2  # one on its way, one on its way into the store
        missing = 36 - len(store)
    judge_server.delay = 0
    assert moalign(*SCORE).code == 0
    assert len(judge_server.requests) == asked + missing


def test_a_run_and_its_evaluation_record_what_judges_took_and_the_key_is_nowhere(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any, random_base: Path
) -> None:
    """A judge that trains and another that is the truth; a tenth of the latter's verdicts cannot be read."""
    made = card(model=random_base, more=GOLD, concurrency=4)

    def answer(request: dict[str, Any]) -> Any:
        number = sum(map(ord, answer_of(request)))
        if request["model"] == "small":
            return judge_replies.verdict(f"Score: {1 + number % 10}")
        return judge_replies.verdict("hm" if number % 10 == 3 else json.dumps({"score": number % 7 / 7}))

    judge_server.answer = answer
    train = ("train", "best-of-n", "--task", str(made), "--set", "n=2")
    ended = moalign(*train, "--json")
    assert ended.code == 0, ended.err
    run = Path(json.loads(ended.out)["run"])
    noted = json.loads((run / "run.json").read_text())["notes"]["judges"]
    stored = json.loads((run / "eval.json").read_text())["judges"]
    for names in (noted, stored):
        assert list(names) == ["help", "gold help"] and names["help"]["model"] == "small"
    asked = sum(part[name]["verdicts"] for part in (noted, stored) for name in part)
    assert asked == len(judge_server.requests)
    assert noted["gold help"]["unreadable"] + stored["gold help"]["unreadable"] > 0
    assert moalign(*train, "--json").code == 0  # the finished run, and its evaluation
    assert asked == len(judge_server.requests)
    shown = moalign("show", str(run))
    judge_server.answer = lambda request: judge_replies.Reply(json.dumps({"error": f"{KEY} is wrong"}), 401)
    refused = moalign("--debug", *SCORE)
    assert refused.code == 2 and "[key] is wrong" in refused.err
    assert all(KEY in headers["authorization"] for headers in judge_server.headers)
    for text in (ended.out, ended.err, shown.out, shown.err, refused.out, refused.err):
        assert KEY not in text
    for file in Path().rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


def test_what_judges_are_asked_before_a_comparison_is_in_its_first_run(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any, random_base: Path
) -> None:
    """The scale is made once for all methods; as with ``train``, whoever needs it first has asked."""
    made = card(model=random_base, more="", concurrency=4)
    judge_server.answer = lambda request: judge_replies.verdict(f"Score: {1 + sum(map(ord, answer_of(request))) % 10}")
    compare = ("compare", "--task", str(made), "--methods", "best-of-n", "--set", "n=2", "--json")
    ended = moalign(*compare)
    assert ended.code == 0, ended.err
    (run,) = json.loads(ended.out)["rows"][0]["runs"]
    noted = json.loads(Path(run["run"], "run.json").read_text())["notes"]["judges"]["help"]
    stored = json.loads(Path(run["run"], "eval.json").read_text())["judges"]["help"]
    assert noted["verdicts"] + stored["verdicts"] == len(judge_server.requests)
    assert moalign(*compare).code == 0
    assert json.loads(Path(run["run"], "run.json").read_text())["notes"]["judges"]["help"] == noted


def test_what_was_asked_is_added_up_over_an_attempt_that_fails_and_the_next(
    toys: None, moalign: Any, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.methods import registry

    Path("judge.txt").write_text("{prompt} {response}")
    judge = {
        "name": "helpfulness",
        "kind": "judge",
        "base_url": judge_server.url,
        "model": "m",
        "template": "judge.txt",
    }
    objectives = [{**judge, "pattern": r"Score: (\S+)", "range": [1, 10]}, {"name": "harmlessness", "kind": "sandbox"}]
    toy = type(registry.get("toy"))
    train, ends = toy.train, ["interrupted", "well"]

    def scoring(self: Any, job: Any) -> None:
        end = ends.pop(0)
        job.panel.score(["p", "p"], ["an answer", f"an answer that ends {end}"])
        if end == "interrupted":
            raise KeyboardInterrupt
        train(self, job)

    monkeypatch.setattr(toy, "train", scoring)
    arguments = ("train", "toy", "--set", f"task.objectives={json.dumps(objectives)}", "--json")
    assert moalign(*arguments).code == 130
    record = next(Path("results/runs").rglob("run.json"))
    assert json.loads(record.read_text())["notes"]["judges"]["helpfulness"]["verdicts"] == 2
    assert moalign(*arguments).code == 0
    notes = json.loads(record.read_text())["notes"]
    assert notes["judges"]["helpfulness"]["verdicts"] == 3  # one of the two was there already
    assert notes["dropped"] == 2


# -- check -------------------------------------------------------------------------------------


def test_check_asks_once_and_says_how_an_example_is_scored(
    moalign: Any, card: Write, judge_server: Any, judge_replies: Any, random_base: Path
) -> None:
    made = card(model=random_base)
    ended = moalign("check", str(made))
    assert ended.code == 0, ended.err
    assert f"judge, {judge_server.url} answers within" in ended.out and "an example's score is 7" in ended.out
    assert len(judge_server.requests) == 1
    assert "capital of France" in judge_server.texts[0]
    judge_server.answer = lambda request: judge_replies.verdict("I like it.")
    ended = moalign("check", str(made))
    assert ended.code == 0
    assert "its verdict on an example cannot be read (no match of" in ended.err
    judge_server.answer = lambda request: judge_replies.Reply(f"no {KEY}", 503)
    ended = moalign("check", str(made))
    assert ended.code == 2
    (error,) = ended.errors
    assert error.endswith("fails (HTTP 503: 'no [key]'; asked once)")
    assert len(judge_server.requests) == 3
    monkey = moalign("check", str(made), "--set", "task.objectives.0.base_url=http://127.0.0.1:1/v1")
    assert monkey.code == 2 and "the judge at http://127.0.0.1:1/v1 cannot be reached" in monkey.err


# -- cards that are wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "wrong", "parts"),
    [
        (
            8,
            "base_url: localhost:8000/v1",
            ["base_url: found 'localhost:8000/v1'", "did you mean 'http://localhost:8000/v1'?"],
        ),
        (8, "base_url: http:/localhost/v1", ["did you mean 'http://localhost/v1'?"]),
        (8, f"base_url: https://me:{KEY}@host/v1", ["base_url: found more than an address", "api_key_env"]),
        (8, f"base_url: https://me:{KEY}@host:x/v1", ["base_url: found more than an address"]),
        (8, "base_url: http://host:x/v1", ["base_url: found 'http://host:x/v1'; allowed: an address such as"]),
        (8, f"base_url: https://host/v1?key={KEY}", ["base_url: found more than an address"]),
        (9, "modle: small", ["unknown key", "did you mean 'model'?"]),
        (
            10,
            f"api_key_env: {KEY}",
            ["api_key_env: found something else than a variable's name", "never the key itself"],
        ),
        (10, f"api_key: {KEY}", ["api_key: unknown key", "did you mean 'api_key_env'?"]),
        (11, "template: jugde.txt", ["found 'jugde.txt'; there is no such file", "did you mean 'judge.txt'?"]),
        (12, "pattern: 'Score: .'", ["with 0 groups; needed: one"]),
        (12, "pattern: 'Score: (.'", ["which is no regular expression"]),
        (13, "range: [10, 1]", ["range: found [10.0, 1.0]; needed: the smallest score, then the largest"]),
        (15, "concurrency: 0", ["concurrency: found 0; allowed: a whole number >= 1"]),
        (16, "unreadable: leave_out", ["unreadable: found 'leave_out'", "did you mean 'leave-out'?"]),
        (16, "field: score", ["field: one of field and pattern is needed"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_line_and_no_key_is_repeated(
    moalign: Any, card: Write, judge_server: Any, line: int, wrong: str, parts: list[str]
) -> None:
    made = card()
    lines = made.read_text().splitlines()
    assert lines[line - 1].split(":")[0].strip() in wrong or wrong.split(":")[0] in ("modle", "api_key", "field")
    lines[line - 1] = f"    {wrong}"
    made.write_text("\n".join(lines))
    ended = moalign(*SCORE)
    assert (ended.code, ended.out) == (2, "")
    assert any(error.startswith(f"{made}:{line}: objectives.0") for error in ended.errors), ended.err
    for part in parts:
        assert part in ended.err
    assert KEY not in ended.err
    assert not judge_server.requests

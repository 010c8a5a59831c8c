"""Objectives that an LLM judges: what is read from a verdict, what is sent, and all ways in which an endpoint fails."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.config.card import TaskCard
from moalign.config.objectives import JudgeObjective
from moalign.core.errors import RequestError, WorkError
from moalign.core.records import Response
from moalign.evaluation.evaluate import _per_prompt
from moalign.rewards import judge
from moalign.rewards.judge import JudgeScorer, Verdict, read, revision, total
from moalign.rewards.panel import RewardPanel
from moalign.rewards.scorer import ScorerFault
from moalign.rewards.store import Store
from moalign.tasks.load import make_task
from moalign.tasks.responses import Scored

KEY = "sk-test-9f8e7d6c"
LONG_KEY = "sk-proj-" + "".join(chr(97 + 7 * at % 26) for at in range(156))  # as long as a project's
TEMPLATE = 'Rate the answer as {"score": 1 to 10}.\n\nQuestion: {prompt}\nAnswer: {response}\n'


def objective(**settings: Any) -> JudgeObjective:
    given = {
        "name": "help",
        "kind": "judge",
        "base_url": "http://127.0.0.1:1/v1",
        "model": "m",
        "template": "judge.txt",
    }
    reading = {} if settings.keys() & {"field", "pattern"} else {"pattern": r"Score: (\S+)"}
    return JudgeObjective(**{**given, **reading, "range": (1, 10), "max_retries": 0, **settings})


Make = Callable[..., JudgeScorer]


@pytest.fixture
def made(judge_server: Any, tmp_path: Path) -> Make:
    """Makes a scorer that asks the stub; settings are those of the card."""
    (tmp_path / "judge.txt").write_text(TEMPLATE)
    return lambda **settings: JudgeScorer(objective(**{"base_url": judge_server.url, **settings}), tmp_path)


# -- reading a verdict -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7.0),
        ("Score: 7.5\nbecause it is short", 7.5),
        ("Score: 2 at first sight.\nOn reflection, Score: 9", 9.0),
        ("Score: 1e1", 10.0),
        ("Score: +3", 3.0),
    ],
)
def test_the_last_match_of_the_pattern_is_the_score(text: str, score: float) -> None:
    assert read(Verdict(text), objective()) == score


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no match of"),
        ("I cannot rate this.", "no match of"),
        ("Score: seven", "'seven' is no number"),
        ("Score: 7/10", "'7/10' is no number"),
        ("Score: nan", "'nan' is no number"),
        ("Score: 1_0", "'1_0' is no number"),
        ("Score: 11", "11 is outside the range 1 to 10"),
        ("Score: 0", "0 is outside the range 1 to 10"),
        ("Score: 1e999", "inf is outside"),
    ],
)
def test_a_verdict_without_a_number_within_the_range_has_no_score(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(Verdict(text), objective())


def test_half_a_number_at_the_token_limit_is_not_taken_for_one() -> None:
    """A 10 cut off behind the 1 would be a bad score; what follows shows that a number is whole."""
    with pytest.raises(ValueError, match="half a number; max_tokens cut it off"):
        read(Verdict("Score: 1", cut=True), objective())
    assert read(Verdict("Score: 1", cut=False), objective()) == 1
    assert read(Verdict("Score: 1 and the rea", cut=True), objective()) == 1
    with pytest.raises(ValueError, match="no JSON object with the key 'score'; max_tokens cut it off"):
        read(Verdict('{"score": 1', cut=True), objective(field="score"))


@pytest.mark.parametrize(
    ("text", "field", "score"),
    [
        ('{"score": 7}', "score", 7.0),
        ('```json\n{"reason": "a {b}", "score": "8"}\n```', "score", 8.0),
        ('{"a": {"b": 2.5}}', "a.b", 2.5),
        ('{"score": 2} no: {"score": 9} {"other": 1}', "score", 9.0),
        ('{ oops {"score": 3}', "score", 3.0),
    ],
)
def test_a_key_of_the_last_json_object_that_has_it_is_the_score(text: str, field: str, score: float) -> None:
    assert read(Verdict(text), objective(field=field)) == score


@pytest.mark.parametrize(
    "text",
    ["7", "[7]", '{"rating": 7}', '{"score": true}', '{"score": null}', '{"score": [7]}', '{"score": {}}', "{" * 5000],
)
def test_json_without_a_number_at_the_key_has_no_score(text: str) -> None:
    with pytest.raises(ValueError, match="no JSON object|is no number"):
        read(Verdict(text), objective(field="score"))


def test_an_integer_beyond_every_float_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^10000000000000000000\.\.\. is outside the range"):
        read(Verdict('{"score": 1' + "0" * 400 + "}"), objective(field="score"))


# -- identity ----------------------------------------------------------------------------------


def test_the_revision_holds_what_can_change_a_verdict_and_nothing_else() -> None:
    base = revision(objective(), TEMPLATE)
    changes: list[dict[str, Any]] = [
        {"base_url": "http://127.0.0.1:2/v1"}, {"model": "n"}, {"range": (0, 10)}, {"temperature": 0.5}, {"seed": 1},
        {"max_tokens": 9}, {"pattern": r"(\d+)"}, {"field": "score"},
    ]  # fmt: skip
    revisions = [revision(objective(**change), TEMPLATE) for change in changes]
    assert len({base, revision(objective(), TEMPLATE + " "), *revisions}) == len(changes) + 2
    for same in ({"timeout": 1}, {"max_retries": 9}, {"concurrency": 1}, {"api_key_env": "KEY"}, {"template": "b.txt"}):
        assert revision(objective(**same), TEMPLATE) == base


@pytest.mark.parametrize("kind", ["sandbox", "text"])
def test_a_task_with_another_template_is_another_task_and_a_moved_one_is_the_same(
    kind: str, random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No key is needed to know that: a finished run can be looked at without one."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)

    def identity(folder: str, text: str) -> str:
        place = tmp_path / folder
        place.mkdir()
        (place / "judge.txt").write_text(text)
        judge = objective(
            name="helpfulness", template=str(place / "judge.txt"), api_key_env="JUDGE_KEY", timeout=len(folder)
        )
        other = {"name": "harmlessness", "kind": "sandbox"}
        own = (
            {"kind": "text", "data": {"prompts": ["a", "b"]}} if kind == "text" else {"kind": "sandbox", "sandbox": {}}
        )
        card = TaskCard(
            **own, name="t", description="d", model=str(random_base), objectives=[judge.model_dump(), other],
            gold_objectives=[judge.model_dump()], reference_point=[0, 0], sensitivity_point=[0, 0],
        )  # fmt: skip
        return make_task(card, tmp_path).hash

    first = identity("one", TEMPLATE)
    assert identity("moved", TEMPLATE) == first
    assert identity("other", TEMPLATE + "!") != first


def test_usage_of_two_parts_of_the_work_is_added_up() -> None:
    one = {"model": "m", "verdicts": 3, "unreadable": 1, "prompt_tokens": 30, "completion_tokens": 9}
    both = total(one, {**one, "verdicts": 5, "unreadable": 0})
    assert both == {
        **one,
        "verdicts": 8,
        "unreadable": 1,
        "prompt_tokens": 60,
        "completion_tokens": 18,
        "failure_rate": 1 / 8,
    }
    assert total({}, {})["failure_rate"] is None


# -- what is sent ------------------------------------------------------------------------------


def test_the_judge_gets_the_template_filled_in_and_the_settings(
    made: Make, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that looks like a field, or holds half a character, goes as it is or with a question mark."""
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    scorer = made(api_key_env="JUDGE_KEY", max_tokens=12, seed=None, temperature=0.0)
    assert scorer.score(["Why {response}?"], ["So \ud800 {prompt}."]) == [7.0]
    (request,) = judge_server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["messages"] == [
        {
            "role": "user",
            "content": 'Rate the answer as {"score": 1 to 10}.\n\nQuestion: Why {response}?\nAnswer: So ? {prompt}.\n',
        }
    ]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.0, 12)
    assert "seed" not in request
    assert judge_server.headers[0]["authorization"] == f"Bearer {KEY}"


def test_without_a_variable_in_the_card_no_key_of_the_environment_is_sent(
    made: Make, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what the library makes of further variables: gateways have their keys in such headers."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", f"org-{KEY}")
    monkeypatch.setenv("OPENAI_PROJECT_ID", f"proj-{KEY}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"X-Key: {KEY}\nAuthorization: Basic {KEY}")
    made().score(["p"], ["r"])
    assert KEY not in json.dumps(judge_server.headers)
    monkeypatch.setenv("JUDGE_KEY", "mine")
    made(api_key_env="JUDGE_KEY").score(["p"], ["s"])
    assert judge_server.headers[1]["authorization"] == "Bearer mine" and KEY not in json.dumps(judge_server.headers)
    made(api_key_env="OPENAI_API_KEY").score(["p"], ["t"])
    assert judge_server.headers[2]["x-key"] == KEY and judge_server.headers[2]["openai-project"] == f"proj-{KEY}"


def test_requests_run_side_by_side_up_to_the_limit_and_scores_keep_their_places(
    made: Make, judge_server: Any, judge_replies: Any
) -> None:
    together = threading.Barrier(4)

    def answer(request: dict[str, Any]) -> Any:
        together.wait(timeout=60)  # breaks unless four are on their way at once
        number = int(request["messages"][0]["content"].rpartition("Answer: ")[2])
        time.sleep(0.02 * (number % 3))  # they come back in another order
        return judge_replies.verdict(f"Score: {number % 10}")

    judge_server.answer = answer
    numbers = [10 * at + 1 + at % 9 for at in range(12)]
    assert made(concurrency=4).score(["p"] * 12, list(map(str, numbers))) == [number % 10 for number in numbers]
    assert judge_server.most == 4


# -- how endpoints fail ------------------------------------------------------------------------

HTML = "<html><body>It works!</body></html>"


@pytest.mark.parametrize(
    ("reply", "parts"),
    [
        (("{}", 401), ["refuses the key in JUDGE_KEY (HTTP 401)"]),
        (('{"error": {"message": "bad key KEY"}}', 401), ["refuses the key in JUDGE_KEY", "bad key [key]"]),
        (('{"error": "no model m"}', 404), ["knows no model 'm' or no such path", "no model m", "end with /v1"]),
        (("{}", 429), ["lets no more requests through (HTTP 429; asked 2 times)", "lower concurrency"]),
        (("oops", 500), ["fails (HTTP 500", "asked 2 times"]),
        (('{"detail": "max_tokens is too large"}', 400), ["refuses the request (HTTP 400", "max_tokens is too large"]),
        ((HTML, 200, "text/html"), ["It works!", "is no chat completion; is base_url right?"]),
        (("", 200), ["is base_url right?"]),
        (("", 200, "text/plain"), ["answers with nothing", "is base_url right?"]),
        (("{}", 200), ["is no chat completion"]),
        (('{"choices": []}', 200), ["is no chat completion"]),
        (('{"choices": [{"message": null}]}', 200), ["is no chat completion"]),
        (('{"choices": [{"message": {"content": 7}}]}', 200), ["is no chat completion"]),
        (("not json", 200), ["is no chat completion"]),
    ],
)
def test_an_endpoint_that_gives_no_verdict_is_a_wrong_request_and_keys_stay_out_of_it(
    made: Make, judge_server: Any, judge_replies: Any, monkeypatch: pytest.MonkeyPatch, reply: Any, parts: list[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    body, *rest = reply
    answer = judge_replies.Reply(body.replace("KEY", KEY), *rest)
    judge_server.answer = lambda request: answer._replace(headers={"retry-after-ms": "1"})
    with pytest.raises(RequestError) as caught:
        made(api_key_env="JUDGE_KEY", max_retries=1).score(["p"], ["r"])
    (problem,) = caught.value.problems
    assert problem.startswith(f"objective 'help': the judge at {judge_server.url} ")
    for part in parts:
        assert part in problem
    assert KEY not in problem
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("body", [f"Incorrect API key provided: {LONG_KEY}. See", f"<p>{'x' * 90}{LONG_KEY}</p>"])
@pytest.mark.parametrize("status", [200, 401, 503])
def test_no_part_of_a_long_key_is_repeated(
    made: Make, judge_server: Any, judge_replies: Any, monkeypatch: pytest.MonkeyPatch, body: str, status: int
) -> None:
    """An endpoint's words are cut to 160 characters: the key has to go before that."""
    monkeypatch.setenv("JUDGE_KEY", LONG_KEY)
    judge_server.answer = lambda request: judge_replies.Reply(json.dumps({"error": {"message": body}}), status)
    with pytest.raises(RequestError) as caught:
        made(api_key_env="JUDGE_KEY", max_retries=0).score(["p"], ["r"])
    assert LONG_KEY[:12] not in str(caught.value)
    assert status == 200 or "[key]" in str(caught.value)
    judge_server.answer = lambda request: judge_replies.verdict(f"your key is {'x' * 90}{LONG_KEY}")
    with pytest.raises(ScorerFault, match=r"your key is x*\[key\]") as fault:
        made(api_key_env="JUDGE_KEY").score(["p"], ["s"])
    assert LONG_KEY[:12] not in str(fault.value)


def test_an_endpoint_that_only_keeps_its_connection_alive_is_given_up(
    made: Make, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte within each ``timeout`` is no verdict: after all that its tries may take the request has failed."""
    monkeypatch.setattr(judge, "LONGEST_PAUSE", 0.2)
    scorer = made(timeout=0.2, max_retries=0)
    monkeypatch.setattr(scorer, "_ask", lambda *_: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"has given no verdict for 0.4 s; is it stuck"):
        scorer.score(["p"], ["r"])
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"message": "filtered by policy", "code": "content_filter"}}, 400),
        ({"error": {"message": "too many tokens", "code": "context_length_exceeded"}}, 400),
        ({"detail": "too large"}, 413),
    ],
)
def test_a_text_that_the_endpoint_refuses_is_a_verdict_that_cannot_be_read(
    made: Make, judge_server: Any, judge_replies: Any, body: dict[str, Any], status: int
) -> None:
    def answer(request: dict[str, Any]) -> Any:
        refused = "naughty" in request["messages"][0]["content"]
        return judge_replies.Reply(json.dumps(body), status) if refused else judge_replies.verdict("Score: 5")

    judge_server.answer = answer
    lenient = made(unreadable="leave-out")
    assert np.array_equal(lenient.score(["p"] * 3, ["a", "naughty", "c"]), [5.0, np.nan, 5.0], equal_nan=True)
    usage = lenient.take_usage()
    assert (usage["verdicts"], usage["unreadable"]) == (3, 1)
    with pytest.raises(ScorerFault, match=rf"the endpoint refuses this text \(HTTP {status}: "):
        made().score(["p"], ["naughty"])


def test_a_busy_endpoint_is_asked_again(made: Make, judge_server: Any, judge_replies: Any) -> None:
    busy = judge_replies.Reply("{}", 429, headers={"retry-after-ms": "1"})
    judge_server.answer = lambda request: judge_replies.verdict("Score: 4") if len(judge_server.requests) > 2 else busy
    assert made(max_retries=3).score(["p"], ["r"]) == [4.0]
    assert len(judge_server.requests) == 3


def test_a_slow_endpoint_meets_the_time_limit(made: Make, judge_server: Any) -> None:
    judge_server.delay = 1.0
    with pytest.raises(RequestError, match=r"gives no answer within 0.1 s \(asked once\); raise timeout"):
        made(timeout=0.1).score(["p"], ["r"])


def test_nobody_at_the_address(made: Make) -> None:
    with pytest.raises(RequestError, match=r"the judge at http://127.0.0.1:1/v1 cannot be reached .*base_url right\?"):
        made(base_url="http://127.0.0.1:1/v1").score(["p"], ["r"])


def test_an_interruption_waits_for_no_request(made: Make, judge_server: Any, judge_replies: Any) -> None:
    def answer(request: dict[str, Any]) -> Any:
        if len(judge_server.requests) > 1:
            time.sleep(5)
        return judge_replies.verdict("Score: 7")

    judge_server.answer = answer
    scores = made(concurrency=1).stream(["p"] * 3, ["a", "b", "c"])
    assert next(scores) == (0, 7.0)
    started = time.monotonic()
    scores.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("value", "part"),
    [(None, "JUDGE_KEY is not set, or empty"), ("  ", "is not set, or empty"), (f"{KEY} x", "holds white space")],
)
def test_a_key_that_cannot_be_sent_is_refused_before_anything_is(
    made: Make, judge_server: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, part: str
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(RequestError, match=part) as caught:
        made(api_key_env="JUDGE_KEY")
    assert KEY not in str(caught.value)
    assert not judge_server.requests


def test_without_the_library_the_card_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "judge.txt").write_text(TEMPLATE)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"needs the library openai; install it with: pip install moalign\[judge\]"):
        JudgeScorer(objective(), tmp_path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"{prompt}", "judge.txt: neither template nor pair_template has the field {response}"),
        (
            b"{prompt} {respnse} {response}",
            "unknown field {respnse}; allowed: {prompt}, {response}; did you mean 'response'?",
        ),
        (b"\xff{response}", "not UTF-8 text"),
        (None, "No such file or directory"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, part: str) -> None:
    if content is not None:
        (tmp_path / "judge.txt").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        JudgeScorer(objective(), tmp_path)
    assert part in str(caught.value)
    assert str(tmp_path / "judge.txt") in str(caught.value)


# -- verdicts that cannot be read ----------------------------------------------------------------


class Judge:
    """A judge without an endpoint: scores by response; None: a verdict that cannot be read."""

    name, maximise, revision, cheap = "help", True, "judge 1", False

    def __init__(self, scores: dict[str, float | None], fails: bool = False) -> None:
        self.scores, self.fails = scores, fails
        self.asked: list[str] = []

    def score(self, prompts: Any, responses: Any) -> list[float]:
        raise AssertionError("a scorer with a stream is asked by it")

    def stream(self, prompts: Any, responses: Any) -> Any:
        for at in reversed(range(len(responses))):
            self.asked.append(responses[at])
            score = self.scores[responses[at]]
            if score is None:
                yield at, ScorerFault("gave a verdict that cannot be read") if self.fails else math.nan
            else:
                yield at, score


def test_an_unreadable_verdict_ends_the_work_naming_the_sample_and_keeps_what_was_scored(tmp_path: Path) -> None:
    with Store(tmp_path / "scores.sqlite") as store:
        with pytest.raises(WorkError, match=r"cannot be read for sample 1 .*the 1 of 3 scores made so far are kept in"):
            RewardPanel([Judge({"a": 1, "b": None, "c": 3}, fails=True)], store).score(["p"] * 3, ["a", "b", "c"])
        again = Judge({"a": 1, "b": 2, "c": 3})
        assert RewardPanel([again], store).score(["p"] * 3, ["a", "b", "c"])[:, 0].tolist() == [1, 2, 3]
        assert again.asked == ["b", "a"]


def test_a_score_left_out_is_the_mean_of_its_prompt_s_others_else_of_all_and_never_kept(tmp_path: Path) -> None:
    judge = Judge({"a": 1, "b": None, "c": 5, "d": None, "e": 9})
    prompts, responses = ["p", "p", "p", "q", "r"], ["a", "b", "c", "d", "e"]
    with Store(tmp_path / "scores.sqlite") as store:
        panel = RewardPanel([judge], store)
        assert panel.score(prompts, responses)[:, 0].tolist() == [1, 3, 5, 5, 9]
        judge.asked.clear()
        gaps = panel.score(prompts, responses, gaps=True)[:, 0]
        assert np.isnan(gaps[[1, 3]]).all()
        assert gaps[[0, 2, 4]].tolist() == [1, 5, 9]
        assert judge.asked == ["d", "b"]
        with pytest.raises(WorkError, match="none of the judge's 2 verdicts can be read"):
            panel.score(["p", "p"], ["b", "d"])


def test_an_evaluation_s_means_are_over_what_could_be_read() -> None:
    """Two preferences, three prompts, two samples: by hand."""
    nan = math.nan
    unit = np.array([1, 3, nan, 4, nan, nan, 0, 0, 2, 2, 4, nan])[:, None]
    scores = _per_prompt(unit, [(1.0,), (0.0,)], 2, [True])[:, :, 0]
    assert scores[:, 0].tolist() == [2, 4, 3]  # the last prompt has none: it counts as the mean of the others
    assert scores[:, 1].tolist() == [0, 2, 4]
    assert scores.mean(axis=0).tolist() == [3, 2]
    damaged = _per_prompt(unit, [(1.0,), (0.0,)], 2, [False])[:, :, 0]
    assert np.isnan(damaged).sum() == 3, "of a scorer that leaves none out a NaN is no gap"
    with pytest.raises(WorkError, match="left out every score of an objective at a preference"):
        _per_prompt(np.where(np.arange(12)[:, None] < 6, nan, unit), [(1.0,), (0.0,)], 2, [True])


def test_nothing_is_learned_from_a_response_whose_score_was_left_out() -> None:
    scored = Scored(
        ["p", "q", "r"], [Response("a"), Response("b"), Response("c")], np.array([[1.0, 2], [np.nan, 2], [3, 4]]), 30
    )
    left = scored.complete()
    assert (left.prompts, [response.text for response in left.responses]) == (["p", "r"], ["a", "c"])
    assert left.raw.tolist() == [[1, 2], [3, 4]]
    assert left.sampled == 30  # they were sampled, and cost that
    assert left.complete() is left

"""Rules on hand-worked texts; their options' error messages."""

from __future__ import annotations

import doctest
import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config.objectives import RuleObjective
from moalign.core.errors import RequestError
from moalign.rewards import rules
from moalign.rewards.rules import RULES, RuleScorer


def value(rule: str, text: str, **options: object) -> float:
    spec = RuleObjective(name="x", kind="rule", rule=rule, options=options)
    return RuleScorer(spec).score(["a prompt"], [text])[0]


@pytest.mark.parametrize(
    ("rule", "text", "options", "expected"),
    [
        ("length", "Don't stop, 2 more!", {}, 4),
        ("length", "Don't stop, 2 more!", {"unit": "characters"}, 19),
        ("length", "a - b", {"unit": "tokens"}, 3),
        ("length", "a - b", {}, 2),
        ("length", "one two three", {"target": 5}, -2),
        ("detail", "", {}, 0),
        ("detail", "It is what it is; I don't.", {}, 0),
        ("detail", "Boil the egg, then peel the EGG.", {}, math.log(4)),  # boil, egg, peel
        ("detail", "The cat’s cats, 375 of 80 kg, at 6pm", {}, math.log(3)),  # cat, cats
        ("detail", "Größe und größe", {}, math.log(3)),  # und is no English stop word
        ("length", "one two three", {"target": 1}, -2),
        ("length", "one two three", {"target": 3}, 0),
        ("length", "", {}, 0),
        ("brevity", "one two three", {}, -3),
        ("brevity", "", {}, 0),
        # a b a b c: bigrams ab ba ab bc -> 3 of 4
        ("distinct-n", "a b A b c", {"n": 2}, 0.75),
        ("distinct-n", "a a a", {"n": 1}, 1 / 3),
        ("distinct-n", "a", {"n": 2}, 0.0),
        ("repetition", "a b A b c", {"n": 2}, 0.25),
        ("repetition", "a", {"n": 2}, 0.0),
        ("keyword-density", "Art at the party, art!", {"keywords": ["art"]}, 2 / 5),
        ("keyword-density", "Art at the party, art!", {"keywords": ["art"], "ignore_case": False}, 1 / 5),
        ("keyword-density", "ice cream and ice", {"keywords": ["ice", "ice cream"]}, 2 / 4),
        ("keyword-density", "what? (now)", {"keywords": ["(now)"]}, 1 / 2),
        ("keyword-density", "...", {"keywords": ["art"]}, 0.0),
        # 5 of 10 characters that are neither white space nor quote marks
        ("dialogue-share", '"Hello" there', {}, 0.5),
        ("dialogue-share", "“Hello” there", {}, 0.5),
        ("dialogue-share", '"Hi you" he said', {"unit": "words"}, 0.5),
        ("dialogue-share", '"All of it."', {}, 1.0),
        ("dialogue-share", "none of it", {}, 0.0),
        ("dialogue-share", "", {}, 0.0),
        # the first line's open quote neither counts nor turns the second line inside out
        ("dialogue-share", 'aaaa "bb\n"cccc" dd', {}, 4 / 12),
        ("dialogue-share", 'aaaa "bb\n"cccc" dd', {"unclosed": "count"}, 6 / 12),
        ("dialogue-share", "it's 'single' only", {}, 0.0),
        ("ends-with", "He left.  \n", {}, 1.0),
        ("ends-with", 'He said "yes."', {}, 1.0),
        ("ends-with", 'He said "yes."', {"ignore_quotes": False}, 0.0),
        ("ends-with", "He left and", {}, 0.0),
        ("ends-with", "the end", {"endings": ["the end"]}, 1.0),
        ("ends-with", "", {}, 0.0),
        ("regex-count", "a1b22c", {"pattern": r"\d+"}, 2),
        ("regex-count", "Ha ha HA", {"pattern": "ha", "ignore_case": True}, 3),
        ("regex-count", "ha ha no", {"pattern": "ha", "per_word": True}, 2 / 3),
        ("regex-count", "?!", {"pattern": "[?]", "per_word": True}, 0),
    ],
)
def test_hand_worked_values(rule: str, text: str, options: dict[str, object], expected: float) -> None:
    assert value(rule, text, **options) == pytest.approx(expected, abs=1e-12)


def test_vader_tells_good_from_bad_and_averages_sentences() -> None:
    pytest.importorskip("vaderSentiment", reason="the optional extra `text` is not installed")
    good, bad = "What a wonderful day.", "This is horrible."
    assert value("vader", good) > 0.3 > -0.3 > value("vader", bad)
    mean = (value("vader", good) + value("vader", bad)) / 2
    assert value("vader", f"{good} {bad}", unit="sentence") == pytest.approx(mean)
    assert value("vader", "", unit="sentence") == 0.0 == value("vader", "")


def test_vader_absent_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rules._vader_analyser.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RequestError, match=r"pip install moalign\[text\]"):
        RuleScorer(RuleObjective(name="x", kind="rule", rule="vader"))


@pytest.mark.parametrize(
    ("rule", "options", "parts"),
    [
        ("lenght", {}, ["objective 'x'", "unknown rule 'lenght'", "did you mean 'length'?"]),
        ("length", {"targt": 3}, ["objective 'x'", "'length'", "'targt'", "allowed: target, unit", "mean 'target'?"]),
        ("length", {"unit": "bytes"}, ["'unit'", "'bytes'", "'words', 'characters' or 'tokens'"]),
        ("distinct-n", {"n": 0}, ["'n'", "found 0"]),
        ("keyword-density", {}, ["'keywords' is needed"]),
        ("keyword-density", {"keywords": [" "]}, ["a keyword is blank"]),
        ("regex-count", {"pattern": "("}, ["not a regular expression"]),
        ("regex-count", {"pattern": "a*"}, ["matches the empty text"]),
        ("ends-with", {"endings": [""]}, ["an ending is empty"]),
    ],
)
def test_wrong_options_are_named(rule: str, options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        value(rule, "text", **options)
    for part in parts:
        assert part in str(caught.value)


def test_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(rules)
    assert result.attempted >= 3 and result.failed == 0


def test_all_option_errors_come_at_once() -> None:
    with pytest.raises(RequestError) as caught:
        value("length", "text", unit="bytes", targt=3)
    assert len(caught.value.problems) == 2


def test_revision_follows_rule_and_options_only() -> None:
    def revision(name: str, rule: str, **options: object) -> str:
        return RuleScorer(RuleObjective(name=name, kind="rule", rule=rule, options=options)).revision

    assert revision("a", "length") == revision("b", "length", unit="words")
    assert len({revision("a", "length"), revision("a", "brevity"), revision("a", "length", unit="tokens")}) == 3


def test_every_rule_has_a_summary_and_is_cheap_unless_stored() -> None:
    assert all(rule.summary.endswith((".", "ICWSM 2014).")) for rule in RULES.values())
    assert RuleScorer(RuleObjective(name="x", kind="rule", rule="length")).cheap
    assert not RuleScorer(RuleObjective(name="x", kind="rule", rule="length", store=True)).cheap


_NEEDED = {"keyword-density": {"keywords": ["a"]}, "regex-count": {"pattern": "a"}}
_SHARES = ["distinct-n", "repetition", "dialogue-share", "ends-with"]


@settings(deadline=None)
@given(st.text(alphabet=st.sampled_from("ab A'\"“”.\n’\ud800é7"), max_size=60))
def test_any_text_gets_a_finite_score_and_shares_stay_in_range(text: str) -> None:
    for rule in RULES:
        if rule == "vader":
            continue
        score = value(rule, text, **_NEEDED.get(rule, {}))
        assert abs(score) < 1e3
        assert rule not in _SHARES or 0 <= score <= 1


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("Fry onions. Then add garl", "Fry onions."),
        ("Fry onions, garlic and", ""),
        ("Really? Yes! Onions", "Really? Yes!"),
        ("Fry onions.", "Fry onions."),
        ("", ""),
    ],
)
def test_detail_in_whole_sentences_counts_nothing_behind_the_last_one(text: str, counted: str) -> None:
    assert rules.detail(text, whole_sentences=True) == rules.detail(counted)

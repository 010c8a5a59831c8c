"""Collapse of text: each cause alone, at its limit, and the summary."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import RequestError
from moalign.lm.quality import CAUSES, collapse, collapse_report, distinct, kl_to_base, short_below

HEALTHY = "the small cat sat on the mat and looked at the moon"


def different(count: int, prefix: str = "w") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def test_a_healthy_text_has_no_cause() -> None:
    assert collapse(HEALTHY.split()) == set()


def test_short_is_fewer_than_five_tokens() -> None:
    assert collapse([]) == {"short"}
    assert collapse(different(4)) == {"short"}
    assert collapse(different(5)) == set()
    assert collapse(["a"] * 4) == {"short"}, "two equal 3-grams are a ratio of 1/2"


def test_short_is_what_the_task_says_and_an_empty_answer_always() -> None:
    assert collapse(different(2), short=3) == {"short"}
    assert collapse(different(3), short=3) == set()
    assert collapse([], short=1) == {"short"}
    assert collapse_report([different(2), different(3)], short=3)["causes"]["short"] == 0.5


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([40] * 100, 5),  # long data: a brief answer is still no collapse
        ([3] * 100, 3),
        ([2, *[3] * 199], 3),  # one in 200 is shorter
        ([2, 2, 2, *[3] * 97], 2),  # three in 100 are no exception
        ([0] * 100, 1),
        ([1, 2, 9], 1),
        ([], 5),
    ],
)
def test_how_short_is_short_comes_from_the_data(lengths: list[int], wanted: int) -> None:
    result = short_below(lengths)
    assert result == wanted
    assert sum(length < result for length in lengths) <= 0.01 * len(lengths) or result == 1


CHINESE = "今天天气很好，我们去公园散步吧。"


def test_a_chinese_sentence_is_not_short_and_repeats_as_any_other() -> None:
    """As one character a token; between white space it was one word."""
    assert collapse(list(CHINESE)) == set()
    assert collapse(list("好的")) == {"short"}
    assert collapse(list(CHINESE * 3)) == {"loop"}
    assert collapse(list("好" * 12)) == {"repetitive", "loop"}


def test_a_brief_answer_is_none_where_brevity_is_what_the_data_shows() -> None:
    """``Yes, of course.`` is three words, and was dropped by methods that were asked for brevity."""
    tokens = ["Yes", ",", " of", " course", "."]
    assert collapse(tokens, short_below([60] * 100)) == set()
    assert collapse(["Sure", "."], short_below([60] * 100)) == {"short"}
    assert collapse(["Sure", "."], short_below([2, 60] * 50)) == set()


def test_repetitive_is_a_distinct_3_ratio_below_three_tenths() -> None:
    # 11 equal tokens: 9 3-grams, 1 different. 3 different of 10 is exactly .3 and allowed.
    assert collapse(["a"] * 11) == {"repetitive"}
    cycle = ["a", "b", "c"] * 4
    assert distinct(cycle) == 0.3
    assert "repetitive" not in collapse(cycle)
    assert distinct([*cycle, "a"]) == pytest.approx(3 / 11)
    assert "repetitive" in collapse([*cycle, "a"])


def test_loop_is_one_ten_gram_three_times() -> None:
    phrase = different(10)
    twice = phrase + different(3, "x") + phrase
    assert collapse(twice + different(3, "y")) == set()
    assert collapse(twice + different(3, "y") + phrase) == {"loop"}
    # 12 equal tokens hold the same 10-gram three times (overlaps count); 11 hold it twice.
    assert collapse(["a"] * 12) == {"repetitive", "loop"}


def test_distinct_by_hand() -> None:
    assert distinct(["a", "b"] * 3, 2) == pytest.approx(2 / 5)
    assert distinct(["a", "b"], 3) is None


def test_report_by_hand() -> None:
    report = collapse_report([HEALTHY.split(), ["no"], ["go"] * 12, HEALTHY.split()])
    assert report["rate"] == 0.5
    assert report["causes"] == {"short": 0.25, "repetitive": 0.25, "loop": 0.25}
    assert report["mean_length"] == (12 + 1 + 12 + 12) / 4
    assert report["distinct_3"] == pytest.approx((1 + 0.1 + 1) / 3)


def test_only_tiny_responses() -> None:
    report = collapse_report([[], ["a", "b"]])
    assert report["rate"] == report["causes"]["short"] == 1.0
    assert report["distinct_3"] == 0.0


@pytest.mark.parametrize("responses", [[], "one string", ["two", "texts"]])
def test_no_list_of_responses_is_refused(responses: object) -> None:
    with pytest.raises(RequestError, match="at least one response"):
        collapse_report(responses)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c"]), max_size=40), min_size=1, max_size=8))
def test_report_counts_what_a_plain_count_of_n_grams_finds(texts: list[list[str]]) -> None:
    expected = []
    for tokens in texts:
        threes = [" ".join(tokens[i : i + 3]) for i in range(max(0, len(tokens) - 2))]
        tens = Counter(" ".join(tokens[i : i + 10]) for i in range(max(0, len(tokens) - 9)))
        causes = {"short"} if len(tokens) < 5 else set()
        causes |= {"repetitive"} if threes and 10 * len(set(threes)) < 3 * len(threes) else set()
        causes |= {"loop"} if any(times >= 3 for times in tens.values()) else set()
        assert collapse(tokens) == causes
        expected.append(causes)
    report = collapse_report(texts)
    assert report["rate"] == pytest.approx(sum(map(bool, expected)) / len(texts))
    assert list(report["causes"]) == list(CAUSES)
    for cause in CAUSES:
        assert report["causes"][cause] == pytest.approx(sum(cause in causes for causes in expected) / len(texts))
    assert max(report["causes"].values()) <= report["rate"] <= sum(report["causes"].values()) + 1e-12


def test_kl_to_base_by_hand() -> None:
    # 2, -0.5 and 1.5 nats over 2 + 1 + 3 tokens.
    result = kl_to_base([-1, -2, -0.5], [-3, -1.5, -2], [2, 1, 3])
    assert result == {"per_response": 1.0, "per_token": 0.5}


def test_kl_to_base_estimates_the_divergence_it_is_named_after() -> None:
    rng = np.random.default_rng(0)
    own, base = rng.dirichlet(np.ones(6), 2)
    wrote = rng.choice(6, size=200_000, p=own)
    result = kl_to_base(np.log(own)[wrote], np.log(base)[wrote], np.ones(len(wrote)))
    assert result["per_response"] == pytest.approx(float((own * np.log(own / base)).sum()), rel=0.02)
    assert kl_to_base(np.log(own), np.log(own), np.ones(6))["per_response"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], [], []), "one entry per response"),
        (([0.0], [0.0, 0.0], [1]), "one entry per response"),
        (([0.0, float("nan")], [0.0, 0.0], [1, 1]), "policy: row 2"),
        (([0.0], [float("-inf")], [1]), "base: row 1"),
        (([0.0], [0.0], [0]), "response 1 has 0 tokens"),
    ],
)
def test_kl_to_base_refuses(arguments: tuple[list[float], ...], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        kl_to_base(*arguments)

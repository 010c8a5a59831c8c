"""Splits by hash: stable, disjoint, blind to case and white space; leaks are found."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config.card import SplitSpec
from moalign.core.errors import RequestError
from moalign.data.splits import SPLITS, check_leaks, normalised, split, split_of

SPEC = SplitSpec()
PROMPTS = [f"Tell me about topic {index}, please." for index in range(3000)]
GOLDEN = "ceb07417aae22ce4"
"""Of the splits of PROMPTS, in order."""
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


def test_a_split_is_the_hash_of_salt_and_text() -> None:
    # An independent reading of the definition, for plain text in lower case.
    for prompt in ("why is the sky blue?", "a", "tell me a story"):
        number = int(hashlib.sha256(b"moalign\x00" + prompt.encode()).hexdigest()[:16], 16)
        expected = "train" if number < 0.8 * 2**64 else "calibration" if number < 0.9 * 2**64 else "eval"
        assert split_of(prompt, SPEC) == expected


def test_splits_never_change() -> None:
    # Written down once: a change here breaks the comparison with every older run.
    messages = ",".join(split_of(prompt, SPEC) for prompt in PROMPTS)
    assert hashlib.sha256(messages.encode()).hexdigest()[:16] == GOLDEN


def test_shares_are_kept_within_noise() -> None:
    counts = Counter(split_of(prompt, SPEC) for prompt in PROMPTS)
    # Five standard deviations of a binomial count.
    assert abs(counts["train"] - 2400) < 5 * (3000 * 0.8 * 0.2) ** 0.5
    assert abs(counts["calibration"] - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5
    assert abs(counts["eval"] - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5


def test_order_and_company_do_not_matter() -> None:
    shuffled = random.Random(0).sample(PROMPTS, 1500)
    parts, again = split(PROMPTS, SPEC), split(shuffled, SPEC)
    assert list(parts) == list(SPLITS)
    assert sorted(itertools.chain(*parts.values())) == sorted(PROMPTS)
    for name in SPLITS:
        assert set(again[name]) == set(parts[name]) & set(shuffled)
        assert parts[name] == [prompt for prompt in PROMPTS if prompt in set(parts[name])]


def test_another_salt_is_another_split() -> None:
    other = SplitSpec(salt="other")
    moved = sum(split_of(prompt, SPEC) != split_of(prompt, other) for prompt in PROMPTS)
    # Two independent draws differ with probability 1 - (.64 + .01 + .01) = .34.
    assert 800 < moved < 1240


def test_larger_train_share_only_adds_prompts_to_train() -> None:
    wide = SplitSpec(train=0.9, calibration=0.05, eval=0.05)
    assert set(split(PROMPTS, SPEC)["train"]) < set(split(PROMPTS, wide)["train"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why is it so?", "why  is IT\tso?\n"),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "CAFE\u0301"),
        ("a\u00a0b", "a b"),
        ("你好\u3000世界 😀", " 你好 世界 😀"),
    ],
)
def test_near_duplicates_are_one_prompt(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)
    assert split_of(one, SPEC) == split_of(other, SPEC)


def test_different_prompts_stay_different() -> None:
    texts = ["ab", "a b", "a", "á", "b a", "😀", "😁", "мир", "mir"]
    assert len({normalised(text) for text in texts}) == len(texts)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=30), st.sampled_from([" ", "\n", "\u3000", "\t \r"]))
def test_split_parts_never_leak(prompts: list[str], space: str) -> None:
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for prompt in prompts:
        for variant in (prompt, space + prompt + space, prompt.replace(" ", space)):
            parts[split_of(variant, SPEC)].append(variant)
    check_leaks(parts)


def test_a_leak_names_the_prompt_and_both_splits() -> None:
    with pytest.raises(RequestError) as caught:
        check_leaks({"train": ["How are you?", "b"], "calibration": ["c"], "eval": ["d", "How are you?"]})
    assert str(caught.value) == (
        "splits: the prompt 'How are you?' is in eval and in train; a prompt may be in one split only"
    )


def test_a_leak_by_case_and_white_space_shows_both_spellings() -> None:
    with pytest.raises(RequestError) as caught:
        check_leaks({"train": ["How are you?"], "eval": ["how  are YOU? "]})
    assert str(caught.value) == (
        "splits: the prompt 'how  are YOU? ' is in eval and in train (there as 'How are you?'); "
        "a prompt may be in one split only"
    )


def test_many_leaks_are_counted() -> None:
    with pytest.raises(RequestError) as caught:
        check_leaks({"train": PROMPTS[:40], "eval": PROMPTS[:40]})
    assert len(caught.value.problems) == 6
    assert caught.value.problems[-1] == "splits: 35 more prompts are in two splits"


def test_a_duplicate_within_one_split_is_no_leak() -> None:
    check_leaks({"train": ["a", "A "], "calibration": [], "eval": ["b"]})


def test_an_empty_split_is_refused_with_counts() -> None:
    train = [prompt for prompt in PROMPTS if split_of(prompt, SPEC) == "train"][:3]
    with pytest.raises(RequestError) as caught:
        split(train, SPEC)
    assert str(caught.value) == (
        "splits: too few prompts fall into calibration and eval (3 prompts: train 3, calibration 0, eval 0); every "
        "split needs at least one, eval two, whose spread says how sure a result is: give more prompts, larger shares, "
        "or another splits.salt"
    )


def test_one_prompt_is_too_few_to_judge_by() -> None:
    """It has no spread: every difference would be certain."""
    of = {
        name: [prompt for prompt in PROMPTS if split_of(prompt, SPEC) == name]
        for name in ("train", "calibration", "eval")
    }
    given = [*of["train"][:3], *of["calibration"][:1], *of["eval"][:1]]
    with pytest.raises(
        RequestError, match=r"too few prompts fall into eval \(5 prompts: train 3, calibration 1, eval 1\)"
    ):
        split(given, SPEC)
    assert len(split([*given, of["eval"][1]], SPEC)["eval"]) == 2

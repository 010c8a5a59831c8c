"""HH-RLHF dialogues: exact splitting of replies and pairs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import RequestError
from moalign.data.dialogue import ASSISTANT, HUMAN, shorten, split_pair

TALK = f"{HUMAN} Hi{ASSISTANT} Hello.{HUMAN} A joke?{ASSISTANT}"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def test_a_reply_is_not_stripped_of_letters_of_the_marker() -> None:
    # str.strip(ASSISTANT) would eat every leading and trailing A, s, i, t, a, n, ':' and line end.
    assert split_pair(f"{ASSISTANT}stain", f"{ASSISTANT}tints\n") == (ASSISTANT, "stain", "tints\n")


def test_a_pair_shares_its_prompt_up_to_the_last_marker() -> None:
    assert split_pair(TALK + " Yes, one.", TALK + " Yes, two.") == (TALK, " Yes, one.", " Yes, two.")


def test_one_reply_may_be_the_beginning_of_the_other() -> None:
    assert split_pair(TALK + " Yes", TALK + " Yes.") == (TALK, " Yes", " Yes.")
    assert split_pair(TALK, TALK + " Yes.") == (TALK, "", " Yes.")


def test_dialogues_that_part_early_keep_their_later_turns() -> None:
    first = f"{HUMAN} Hi{ASSISTANT}"
    chosen = f"{first} Hello.{HUMAN} Bye{ASSISTANT} Bye."
    rejected = f"{first} What?{HUMAN} Bye{ASSISTANT} Bye."
    assert split_pair(chosen, rejected) == (first, chosen[len(first) :], rejected[len(first) :])


def test_half_a_marker_is_not_shared() -> None:
    with pytest.raises(RequestError, match=r"^f\.jsonl:3: chosen and rejected share no turn"):
        split_pair("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistance", "f.jsonl:3")


@settings(deadline=None)
@given(TEXT, TEXT, TEXT)
def test_prompt_and_reply_are_the_dialogue_again(beginning: str, chosen: str, rejected: str) -> None:
    whole, other = beginning + ASSISTANT + chosen, beginning + ASSISTANT + rejected
    prompt, first, second = split_pair(whole, other)
    assert (prompt + first, prompt + second) == (whole, other)
    assert prompt.endswith(ASSISTANT)
    # No longer shared prompt exists.
    assert not (ASSISTANT in first and ASSISTANT in second and first.split(ASSISTANT)[0] == second.split(ASSISTANT)[0])


def test_long_texts_are_shortened_in_messages() -> None:
    assert shorten("abc") == "'abc'"
    assert shorten("x" * 10**6) == "'" + "x" * 59 + "..."
    assert shorten([1, 2]) == "[1, 2]"

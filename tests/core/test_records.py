"""The record types."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest

from moalign.core.records import LoggedResponse, Pair, Prompt, prompt_id


def test_the_id_is_the_head_of_the_sha256_of_the_text() -> None:
    # sha256("abc") is a published test vector (FIPS 180-2, appendix B.1).
    assert prompt_id("abc") == "ba7816bf8f01cfea"
    assert prompt_id("naïve 😀") == hashlib.sha256("naïve 😀".encode()).hexdigest()[:16]


def test_a_prompt_carries_its_id() -> None:
    assert Prompt.of("abc") == Prompt("abc", "ba7816bf8f01cfea")


@pytest.mark.parametrize("record", [Prompt("a", "b"), LoggedResponse("p", "r"), Pair("p", "c", "r")])
def test_records_are_frozen_and_hashable(record: Prompt | LoggedResponse | Pair) -> None:
    assert record in {record}
    field = dataclasses.fields(record)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, field, "other")

"""The two kinds of failure and the nearest name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import MoalignError, RequestError, WorkError, did_you_mean, nearest, unknown


def test_exit_codes() -> None:
    assert RequestError("x").exit_code == 2
    assert WorkError("x").exit_code == 1
    assert issubclass(RequestError, MoalignError)
    assert issubclass(WorkError, MoalignError)
    assert not issubclass(WorkError, RequestError)


def test_a_request_error_keeps_every_problem() -> None:
    error = RequestError("first", "second")
    assert error.problems == ("first", "second")
    assert str(error) == "first\nsecond"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rick", "ric"),
        ("MO-ODPO", "mo-odpo"),
        ("mo_odpo", "mo-odpo"),
        ("moodpo", "mo-odpo"),
        ("best_of_n", "best-of-n"),
        ("ric", "ric"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_name(name: str, expected: str | None) -> None:
    assert nearest(name, ["ric", "mo-odpo", "best-of-n", "sft"]) == expected


def test_nothing_is_near_when_nothing_is_allowed() -> None:
    assert nearest("ric", []) is None
    assert did_you_mean("ric", []) == ""
    assert did_you_mean("rick", ["ric"]) == "; did you mean 'ric'?"


def test_case_is_kept_as_the_allowed_name_has_it() -> None:
    assert nearest("macro", ["Macro"]) == "Macro"


def test_unknown_lists_what_is_allowed_and_says_where() -> None:
    assert str(unknown("method", "rick", ["ric", "moc"], "recipe.yaml:3")) == (
        "recipe.yaml:3: unknown method 'rick'; allowed: moc, ric; did you mean 'ric'?"
    )
    assert str(unknown("task", "x", [])) == "unknown task 'x'; allowed: none"


@settings(deadline=None, max_examples=100)
@given(name=st.text(max_size=12), allowed=st.lists(st.text(min_size=1, max_size=12), max_size=6))
def test_a_near_name_is_an_allowed_one_and_an_exact_one_is_itself(name: str, allowed: list[str]) -> None:
    near = nearest(name, allowed)
    assert near is None or near in allowed
    for exact in allowed:
        result = nearest(exact, allowed)
        assert result is not None
        assert result.casefold() == exact.casefold()

"""What a run's metrics say at its end."""

from __future__ import annotations

from typing import Any

import pytest

from moalign.training.diagnostics import at_the_end


def lines(*rows: tuple[str, int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"phase": phase, "step": step, **told} for phase, step, told in rows]


def test_the_mean_over_the_last_tenth_of_the_phase() -> None:
    told = lines(
        ("online", 90, {"kl": 100.0, "e/one": 9.0}),
        ("online", 95, {"kl": 1.0, "e/one": 1.0, "e/two": 4.0, "seconds": 7}),
        ("online", 100, {"kl": 3.0, "e/one": 2.0, "entropy": None}),
        ("other", 100, {"kl": 50.0}),
    )
    assert at_the_end(told, "online", 100, ("kl", "e/", "entropy")) == {
        "kl": 2.0,
        "e/one": 1.5,
        "e/two": 4.0,
    }


def test_a_short_phase_has_its_last_line() -> None:
    told = lines(("online", 1, {"kl": 5.0}), ("online", 2, {"kl": 7.0}))
    assert at_the_end(told, "online", 50, ("kl",)) == {"kl": 7.0}
    assert at_the_end([], "online", 50, ("kl",)) == {}


def test_a_phase_that_a_limit_ended_has_what_it_learned_last() -> None:
    """Not the rollout beyond the limit, whose line has no loss."""
    told = lines(
        *(("online", step, {"kl": float(step), "loss": 1.0, "entropy": 0.5}) for step in range(1, 21)),
        ("online", 21, {"kl": 90.0}),
    )
    assert at_the_end(told, "online", 100, ("kl", "entropy")) == {"kl": 19.5, "entropy": 0.5}


@pytest.mark.parametrize("names", [("k",), ("kl_",), ("other/",)])
def test_only_what_is_asked_for(names: tuple[str, ...]) -> None:
    assert at_the_end(lines(("online", 1, {"kl": 5.0, "kl_coef": 1.0})), "online", 1, names) == {}

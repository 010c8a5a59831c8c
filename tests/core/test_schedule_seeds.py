"""Schedules and seeds."""

from __future__ import annotations

import pytest

from moalign.core.schedule import factor
from moalign.core.seeds import derive


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warmup_rises_along_a_line_to_the_peak(name: str) -> None:
    assert [factor(name, step, 20, 4) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_after_warmup() -> None:
    assert [factor("constant", step, 10) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]
    assert [factor("linear", step, 10) for step in (0, 5, 9, 10)] == pytest.approx([1.0, 0.5, 0.1, 0.0])
    assert [factor("linear", step, 10, 2) for step in (2, 6, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert [factor("cosine", step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert factor("cosine", 2, 8) == pytest.approx(0.8535534)  # (1 + cos(pi / 4)) / 2


def test_it_never_falls_below_zero_or_divides_by_it() -> None:
    assert factor("linear", 12, 10) == 0.0
    assert factor("cosine", 12, 10) == pytest.approx(0.0)
    assert factor("linear", 0, 0) == 1.0
    assert factor("linear", 3, 3, 3) == 1.0


def test_seeds_are_stable_across_processes_and_places_apart() -> None:
    assert derive(0, "online", 3) == derive(0, "online", 3)
    assert derive(0, "online", 3) == 547076274151665429  # written down: a resume may run another version of Python
    places = [(0, "a", 1), (1, "a", 1), (0, "a", 2), (0, "a1"), (0, "a", 1, "x"), (0, "b", 1), (0, "a", 11)]
    result = [derive(*place) for place in places]
    assert len(set(result)) == len(places)
    assert all(0 <= seed < 2**63 for seed in result)

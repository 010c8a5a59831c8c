"""When training should have stopped: every rule against curves worked by hand."""

from __future__ import annotations

import pytest

from moalign.core.errors import RequestError
from moalign.evaluation.stopping import by_kl, by_patience, by_pessimism, lost

KL = [0.5, 2.0, 4.5, 9.0, 30.0]
BELIEVED = [0.40, 0.60, 0.75, 0.90, 1.20]
SPREAD = [0.05, 0.06, 0.10, 0.20, 0.60]
TRUE = [0.38, 0.55, 0.66, 0.60, 0.10]


@pytest.mark.parametrize(
    ("budget", "stops"), [(0.4, 0), (0.5, 0), (2.0, 1), (4.4, 1), (4.5, 2), (10.0, 3), (1000.0, 4)]
)
def test_a_budget_stops_at_the_last_snapshot_within_it(budget: float, stops: int) -> None:
    assert by_kl(KL, budget) == stops


def test_a_kl_that_comes_back_within_the_budget_counts() -> None:
    assert by_kl([1.0, 6.0, 3.0, 8.0], 4.0) == 0


@pytest.mark.parametrize(
    ("k", "stops"),
    [
        (0.0, 4),  # believed alone: .40 .60 .75 .90 1.20
        (1.0, 3),  # .35 .54 .65 .70 .60
        (2.0, 2),  # .30 .48 .55 .50 .00
        (20.0, 0),  # -.60 -.60 -1.25 -3.10 -10.80: of equals the first
    ],
)
def test_pessimism_takes_the_largest_lower_bound(k: float, stops: int) -> None:
    assert by_pessimism(BELIEVED, SPREAD, k) == stops


@pytest.mark.parametrize(
    ("held_out", "patience", "stops"),
    [
        ([0.2, 0.5, 0.4, 0.9], 1, 1),
        ([0.2, 0.5, 0.4, 0.9], 2, 3),
        ([0.2, 0.5, 0.5, 0.9], 1, 1),  # no rise is no rise
        ([0.2, 0.5, 0.4, 0.45, 0.9], 2, 1),  # above the last, but not above the best
        ([0.9, 0.5, 0.4], 1, 0),
        ([0.1, 0.2, 0.3], 1, 2),  # it never stops rising
        ([0.7], 3, 0),
    ],
)
def test_patience_keeps_the_best_until_it_no_longer_rises(held_out: list[float], patience: int, stops: int) -> None:
    assert by_patience(held_out, patience) == stops


def test_what_a_rule_loses_is_the_distance_from_the_best_truth() -> None:
    assert [lost(TRUE, at) for at in range(5)] == pytest.approx([0.28, 0.11, 0.0, 0.06, 0.56])
    assert lost(TRUE, by_kl(KL, 10.0)) == pytest.approx(0.06)
    assert lost(TRUE, by_pessimism(BELIEVED, SPREAD, 2.0)) == 0.0


def test_what_is_not_known_cannot_be_judged_by() -> None:
    unknown: list[float] = [0.5, None]  # type: ignore[list-item]
    with pytest.raises(RequestError, match="kl: not known at snapshot 1"):
        by_kl(unknown, 1.0)
    with pytest.raises(RequestError, match="spread: not known at snapshot 0"):
        by_pessimism([0.5], [float("nan")], 1.0)
    with pytest.raises(RequestError, match="held_out: found no snapshot"):
        by_patience([])
    with pytest.raises(RequestError, match="patience: found 0; allowed: 1 or more"):
        by_patience([0.5], 0)

"""Numbers as people read them."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from moalign.report import kl, record, tables, units


@pytest.mark.parametrize("module", [kl, record, tables, units])
def test_examples_in_the_docstrings(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (9999, "10.0 k"),
        (99960, "100 k"),
        (999_400, "999 k"),
        (999_600, "1.00 M"),
        (2.5e9, "2.50 G"),
        (3e12, "3.00 T"),
        (None, "–"),
    ],
)
def test_count(value: float | None, text: str) -> None:
    assert units.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (90 * 3600, "90 h 00 min"),
        (None, "–"),
    ],
)
def test_duration(value: float | None, text: str) -> None:
    assert units.duration(value) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (999.4 * 2**20, "999 MiB"), (1000 * 2**20, "0.98 GiB"), (39.7 * 2**30, "39.7 GiB")]
)
def test_memory(size: float, text: str) -> None:
    assert units.memory(size) == text


def test_signs() -> None:
    assert [units.signed(v) for v in (0.5, -0.5, 0.0001, -0.0001, None)] == ["+0.500", "-0.500", "0.000", "0.000", "–"]
    assert units.number(-0.0001) == "0.000"
    assert units.interval([-0.0001, 0.25]) == "[0.000, 0.250]"
    assert units.percent(None) == "–" and units.percent(0.9666, 1) == "96.7 %"

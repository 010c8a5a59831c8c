"""The plugin's own test: its settings are checked, and it changes the temperature and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError
from toy_moalign.toy_temperature import Config, Cooled

from moalign.lm.sampler import Sampling


class Recorder:
    """A generator that remembers how it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> tuple[list[str], int]:
        self.asked.append((list(texts), list(rows), sampling))
        return [text.upper() for text in texts], 7


def test_only_the_temperature_changes() -> None:
    inner = Recorder()
    told = Sampling(max_new_tokens=5, temperature=0.8, seed=3)
    assert Cooled(inner, 0.5).generate(["a", "b"], [0, 1], told) == (["A", "B"], 7)
    assert inner.asked == [(["a", "b"], [0, 1], Sampling(max_new_tokens=5, temperature=0.4, seed=3))]


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        Config(temperature=0)

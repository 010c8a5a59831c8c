"""Memory that is given back."""

from __future__ import annotations

import sys
import weakref
from types import SimpleNamespace

import pytest

from moalign.core import memory


class Model:
    """Holds itself, as models do."""

    def __init__(self) -> None:
        self.own = self


@pytest.mark.parametrize("used", [True, False])
def test_cycles_are_collected_and_the_gpu_s_reserve_is_given_back(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    emptied: list[bool] = []
    cuda = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: used, empty_cache=lambda: emptied.append(True)
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    model = weakref.ref(Model())
    memory.release()
    assert model() is None and emptied == [True] * used

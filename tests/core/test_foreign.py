"""Generators on a GPU around code that is not ours, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moalign.core import foreign


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for ``torch.cuda``: one generator, whose state is a number."""
    import torch

    cuda = SimpleNamespace(ready=True, states=[5], seeded=None)
    cuda.is_initialized = lambda: cuda.ready
    cuda.get_rng_state_all = lambda: list(cuda.states)
    cuda.set_rng_state_all = lambda states: setattr(cuda, "states", states)
    cuda.manual_seed_all = lambda seed: setattr(cuda, "seeded", seed)
    monkeypatch.setattr(torch, "cuda", cuda)
    return cuda


def test_what_foreign_code_draws_on_a_gpu_is_put_back(gpu: Any) -> None:
    with foreign.call():
        gpu.states = [6]
    assert gpu.states == [5] and gpu.seeded is None


def test_a_gpu_that_nobody_used_before_gets_the_seed_of_the_cpu_again(gpu: Any) -> None:
    import torch

    gpu.ready = False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        with foreign.call():
            pass
        assert gpu.seeded is None
        with foreign.call():
            torch.default_generator.manual_seed(1)  # what torch.manual_seed does, which seeds the GPU's, too
        assert gpu.seeded == torch.initial_seed() == 7

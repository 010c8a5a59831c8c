"""Schedules, seeds and optimizer state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moalign.core.schedule import factor
from moalign.core.seeds import derive
from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer


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
    found = [derive(*place) for place in places]
    assert len(set(found)) == len(places)
    assert all(0 <= seed < 2**63 for seed in found)


def test_the_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Through the very files of a checkpoint: safetensors and JSON."""

    def step(parameter: torch.Tensor, optimizer: torch.optim.Optimizer, scale: float) -> None:
        optimizer.zero_grad()
        (scale * parameter**2).sum().backward()
        optimizer.step()

    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    whole = start.clone().requires_grad_()
    first = torch.optim.AdamW([whole], lr=0.01, weight_decay=0.1)
    for scale in (1.0, 3.0):
        step(whole, first, scale)
    tensors, plain = pack_optimizer(first)
    save_file({**tensors, "adapter.x": whole.detach()}, tmp_path / "x.safetensors")
    (tmp_path / "x.json").write_text(json.dumps(plain))

    resumed = whole.detach().clone().requires_grad_()
    second = torch.optim.AdamW([resumed], lr=0.5)
    unpack_optimizer(second, load_file(tmp_path / "x.safetensors"), json.loads((tmp_path / "x.json").read_text()))
    assert second.param_groups[0]["lr"] == 0.01
    assert second.param_groups[0]["weight_decay"] == 0.1
    assert second.param_groups[0]["betas"] == (0.9, 0.999)
    for scale in (2.0, 5.0):
        step(whole, first, scale)
        step(resumed, second, scale)
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, start)

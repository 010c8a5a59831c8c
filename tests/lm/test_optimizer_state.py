"""The optimizer's state as files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moalign.lm.optimizer_state import pack_optimizer, unpack_optimizer


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

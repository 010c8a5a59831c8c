"""Training that gives the same weights on every machine: its parts. tests/tasks/test_sandbox_base.py has the whole."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moalign.core.errors import RequestError
from moalign.lm.reproducible import GRID, draw, in_double, to_grid


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_in_double_a_model_computes_what_it_computes_in_single(kind: Any, random_base: Path) -> None:
    torch.manual_seed(0)
    model = kind.from_pretrained(random_base).eval()
    model.config.pad_token_id = 0
    ids = torch.randint(4, 60, (3, 17))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    with torch.no_grad():
        single = model(input_ids=ids, attention_mask=mask).logits
        double = in_double(model)(input_ids=ids, attention_mask=mask).logits
    assert double.dtype == torch.float64 and single.dtype == torch.float32
    if single.dim() == 3:  # logits of padding mean nothing
        single, double = single[mask.bool()], double[mask.bool()]
    assert single.std() > 0.01
    torch.testing.assert_close(double.float(), single, rtol=0, atol=1e-5)


def test_in_double_nothing_is_computed_in_single(random_base: Path) -> None:
    """A change of one weight by 1e-12 is seen in the logits; through single precision it would not be."""
    model = in_double(AutoModelForCausalLM.from_pretrained(random_base).eval())
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(1 + 1e-12)
        after = model(input_ids=ids).logits
    assert 0 < (after - before).abs().max() < 1e-10


def test_it_runs_on_the_device_that_the_model_is_on(random_base: Path) -> None:
    """The meta device computes nothing, and refuses tensors of another device as a GPU does."""
    model = in_double(AutoModelForCausalLM.from_pretrained(random_base)).to("meta")
    logits = model(input_ids=torch.zeros(2, 9, dtype=torch.long, device="meta")).logits
    assert logits.device.type == "meta" and logits.dtype == torch.float64


def test_to_grid_rounds_to_the_nearest_multiple() -> None:
    values = torch.tensor([0.3, 0.49, 0.51, -1.2, 7.0], dtype=torch.float64) / GRID
    to_grid([values])
    assert (values * GRID).tolist() == [0.0, 0.0, 1.0, -1.0, 7.0]
    assert torch.equal(values.float().double(), values)


def test_draw_is_normal_on_the_grid_and_by_seed_alone() -> None:
    def drawn(seed: int) -> torch.Tensor:
        weights = [torch.zeros(64, 64, dtype=torch.float64), torch.zeros(32, 64, dtype=torch.float64)]
        draw(weights, 0.02, seed)
        return torch.cat(weights)

    first = drawn(0)
    assert torch.equal(first, drawn(0)) and not torch.equal(first, drawn(1))
    assert torch.equal(first * GRID, (first * GRID).round())
    assert float(first.std()) == pytest.approx(0.02, rel=0.05) and float(first.mean()) == pytest.approx(0, abs=0.001)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(RequestError, match=r"found a model of type gpt2; allowed: llama"):
        in_double(types.SimpleNamespace(config=types.SimpleNamespace(model_type="gpt2")))

"""Experts interpolated with weights of their own for each group of layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moalign.config.recipe import LoraSpec
from moalign.lm import adapters
from moalign.lm.adapters import Adapter
from moalign.lm.language_model import LanguageModel

Make = Callable[..., LanguageModel]
SPECS = [LoraSpec(r=4, alpha=6, dropout=0.0), LoraSpec(r=2, alpha=7, dropout=0.0)]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 2], [1, 21, 31, 41, 51, 61, 2]])


def expert(lm: LanguageModel, number: int) -> Adapter:
    adapters.attach(lm, SPECS[number], seed=number, name="made")
    generator = torch.Generator().manual_seed(number)
    moved = {
        key: value + 0.3 * torch.randn(value.shape, generator=generator)
        for key, value in adapters.tensors(lm, "made").items()
    }
    adapters.drop(lm, "made")
    return Adapter(SPECS[number], moved)


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """dW of every layer by the definition, s B A."""
    scale = adapter.spec.alpha / adapter.spec.r
    return {
        key.replace(".lora_A.weight", ""): scale * adapter.weights[key.replace("lora_A", "lora_B")] @ a
        for key, a in adapter.weights.items()
        if "lora_A" in key
    }


@pytest.mark.parametrize("weights", [[(0.3, 0.7), (1.2, -0.4)], [(1.0, 0.0), (0.0, 1.0)], [(0.0, 0.5), (0.0, 1.0)]])
def test_each_layer_has_the_sum_of_its_own_weights(make_lm: Make, weights: list[tuple[float, float]]) -> None:
    lm = make_lm()
    experts = [expert(lm, 0), expert(lm, 1)]
    result, single = changes(adapters.interpolate_groups(experts, weights)), [changes(each) for each in experts]
    layers = set()
    for key, value in result.items():
        layer = 0 if ".layers.0." in key else 1
        layers.add(layer)
        wanted = weights[layer][0] * single[0][key] + weights[layer][1] * single[1][key]
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert layers == {0, 1} and result.keys() == single[0].keys()


def test_groups_that_agree_are_one(make_lm: Make) -> None:
    lm = make_lm()
    experts = [expert(lm, 0), expert(lm, 1)]
    one = adapters.interpolate(experts, (0.3, 0.7))
    for weights in ([(0.3, 0.7)], [(0.3, 0.7), (0.3, 0.7)]):
        same = adapters.interpolate_groups(experts, weights)
        assert all(torch.equal(value, same.weights[key]) for key, value in one.weights.items())
    assert adapters.interpolate_groups(experts, [(1.0, 0.0)] * 2) is experts[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_of_nothing_are_the_base(make_lm: Make, groups: int) -> None:
    lm = make_lm()
    experts = [expert(lm, 0), expert(lm, 1)]
    with torch.no_grad():
        base = make_lm().model(IDS).logits
        adapters.place(lm, adapters.interpolate_groups(experts, [(0.0, 0.0)] * groups), "nothing")
        assert torch.equal(lm.model(IDS).logits, base)


def test_more_groups_than_layers_are_refused(make_lm: Make) -> None:
    lm = make_lm()
    experts = [expert(lm, 0), expert(lm, 1)]
    assert adapters.adapted_layers(lm, SPECS[0]) == 2
    assert adapters.adapted_layers(lm, LoraSpec(r=4, alpha=6, dropout=0.0, layers=1)) == 1
    with pytest.raises(ValueError, match="3 groups need as many layers with adapters; found 2"):
        adapters.interpolate_groups(experts, [(0.1, 0.2), (0.3, 0.4), (0.5, 0.6)])

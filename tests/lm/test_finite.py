"""What counts as diverged, and what the message says."""

from __future__ import annotations

import pytest
import torch

from moalign.core.errors import WorkError
from moalign.lm import finite
from moalign.lm.finite import FiniteCheck

CHECK = FiniteCheck("moc", "online", lr=0.5, clip=2.0, step=3)


def test_what_is_finite_passes() -> None:
    assert CHECK.number("loss", -1e300) == -1e300
    modules = {"a": {"x": torch.full((3,), 1e18)}, "b": {"x": torch.ones(2, dtype=torch.bfloat16)}}
    assert CHECK.weights(modules) is modules
    CHECK.norm([torch.full((3,), 1e18), torch.ones(2, dtype=torch.bfloat16)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_told_with_where_and_what_to_try(value: float) -> None:
    with pytest.raises(WorkError) as stop:
        CHECK.number("loss", value)
    assert str(stop.value).startswith(f"moc: phase online, step 3: the loss is {value}, so training has diverged; try")
    assert "smaller lr (now 0.5)" in str(stop.value) and "clip (the largest gradient norm, now 2)" in str(stop.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30, -1e20])
def test_weights_that_are_not_finite_or_without_a_finite_norm_are_named(bad: float) -> None:
    with pytest.raises(WorkError, match=r"step 3: 1 of 2 tensors .* \(first a\.y\)"):
        CHECK.weights({"a": {"x": torch.ones(3), "y": torch.tensor([[0.0, bad]])}})
    with pytest.raises(WorkError, match="step 3: the norm of the weights is (nan|inf), so training has diverged"):
        CHECK.norm([torch.ones(3), torch.tensor([[0.0, bad]])])


def test_tensors_of_several_devices_are_looked_at_together() -> None:
    """MOC's weights of objectives are on the CPU while its adapter is on a GPU; the meta device stands for one."""
    squares = finite._squares([torch.ones(3), torch.ones(2, device="meta")])
    assert (squares.shape, squares.device.type) == ((2,), "meta")

"""The directional term: angles by hand, their slope by finite differences, and where they have none."""

from __future__ import annotations

import math

import pytest
import torch

from moalign.losses.directional import STRAIGHT, angle


def test_angles_by_hand() -> None:
    """Of (1, 1) with (1, 0), (0, 3), (-2, -2), (1, -1) and (2, 1): 45, 45, 180 and 90 degrees, and arccos(3 / sqrt 10).

    Cosines are cut to +-.9999: the smallest angle is .01414, the largest pi less as much.
    """
    d, values = torch.ones(2), torch.tensor([[1.0, 0], [0, 3], [-2, -2], [1, -1], [2, 1], [4, 4], [0, 0]])
    most, least = math.pi - math.acos(STRAIGHT), math.acos(STRAIGHT)
    quarter, right = math.pi / 4, math.pi / 2
    wanted = [quarter, quarter, most, right, 0.321751, least, right]
    assert angle(d, values).tolist() == pytest.approx(wanted, abs=1e-5)
    assert least == pytest.approx(0.014142, abs=1e-6)


def test_three_objectives_and_any_length() -> None:
    d, v = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([1.0, 2.0, 0.5])
    wanted = math.acos(1.05 / math.sqrt(0.38 * 5.25))
    assert float(angle(d, v)) == pytest.approx(wanted, abs=1e-6)
    assert float(angle(7 * d, 0.1 * v)) == pytest.approx(wanted, abs=1e-6)


def test_its_slope_is_that_of_finite_differences_and_0_where_the_directions_are_one() -> None:
    d, v = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([1.2, -0.4], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda values: angle(d, values), (v.requires_grad_(),))
    same = (2 * d).clone().requires_grad_()
    (slope,) = torch.autograd.grad(angle(d, same), same)
    assert slope.tolist() == [0, 0]

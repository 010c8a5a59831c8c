"""The normaliser: hand-worked numbers, constant objectives, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moalign.config.card import NormaliserSpec
from moalign.core.errors import RequestError
from moalign.rewards.normaliser import Normaliser

NAMES = ["a", "b"]


def fitted() -> Normaliser:
    # a: 0..100, so that quantiles can be read off; b: 2 a + 1.
    a = np.arange(101.0)
    return Normaliser.fit(np.stack([a, 2 * a + 1], axis=1), NAMES, data_hash="d", scorer_hash="s")


def test_hand_worked_numbers() -> None:
    normaliser = fitted()
    # mean of 0..n is n/2, population variance is n(n+2)/12 for n + 1 numbers
    assert normaliser.mean == pytest.approx((50, 101))
    assert normaliser.sd == pytest.approx(((100 * 102 / 12) ** 0.5, 2 * (100 * 102 / 12) ** 0.5))
    assert normaliser.lo == pytest.approx((1, 3))
    assert normaliser.hi == pytest.approx((99, 199))
    assert np.array(normaliser.bounds) == pytest.approx(np.array([(0.5, 99.5), (2, 200)]))
    assert (normaliser.count, normaliser.data_hash, normaliser.scorer_hash) == (101, "d", "s")


def test_unit_maps_quantiles_to_0_and_1_and_does_not_clip() -> None:
    units = fitted().unit([[1, 3], [99, 199], [50, 101], [197, -193]])
    assert units == pytest.approx(np.array([[0, 0], [1, 1], [0.5, 0.5], [2, -1]]))


def test_z_standardises_what_it_was_fitted_on() -> None:
    rng = np.random.default_rng(0)
    raw = rng.normal(3, 7, size=(500, 2))
    before = raw.copy()
    z = Normaliser.fit(raw, NAMES).z(raw)
    assert z.mean(axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert z.std(axis=0) == pytest.approx([1, 1])
    assert np.array_equal(raw, before)


def test_z_bounds_are_bounds_in_standard_units() -> None:
    normaliser = fitted()
    sd = (100 * 102 / 12) ** 0.5
    assert normaliser.z_bounds() == pytest.approx(np.array([[-49.5 / sd, 49.5 / sd]] * 2))


def test_bounds_come_from_the_data_alone_when_given() -> None:
    raw = np.random.default_rng(0).normal(size=(200, 2))
    data = np.stack([np.arange(201.0), -np.arange(201.0)], axis=1)
    assert np.array(Normaliser.fit(raw, NAMES, data=data).bounds) == pytest.approx(np.array([(1, 199), (-199, -1)]))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e9 + 0.1])
def test_constant_objective_is_named(constant: float) -> None:
    raw = np.stack([np.arange(30.0), np.full(30, constant)], axis=1)
    with pytest.raises(RequestError, match="objective 'b' is constant"):
        Normaliser.fit(raw, NAMES)


def test_almost_constant_objective_is_named() -> None:
    raw = np.stack([np.arange(1000.0), np.zeros(1000)], axis=1)
    raw[0, 1] = 1
    with pytest.raises(RequestError, match="objective 'b' is almost constant"):
        Normaliser.fit(raw, NAMES)


def test_not_finite_and_too_few_are_named() -> None:
    raw = np.arange(20.0).reshape(10, 2)
    raw[7, 0] = np.nan
    with pytest.raises(RequestError, match="objective 'a': the score of sample 7 is nan"):
        Normaliser.fit(raw, NAMES)
    with pytest.raises(RequestError, match="at least 2"):
        Normaliser.fit(raw[:1], NAMES)


def test_one_column_is_not_spread_over_all_objectives() -> None:
    with pytest.raises(ValueError, match="2 objectives"):
        fitted().z(np.zeros((4, 1)))
    with pytest.raises(ValueError, match="2 objectives"):
        Normaliser.fit(np.zeros((4, 3)), NAMES)


def test_file_round_trip_is_exact(tmp_path: Path) -> None:
    raw = np.random.default_rng(1).normal(size=(333, 2)) / 3
    normaliser = Normaliser.fit(raw, NAMES, data_hash="d")
    normaliser.to_json(tmp_path / "normaliser.json")
    assert Normaliser.from_json(tmp_path / "normaliser.json") == normaliser


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sd": [0, 1]}, "sd of objective 'a'"),
        ({"hi": [0, 0]}, "hi must be larger"),
        ({"mean": [1]}, "mean needs one entry per objective"),
        ({"mean": ["x", 1]}, "wrong type"),
        ({"bounds": [1, 2]}, "wrong type"),
        ({"mean": [float("nan"), 1]}, "not finite"),
        ({"extra": 1}, "exactly the keys"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "normaliser.json"
    fitted().to_json(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(RequestError, match=message) as caught:
        Normaliser.from_json(path)
    assert str(path) in str(caught.value)


def test_broken_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "n.json").write_text('{"names": [')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "folder.json").mkdir()
    for name in ("n.json", "none.json", "deep.json", "folder.json"):
        with pytest.raises(RequestError, match=f"{name}: the normaliser cannot be read"):
            Normaliser.from_json(tmp_path / name)


def test_a_scale_is_that_of_the_scorers_it_was_fitted_for(tmp_path: Path) -> None:
    scale = Normaliser.fit(np.array([[0.0], [1.0], [2.0]]), ["help"], scorer_hash="aa")
    assert scale.required_of("aa", tmp_path) is scale
    with pytest.raises(RequestError, match=r"scale\.json: the task's scale was fitted for other scorers"):
        scale.required_of("bb", tmp_path / "scale.json")
    by_hand = Normaliser.fit(np.array([[0.0], [1.0], [2.0]]), ["help"])
    assert by_hand.required_of("bb", tmp_path) is by_hand


def test_numbers_of_a_card_in_the_tasks_order() -> None:
    spec = {
        "b": NormaliserSpec(mean=2, sd=4, lo=0, hi=10),
        "a": NormaliserSpec(mean=1, sd=2, lo=-1, hi=1),
    }
    normaliser = Normaliser.from_spec(spec, NAMES)
    assert normaliser.z([3, 6]) == pytest.approx([1, 1])
    assert normaliser.unit([0, 5]) == pytest.approx([0.5, 0.5])
    assert normaliser.bounds == ((-1, 1), (0, 10))
    with pytest.raises(RequestError, match="no numbers for c"):
        Normaliser.from_spec(spec, ["a", "c"])

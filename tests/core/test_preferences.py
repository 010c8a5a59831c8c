"""The preference vector: what is accepted, how the rest is refused, grids and text forms."""

from __future__ import annotations

import hashlib
import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moalign.core import preferences
from moalign.core.errors import RequestError

TWO = ["helpfulness", "harmlessness"]
THREE = [*TWO, "humor"]


def refused(text: str, objectives: list[str] | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        preferences.parse(text, objectives or TWO)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3,0.7", (0.3, 0.7)),
        ("1,0", (1.0, 0.0)),
        (" .5 , .5 ", (0.5, 0.5)),
        ("0.3000004,0.7", (0.3000004, 0.7)),
        ("3e-1,7e-1", (0.3, 0.7)),
    ],
)
def test_accepted(text: str, expected: tuple[float, ...]) -> None:
    assert preferences.parse(text, TWO) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,7", "--prefs 3,7: the weights sum to 10, not 1; did you mean --prefs 0.3,0.7?"),
        ("0.3,0.70001", "--prefs 0.3,0.70001: the weights sum to 1.00001, not 1; did you mean --prefs"),
        ("0,0", "--prefs 0,0: the weights sum to 0, not 1; at least one weight must be positive"),
        ("-0.3,1.3", "--prefs -0.3,1.3: the weight of helpfulness is negative; allowed: 0 to 1"),
        ("nan,1", "--prefs nan,1: the weight of helpfulness is nan; a finite number is needed"),
        ("0,inf", "--prefs 0,inf: the weight of harmlessness is inf; a finite number is needed"),
        ("1e308,1e308", "--prefs 1e+308,1e+308: the weights sum to inf, not 1; give weights between 0 and 1"),
        ("0.2,0.3,0.5", "--prefs 0.2,0.3,0.5: 3 weights, but the task has 2 objectives (helpfulness, harmlessness)"),
        ("1", "--prefs 1: 1 weight, but the task has 2 objectives"),
        ("a,0.5", "--prefs a,0.5: 'a' is not a number; give 2 weights that sum to 1, like 0.3,0.7"),
        ("0.5,,0.5", "--prefs 0.5,,0.5: '' is not a number"),
        ("", "--prefs : '' is not a number"),
        ("0.5;0.5", "--prefs 0.5;0.5: '0.5;0.5' is not a number"),
    ],
)
def test_refused(text: str, expected: str) -> None:
    assert refused(text).startswith(expected)


def test_another_place_is_named_without_the_option() -> None:
    with pytest.raises(RequestError) as caught:
        preferences.validate([3, 7], TWO, "r.yaml:3: prefs.0:")
    assert str(caught.value) == "r.yaml:3: prefs.0: 3,7: the weights sum to 10, not 1; did you mean 0.3,0.7?"


def test_the_offered_form_never_has_a_negative_weight() -> None:
    # Six times 0.16666667 is more than 1: what rounding adds must not be taken from the last weight, 0.
    names = [f"objective{index}" for index in range(7)]
    offered = refused("1,1,1,1,1,1,0", names).split("--prefs ")[-1].rstrip("?")
    assert offered == "0.16666665,0.16666667,0.16666667,0.16666667,0.16666667,0.16666667,0"
    assert preferences.parse(offered, names)[-1] == 0


weights = st.lists(st.floats(0, 1e9, allow_nan=False), min_size=2, max_size=6)


@settings(deadline=None, max_examples=200)
@given(values=weights)
def test_the_normalised_form_that_is_offered_is_accepted(values: list[float]) -> None:
    assume(sum(values) > 0)
    assume(abs(sum(values) - 1) > preferences.TOLERANCE)
    names = [f"objective{index}" for index in range(len(values))]
    offered = re.search(r"did you mean --prefs ([^?]+)\?", refused(",".join(map(repr, values)), names))
    assert offered is not None
    result = preferences.parse(offered.group(1), names)
    assert np.allclose(result, np.array(values) / sum(values), atol=1e-7)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=20) | st.text("0123456789.,-e ", max_size=20), count=st.integers(2, 4))
def test_any_text_is_a_preference_or_refused(text: str, count: int) -> None:
    try:
        result = preferences.parse(text, THREE[:1] * count)
    except RequestError as error:
        assert str(error).startswith("--prefs ")
    else:
        assert len(result) == count
        assert min(result) >= 0
        assert abs(math.fsum(result) - 1) <= preferences.TOLERANCE


def test_the_field_grid_has_eleven_points_from_corner_to_corner() -> None:
    grid = preferences.grid(2, 10)
    assert len(grid) == 11
    assert grid[0] == (0.0, 1.0)
    assert grid[3] == (0.3, 0.7)
    assert grid[-1] == (1.0, 0.0)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_grids_are_all_compositions_once(objectives: int, steps: int) -> None:
    grid = preferences.grid(objectives, steps)
    assert len(set(grid)) == len(grid) == math.comb(steps + objectives - 1, objectives - 1)
    assert all(abs(math.fsum(point) - 1) < 1e-12 and min(point) >= 0 for point in grid)
    assert {preferences.corner(objectives, index) for index in range(objectives)} <= set(grid)


@pytest.mark.parametrize(("objectives", "steps"), [(0, 3), (2, 0)])
def test_grids_of_nothing(objectives: int, steps: int) -> None:
    with pytest.raises(RequestError, match="at least 1 objective and 1 step"):
        preferences.grid(objectives, steps)


@pytest.mark.parametrize(("objectives", "points"), [(2, 2), (2, 11), (2, 21), (3, 3), (3, 6), (3, 66), (4, 10)])
def test_a_grid_of_so_many_points(objectives: int, points: int) -> None:
    assert len(preferences.grid_of(objectives, points)) == points


@pytest.mark.parametrize(
    ("objectives", "points", "nearest"), [(3, 11, "10 or 15"), (3, 4, "3 or 6"), (2, 1, "2"), (3, 0, "3"), (2, -5, "2")]
)
def test_a_number_of_points_that_no_grid_has(objectives: int, points: int, nearest: str) -> None:
    with pytest.raises(RequestError) as caught:
        preferences.grid_of(objectives, points)
    assert str(caught.value).startswith(f"--grid {points}: no even grid over {objectives} objectives")
    assert str(caught.value).endswith(f"nearest: {nearest}")


@pytest.mark.parametrize(
    ("objectives", "steps", "digest"),
    [
        (2, 10, "3a267ec6ec7ad583"),
        (3, 4, "c0285f7d6400390c"),
        (3, 10, "bc76f80362b1eb6d"),
        (3, 30, "5d4f3fc30b8502af"),
        (4, 10, "2160a4e56b53a28a"),
        (5, 5, "7047c015ebc52569"),
        (6, 4, "22028d82f674cac9"),
    ],
)
def test_the_vectors_of_a_grid_keep_every_bit_and_their_order(objectives: int, steps: int, digest: str) -> None:
    """Runs are identified by their vectors, and tables are published for them."""
    assert hashlib.sha256(repr(preferences.grid(objectives, steps)).encode()).hexdigest()[:16] == digest


@pytest.mark.slow
def test_between_the_even_grids_of_many_objectives_points_are_spread() -> None:
    points = preferences.grid_of(4, 6)
    assert points == sorted(set(points)) and len(points) == 6
    assert {preferences.corner(4, index) for index in range(4)} <= set(points)
    for point in points:
        assert preferences.validate(point, ["a", "b", "c", "d"]) == point
        assert all(abs(weight * 1000 - round(weight * 1000)) < 1e-9 for weight in point)
    distances = [np.abs(np.subtract(a, b)).sum() for a in points for b in points if a != b]
    assert min(distances) > 0.5
    with pytest.raises(RequestError, match=r"^--grid 3: no even grid over 4 objectives has 3 points; nearest: 4$"):
        preferences.grid_of(4, 3)


def test_a_grid_too_large_says_so() -> None:
    with pytest.raises(RequestError, match=r"^--grid 2000: at most 1001 points over 2 objectives$"):
        preferences.grid_of(2, 2000)


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_the_example_is_itself_accepted(objectives: int) -> None:
    names = [f"objective{index}" for index in range(objectives)]
    assert len(preferences.parse(preferences.example(objectives), names)) == objectives


@given(
    weights=st.lists(st.lists(st.floats(0.01, 1), min_size=4, max_size=4), min_size=1, max_size=5),
    steps=st.integers(1, 200),
)
def test_preferences_move_to_a_neighbour_on_the_grid(weights: list[list[float]], steps: int) -> None:
    before = np.array(weights) / np.sum(weights, axis=1, keepdims=True)
    after = preferences.on_grid(before, steps)
    assert np.allclose(after * steps, np.rint(after * steps)) and np.allclose(after.sum(axis=1), 1)
    assert (after >= 0).all() and np.abs(after - before).max() < 1 / steps + 1e-9
    assert np.allclose(preferences.on_grid(after, steps), after)  # a grid point stays


def test_the_largest_remainders_are_moved_up() -> None:
    result = preferences.on_grid(np.array([[0.46, 0.33, 0.21], [0.3, 0.7, 0.0]]), 10)
    assert result.tolist() == [[0.5, 0.3, 0.2], [0.3, 0.7, 0.0]]


def test_dirichlet_draws_are_preferences_and_follow_the_seed() -> None:
    draws = preferences.dirichlet(np.random.default_rng(3), 3, 2000)
    assert draws.shape == (2000, 3)
    assert np.allclose(draws.sum(axis=1), 1)
    assert draws.min() >= 0
    assert np.array_equal(draws, preferences.dirichlet(np.random.default_rng(3), 3, 2000))
    # Dirichlet(1, 1, 1): every mean 1/3, every variance 1/18; Dirichlet(20 * 1) is far narrower.
    assert np.allclose(draws.mean(axis=0), 1 / 3, atol=0.02)
    assert np.allclose(draws.var(axis=0), 1 / 18, atol=0.006)
    assert preferences.dirichlet(np.random.default_rng(3), 3, 2000, alpha=20).var() < 0.01


def test_text_forms() -> None:
    assert preferences.to_text((0.3, 0.7), TWO) == "helpfulness 30.0% harmlessness 70.0%"
    assert preferences.to_text((0.3, 0.7), TWO, "fraction") == "helpfulness 0.3 harmlessness 0.7"
    assert preferences.to_text((1 / 3, 2 / 3), TWO) == "helpfulness 33.3% harmlessness 66.7%"
    assert preferences.label((0.3, 0.7)) == "0.3,0.7"
    assert preferences.label((1 / 3, 2 / 3)) == "0.3333,0.6667"
    with pytest.raises(ValueError, match="zip"):
        preferences.to_text((1.0,), TWO)


@pytest.mark.parametrize("style", ["percent", "fraction"])
@pytest.mark.parametrize("objectives", [2, 3])
def test_points_of_a_grid_never_collide(objectives: int, style: str) -> None:
    """2 to 41 points for two objectives; for three as many steps."""
    for steps in range(1, 41):
        points = preferences.grid(objectives, steps)
        texts = {preferences.to_text(point, THREE[:objectives], style) for point in points}
        assert len(texts) == len(points), steps


@pytest.mark.parametrize("steps", [63, 128, 360, 999, 1000])
def test_nor_do_those_of_the_finest_grids(steps: int) -> None:
    points = preferences.grid(2, steps)
    assert len({preferences.to_text(point, TWO, "fraction") for point in points}) == len(points)


@pytest.mark.parametrize(
    ("weights", "fraction", "percent"),
    [
        ((0.3, 0.7), "0.3 0.7", "30.0% 70.0%"),
        ((1.0, 0.0), "1.0 0.0", "100.0% 0.0%"),
        ((0.25, 0.75), "0.25 0.75", "25.0% 75.0%"),
        ((0.1 + 0.2, 0.7), "0.3 0.7", "30.0% 70.0%"),
        ((1 / 3, 2 / 3), "0.33 0.67", "33.3% 66.7%"),
        ((0.025, 0.975), "0.025 0.975", "2.5% 97.5%"),
        ((0.0125, 0.9875), "0.0125 0.9875", "1.25% 98.75%"),
        ((0.05, 0.5, 0.45), "0.05 0.50 0.45", "5.0% 50.0% 45.0%"),
    ],
)
def test_as_many_decimals_as_a_grid_needs(weights: tuple[float, ...], fraction: str, percent: str) -> None:
    names = ["a", "b", "c"][: len(weights)]
    for style, wanted in (("fraction", fraction), ("percent", percent)):
        parts = [f"{name} {part}" for name, part in zip(names, wanted.split(), strict=True)]
        assert preferences.to_text(weights, names, style) == " ".join(parts)


def test_random_draws_keep_one_decimal() -> None:
    for alpha in (0.3, 1.0, 5.0):
        for a, b, c in preferences.dirichlet(np.random.default_rng(0), 3, 1000, alpha).tolist():
            assert (
                preferences.to_text((a, b, c), ["x", "y", "z"]) == f"x {100 * a:.1f}% y {100 * b:.1f}% z {100 * c:.1f}%"
            )
            assert preferences.to_text((a, b, c), ["x", "y", "z"], "fraction") == f"x {a:.1f} y {b:.1f} z {c:.1f}"
    assert preferences.to_text((0.1234567, 0.8765433), TWO, "fraction") == "helpfulness 0.1 harmlessness 0.9"


def test_corners() -> None:
    assert preferences.corner(3, 1) == (0.0, 1.0, 0.0)


def test_a_preference_that_is_required() -> None:
    names = ["helpfulness", "harmlessness"]
    assert preferences.required("0.25,0.75", names) == (0.25, 0.75)
    with pytest.raises(RequestError, match="--prefs is missing: one weight for each of helpfulness, harm"):
        preferences.required(None, names)


# -- in words --------------------------------------------------------------------------------------------------------

WORDS = {
    "helpfulness": ("helpfulness", "helpful"),
    "harmlessness": ("harmlessness", "harmless"),
    "humor": ("humor", "not dull"),
}


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("Helpful and harmless.", (0.5, 0.5, 0.0)),
        ("helpfulness", (1.0, 0.0, 0.0)),
        ("HELPFUL, harmless; not dull", (1 / 3, 1 / 3, 1 / 3)),
        ("not too dull, and dull is not harmless", (0.0, 0.5, 0.5)),
    ],
)
def test_a_text_weighs_what_it_names_equally(text: str, weights: tuple[float, ...]) -> None:
    assert preferences.from_words(text, WORDS) == pytest.approx(weights)
    assert preferences.parse(preferences.Words(text), WORDS) == pytest.approx(weights)


@pytest.mark.parametrize("text", ["", "unhelpful", "be nice", "0.3,0.7"])
def test_a_text_that_names_no_objective_is_refused_with_the_words_that_do(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"--prefs-text .*names no objective.*helpfulness: helpfulness, helpful; harm"
    ):
        preferences.from_words(text, WORDS)


def test_punctuation_in_a_word_is_read_as_in_a_text() -> None:
    words = {"a": ("a", "not dull!", "C++ code"), "b": ("b", "rock'n'roll")}
    for text, weights in (("Not dull!", (1.0, 0.0)), ("c++ code", (1.0, 0.0)), ("Rock'n'Roll, please", (0.0, 1.0))):
        assert preferences.from_words(text, words) == weights


@pytest.mark.parametrize("word", ["", " ", "!!", "--"])
def test_a_word_without_letters_names_nothing(word: str) -> None:
    words = {"a": ("a", word), "b": ("b",)}
    assert preferences.from_words(f"b {word}", words) == (0.0, 1.0)
    with pytest.raises(RequestError, match=r"it names no objective; words that do, a: a; b: b$"):
        preferences.from_words(f"c {word}".strip(), words)


def test_names_alone_name_their_objectives() -> None:
    assert preferences.parse(preferences.Words("b , please"), ["a", "b"]) == (0.0, 1.0)
    with pytest.raises(RequestError, match="did you mean"):
        preferences.parse(preferences.Words("harmlesness"), ["harmlessness", "b"])


def test_what_is_typed_is_the_same_preference_again() -> None:
    for weights in ((1 / 3, 1 / 3, 1 / 3), (1 / 3, 2 / 3), (0.3, 0.7), (1e-7, 1 - 1e-7)):
        names = ["a", "b", "c"][: len(weights)]
        assert preferences.same(preferences.parse(preferences.typed(weights), names), weights)
    assert preferences.typed((0.3, 0.7)) == "0.3,0.7"

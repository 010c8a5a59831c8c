"""Utility maps, cost, learning curves, reliability diagram: what they show, on both papers, in the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.report import figures, reliability, style

Build = Callable[..., dict[str, Any]]

BINS = [
    {"confidence": 0.1, "accuracy": 0.2, "count": 10},
    {"confidence": None, "accuracy": None, "count": 0},
    {"confidence": 0.7, "accuracy": 0.4, "count": 30},
]


@pytest.mark.slow
def test_times_of_different_machines_are_marked(record: dict[str, Any]) -> None:
    assert "not comparable" not in texts(figures.draw_cost, record)
    record["rows"][0]["runs"][0]["made"] = {"cpu": "C", "gpus": ["G"]}
    record["rows"][1]["runs"][0]["made"] = {"cpu": "C", "gpus": []}
    assert "different machines: not comparable" in texts(figures.draw_cost, record)


@pytest.fixture
def record(compared: Build) -> dict[str, Any]:
    result = compared({"alpha": 0.2, "beta": 0.0}, seeds=2)
    result["rows"][0]["curves"] = [
        {"loss": [[0, 3], [10, 2]], "utility": [[0, 0], [10, 1]]},
        {"loss": [[0, 4], [9, 1]]},
    ]
    result["rows"][1]["curves"] = [{}, {}]
    for row, kl in zip(result["rows"], (9.0, 2.0), strict=True):
        row["quality"]["kl"] = kl
        row["believed"] = {"hypervolume": 1.2 * row["hypervolume"], "inner_product": 0.7, "false_wins": []}
    result["frontier"] = [
        {"prefs": [0.0, 1.0], "kl": [0.0, 1.0, 4.0], "mean": [[0.5, 0.1], [0.3, 0.6], [0.1, 1.1]]},
        {"prefs": [1.0, 0.0], "kl": [0.0, 2.0], "mean": [[0.1, 0.5], [1.1, 0.1]]},
    ]
    for row, kl, share in zip(result["rows"], (2.25, 0.6), (0.834, None), strict=True):
        row["share_at_kl"] = share
        for point in row["points"]:
            point["kl"], point["kl_bound"] = kl, share is None
    return result


def texts(draw: Callable[..., bytes | None], record: dict[str, Any]) -> str:
    """An SVG keeps its texts, so they can be read back."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        content = draw(record, ".svg")
    assert content is not None
    return content.decode()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", list(figures.ALL))
def test_the_same_bytes_twice_on_the_papers_colour(record: dict[str, Any], name: str, theme: str) -> None:
    from matplotlib import colors, image

    content = figures.ALL[name](record, ".png", theme)
    assert content is not None and content == figures.ALL[name](record, ".png", theme)
    pixels = image.imread(io.BytesIO(content))[..., :3]
    paper = np.array(colors.to_rgb(style.THEMES[theme].paper))
    assert np.abs(pixels[0, 0] - paper).max() < 0.01
    own = [np.array(colors.to_rgb(style.THEMES[theme].colours[0]))]
    assert any((np.abs(pixels - colour).max(axis=-1) < 0.02).sum() > 50 for colour in own)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_colour_stands_out_on_its_paper(theme: str) -> None:
    """Contrast by WCAG 2.1: 3 for what is drawn in thick marks, 7 for text."""
    from matplotlib import colors

    def luminance(colour: str) -> float:
        parts = np.array(colors.to_rgb(colour))
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    chosen = style.THEMES[theme]
    assert contrast(chosen.ink, chosen.paper) > 7 and contrast(chosen.muted, chosen.paper) > 4.5
    assert min(contrast(colour, chosen.paper) for colour in chosen.colours) > 2.1
    assert len(set(chosen.colours)) == len(chosen.colours)


def test_utilities_are_w_times_the_mean_of_the_policy_asked_for_w() -> None:
    points = [{"prefs": [1, 0], "mean": [3, 9]}, {"prefs": [0.5, 0.5], "mean": [1, 2]}]
    weights, gained = figures.utilities(points)
    assert weights.tolist() == [[0.5, 0.5], [1, 0]] and gained.tolist() == [1.5, 3]


@pytest.mark.parametrize("count", [5, 27])
def test_however_many_methods_a_panel_of_utilities_is_not_much_higher_than_wide(compared: Build, count: int) -> None:
    from matplotlib import image

    drawn = figures.draw_utility(compared({f"m{n}": 0.3 - 0.01 * n for n in range(count)}))
    assert drawn is not None
    height, width, _ = image.imread(io.BytesIO(drawn)).shape
    assert height <= 1.1 * width


def test_two_objectives_are_lines_by_weight(record: dict[str, Any]) -> None:
    text = texts(figures.draw_utility, record)
    for wanted in ("alpha", "beta", "optimum", "weight of helpfulness"):
        assert wanted in text
    assert f"{figures.utilities(record['rows'][0]['points'])[1].mean():.3f}" in text


def test_three_objectives_are_ternary_maps(compared: Build) -> None:
    text = texts(figures.draw_utility, compared({"alpha": 0.2, "beta": 0.0}, objectives=3))
    for wanted in ("alpha", "beta", "optimum", "helpfulness", "harmlessness", "humor", "utility w·n"):
        assert wanted in text
    assert figures.draw_utility(compared({"alpha": 0.2}, objectives=4)) is None


def test_a_single_preference_is_drawn_without_a_field(compared: Build) -> None:
    record = compared({"alpha": 0.2, "beta": 0.0}, objectives=3)
    record["rows"][1]["points"] = record["rows"][1]["points"][:1]
    assert figures.draw_utility(record) is not None


def drawn(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, Any]]]:
    """What the figure of utility by KL plots: panel's title -> (label, data)."""
    from contextlib import contextmanager

    kept: list[Any] = []
    canvas = style.canvas

    @contextmanager
    def seen(*arguments: Any) -> Any:
        with canvas(*arguments) as (figure, colours):
            kept.append(figure)
            yield figure, colours

    monkeypatch.setattr(style, "canvas", seen)
    assert figures.ALL["kl"](record, ".svg") is not None
    return {
        panel.get_title(loc="left") or panel.get_ylabel(): [
            (line.get_label(), line.get_xydata()) for line in panel.lines
        ]
        for panel in kept[0].axes
    }


def test_utility_stands_over_the_root_of_the_kl(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A panel a preference: the frontier, flat beyond its end; every method's w.n; a line to the left of a bound."""
    panels = drawn(record, monkeypatch)
    assert list(panels) == ["w = 0, 1", "w = 1, 0"]
    points = [{tuple(point["prefs"]): point["mean"] for point in row["points"]} for row in record["rows"]]
    (name, curve), (first, at), (second, below), (_, line) = panels["w = 1, 0"]
    assert (name, first, second) == ("optimum at a KL", "alpha (83 %)", "beta")
    np.testing.assert_allclose(curve[:2], [[0, 0.1], [2**0.5, 1.1]])
    assert curve[2, 0] > 1.5 and curve[2, 1] == 1.1
    np.testing.assert_allclose(at, [[1.5, points[0][1.0, 0.0][0]]])
    np.testing.assert_allclose(below, [[0.6**0.5, points[1][1.0, 0.0][0]]])
    np.testing.assert_allclose(line[:, 0], [0, 0.6**0.5])
    text = texts(figures.ALL["kl"], record)
    for wanted in ("KL to base, nats per response", "utility w·n", "method, share at its KL"):
        assert wanted in text


def test_without_a_frontier_what_is_reached_stands_over_the_root_of_the_mean_kl(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    record["frontier"] = None
    for row, bound in zip(record["rows"], (False, True), strict=True):
        row["quality"]["kl_bound"] = bound
    panels = drawn(record, monkeypatch)
    assert list(panels) == ["hypervolume", "inner product"]
    first, second = record["rows"]
    (name, at), (other, below), (_, line) = panels["hypervolume"]
    assert (name, other) == ("alpha", "beta")
    np.testing.assert_allclose([*at, *below], [[3, first["hypervolume"]], [2**0.5, second["hypervolume"]]])
    np.testing.assert_allclose(line[:, 0], [0, 2**0.5])
    ((_, product), *_) = panels["inner product"]
    np.testing.assert_allclose(product, [[3, first["indicators"]["inner_product"]]])
    first["quality"]["kl"] = None  # a method whose KL is not known has no place over it
    assert next(name for name, _ in drawn(record, monkeypatch)["hypervolume"]) == "beta"
    second["quality"]["kl"] = None
    assert figures.ALL["kl"](record) is None


def test_without_any_kl_there_is_no_such_figure(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        for point in row["points"]:
            point["kl"] = None
    assert figures.ALL["kl"](record) is None


def test_cost_has_a_panel_for_each_unit_and_a_place_for_nothing(record: dict[str, Any]) -> None:
    record["rows"][1]["cost"] = {**record["rows"][1]["cost"], "tokens_generated": 0, "seconds": 0.01}
    text = texts(figures.draw_cost, record)
    for wanted in (*figures.COST_UNITS.values(), "alpha", "beta", "optimum", ">0<"):
        assert wanted in text


def test_ticks_of_cost_read_well(record: dict[str, Any]) -> None:
    text = texts(figures.draw_cost, record)
    for tick in ("0", "45.3 k", "1 M", "4 k", "1 min"):  # a power of ten where one lies near, else the value
        assert f">{tick}<" in text, tick


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.3, {"0": 0, "0.3 s": 0.3}),
        (90, {"0": 0, "1 min": 60}),
        (150, {"0": 0, "2 min 30 s": 150}),
        (7200, {"0": 0, "1 h": 3600}),
        (9000, {"0": 0, "2 h 30 min": 9000}),
        (200_000, {"0": 0, "55 h 33 min": 200_000}),
    ],
)
def test_a_tick_of_the_clock_stands_where_its_label_says(
    record: dict[str, Any], seconds: float, shown: dict[str, float]
) -> None:
    for row in record["rows"]:
        row["cost"] = {**row["cost"], "seconds": seconds}
    with style.canvas(3, 3, "light") as (figure, colours):
        (panel,) = style.panels(figure, 1, 1)
        figures._cost_panel(panel, record["rows"], "seconds", colours)
        assert {
            tick.get_text(): at for tick, at in zip(panel.get_xticklabels(), panel.get_xticks(), strict=True)
        } == shown


def test_there_are_always_two_ticks_of_cost_and_never_a_crowd() -> None:
    for least, most in ((1, 1), (3, 1e9), (400, 500), (1e5, 2e6)):
        ticks = figures._cost_ticks(least, most, [10.0**power for power in range(16)])
        assert ticks[0] == 0 and 2 <= len(ticks) <= 6 and ticks == sorted(set(ticks))


def test_learning_curves_show_what_was_logged(record: dict[str, Any]) -> None:
    text = texts(figures.draw_curves, record)
    assert "alpha" in text and "beta" not in text, "beta logged nothing"
    assert figures.QUANTITIES["utility"] in text and figures.QUANTITIES["kl"] not in text
    for row in record["rows"]:
        row["curves"] = []
    assert figures.draw_curves(record) is None


def test_the_curve_of_several_seeds_meets_them_at_equal_shares_of_training() -> None:
    seeds = [[[0.0, 4.0], [10.0, 2.0], [20.0, 3.0]], [[2.0, 0.0], [30.0, 1.0]]]
    assert figures.of_seeds(seeds).tolist() == [[1.0, 2.0, 0.0, 4.0], [25.0, 2.0, 1.0, 3.0]]
    assert figures.of_seeds(seeds[:1]).tolist() == [[0.0, 4.0, 4.0, 4.0], [10.0, 2.0, 2.0, 2.0], [20.0, 3.0, 3.0, 3.0]]


@pytest.mark.slow
def test_learning_curves_have_one_line_a_method(record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[list[float]] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **how: drawn.append([*y]) or plot(self, x, y, **how))
    figures.draw_curves(record)
    assert drawn == [[0.0, 1.0], [3.5, 1.5]], "utility of one seed, mean loss of two"


def test_curves_are_condensed_by_means_over_tokens() -> None:
    lines = [{"step": i, "tokens_generated": i, "tokens_trained": 2 * i, "loss": float(i % 2)} for i in range(400)]
    lines += [{"step": 0, "loss": None, "utility": 1.0}, {"step": 1, "tokens_trained": 5, "utility": 3.0}]
    result = figures.condense(lines)
    assert set(result) == {"loss", "utility"} and len(result["loss"]) == 40
    assert result["loss"][0] == [13.5, 0.5]  # steps 0 to 9: 3 tokens each
    assert result["utility"] == [[0, 1], [5, 3]]
    assert figures.condense(lines[:1]) == {}, "one line is no curve"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", style.FORMATS)
def test_a_reliability_diagram_is_written(tmp_path: Path, suffix: str) -> None:
    place = tmp_path / f"reliability{suffix}"
    reliability.reliability_figure(BINS, "helpfulness", place)
    assert place.read_bytes() == reliability.draw(BINS, "helpfulness", suffix)


def test_the_reliability_diagram_says_the_calibration_error() -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = reliability.draw(BINS, "the helpfulness model", ".svg").decode()
    assert "calibration error 0.250" in text  # (10 * .1 + 30 * .3) / 40
    assert "the helpfulness model" in text


@pytest.mark.parametrize(
    ("bins", "words"),
    [
        ([], "every bin is empty"),
        ([{"confidence": 0.1, "accuracy": 0.2, "count": 0}], "every bin is empty"),
        ([{"confidence": 1.2, "accuracy": 0.2, "count": 1}], "confidence is 1.2; allowed: 0 to 1"),
        ([{"confidence": 0.2, "accuracy": float("nan"), "count": 1}], "accuracy is nan"),
    ],
)
def test_wrong_bins_are_refused(tmp_path: Path, bins: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        reliability.reliability_figure(bins, "t", tmp_path / "f.png")
    with pytest.raises(RequestError, match="ending in"):
        reliability.reliability_figure(BINS, "t", tmp_path / "f.gif")
    assert list(tmp_path.iterdir()) == []

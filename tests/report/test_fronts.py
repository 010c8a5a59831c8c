"""The figure: same input, same bytes; what it must show is there."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest

from moalign.report import style
from moalign.report.figures import draw_fronts

Build = Callable[..., dict[str, Any]]
FIVE = {"best-of-n": 0.1, "mo-odpo": 0.3, "prompting": 0.0, "ric": 0.15, "sft": -0.1}


def size(content: bytes) -> tuple[int, int]:
    """Width and height from a PNG's header."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", style.FORMATS)
def test_the_same_bytes_twice(compared: Build, suffix: str) -> None:
    record = compared(FIVE)
    assert draw_fronts(record, suffix) == draw_fronts(record, suffix)


def test_size_of_one_panel(compared: Build) -> None:
    assert size(draw_fronts(compared(FIVE))) == (round(7.6 * style.DPI), round(4.8 * style.DPI))


@pytest.mark.parametrize("place", ["beside", "below"])
def test_the_legend_of_long_labels_lies_within_the_figure(place: str) -> None:
    """However many settings tell the rows apart, no label is cut at the figure's edge."""
    labels = [f"hindsight (steps={i}, temperature=1.25, sft_coef=0.5, batch=128, stage.lr=0.00012)" for i in range(12)]
    beside = place == "beside"
    entries = [style.wrapped(label) + ("\n0.477 (77 %)" if beside else "") for label in labels]
    with style.canvas(7.6, max(4.8, style.legend_height(labels)) if beside else 6.0, "light") as (made, _):
        panel = made.subplots()
        handles = [panel.plot([0], [0], marker="o", label=entry)[0] for entry in ["optimum\n0.619", *entries]]
        style.legend(made, handles, ["optimum\n0.619", *entries], "method\n(share)" if beside else "", beside)
        made.draw_without_rendering()
        box, page = made.legends[0].get_window_extent().padded(-4), made.bbox  # without its empty frame, in pixels
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1


@pytest.mark.slow
@pytest.mark.parametrize(("objectives", "expected"), [(3, (10.5, 4.2)), (4, (10.5, 7.5))])
def test_size_of_pairwise_panels(compared: Build, objectives: int, expected: tuple[float, float]) -> None:
    content = draw_fronts(compared({"a": 0.2, "b": 0.0}, objectives=objectives))
    assert size(content) == tuple(round(inches * style.DPI) for inches in expected)


def test_every_label_is_written(compared: Build) -> None:
    """An SVG keeps its texts, so they can be read back."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_fronts(compared(FIVE, dead=("broken",)), ".svg").decode()
    for wanted in [*FIVE, "optimum", "helpfulness (normalised)", "harmlessness (normalised)", "w = 0.5, 0.5"]:
        assert wanted in text
    assert "broken" not in text


def test_no_optimum_no_share(compared: Build) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_fronts(compared({"a": 0.2, "b": 0.0}, optimum=False), ".svg").decode()
    assert "optimum" not in text and "%)" not in text


def test_it_is_not_blank(compared: Build) -> None:
    """Each method's colour is on the page."""
    from matplotlib import colors, image

    pixels = (image.imread(io.BytesIO(draw_fronts(compared(FIVE))))[..., :3] * 255).round().astype(int)
    for colour in style.THEMES["light"].colours[: len(FIVE)]:
        wanted = [round(255 * part) for part in colors.to_rgb(colour)]
        assert (abs(pixels - wanted).max(axis=-1) <= 2).sum() > 100, colour


def test_drawing_leaves_the_users_matplotlib_alone(compared: Build) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw_fronts(compared({"a": 0.2, "b": 0.0}))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_more_methods_than_colours(compared: Build) -> None:
    record = compared({f"m{i}": 0.02 * i for i in range(12)})
    looks = {style.look(i, style.THEMES["light"]) for i in range(63)}
    assert len(looks) == 63 and draw_fronts(record)
    lines = {(look.colour, look.dashes) for look in (style.look(i, style.THEMES["light"]) for i in range(24))}
    assert len(lines) == 24, "no two are told apart by their marks alone"


def in_families(compared: Build, count: int, **options: Any) -> dict[str, Any]:
    record = compared({f"m{n}": 0.3 - 0.03 * n for n in range(count)}, **options)
    for index, row in enumerate(record["rows"]):
        row["family"] = ("online", "offline", "prompted")[index % 3]
    return record


def test_many_methods_stand_in_panels_of_their_family(compared: Build) -> None:
    """Each is drawn in its family's panel, the best of each family in the large one, too; the optimum in all four."""
    import matplotlib

    record = in_families(compared, 9)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_fronts(record, ".svg").decode()
    counts = {row["label"]: text.count(f">{row['label']}  ") for row in record["rows"]}
    assert counts == {f"m{n}": 2 if n < 3 else 1 for n in range(9)}
    assert text.count(">optimum  ") == 4
    assert all(f">{name}</text>" in text for name in ("the best of each family", "online", "offline", "prompted"))


def test_many_methods_of_three_objectives_are_those_that_are_the_best_of_their_family(compared: Build) -> None:
    """In three small panels the lines and the names of all would leave no room for the points."""
    import matplotlib

    record = in_families(compared, 9, objectives=3)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_fronts(record, ".svg").decode()
    assert [f">m{n}</text>" in text for n in range(9)] == [True] * 3 + [False] * 6
    assert ">the best method of each family, hypervolume</text>" in text
    assert size(draw_fronts(record)) == (round(10.5 * style.DPI), round(4.2 * style.DPI))


def test_a_long_legend_below_panels_makes_the_figure_higher(compared: Build) -> None:
    """Of 26 methods of one family: seven lines of names, four more than there is room for."""
    record = compared({f"m{n}": 0.3 - 0.01 * n for n in range(26)}, objectives=3)
    assert size(draw_fronts(record)) == (round(10.5 * style.DPI), round((4.2 + 4 * 0.45) * style.DPI))


def test_a_large_family_has_several_panels(compared: Build) -> None:
    """Of ten methods of one family the seven best share a panel, the other three stand in the next."""
    import matplotlib

    record = in_families(compared, 11)  # m0 online, all others offline
    for row in record["rows"][1:]:
        row["family"] = "offline"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = draw_fronts(record, ".svg").decode()
    assert ">offline</text>" in text and ">offline, behind those</text>" in text
    assert text.count(">optimum  ") == 4  # the best of each, online, offline twice
    assert [text.count(f">m{n}  ") for n in range(11)] == [2, 2, *[1] * 9]


def test_few_methods_or_one_family_stay_in_one_panel(compared: Build) -> None:
    few, alike = in_families(compared, 8), in_families(compared, 9)
    for row in alike["rows"]:
        row["family"] = "online"
    for record in (few, alike):
        plain = {
            **record,
            "rows": [{key: value for key, value in row.items() if key != "family"} for row in record["rows"]],
        }
        assert draw_fronts(record) == draw_fronts(plain)

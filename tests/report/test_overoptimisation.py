"""The over-optimisation figure: truth and belief over the distance from the base, a panel a method."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from moalign.report import style
from moalign.report.overoptimisation import draw_over_optimisation


def curve(method: str, seed: int = 0, believed: bool = True, furthest: float = 16.0) -> dict[str, Any]:
    kl, true = [-0.01, 1.0, 4.0, furthest], [0.2, 0.5, 0.7, 0.4 + 0.01 * seed]
    rows = [
        {
            "kl": nats,
            "true": {"inner_product": value},
            "believed": {"inner_product": 0.2 + 0.2 * at} if believed else None,
        }
        for at, (nats, value) in enumerate(zip(kl, true, strict=True))
    ]
    best = {"inner_product": {"row": 2, "kl": 4.0, "value": 0.7, "lost": 0.7 - true[-1]}}
    return {"method": method, "task": "toy", "seed": seed, "rows": rows, "best": best}


def drawn(monkeypatch: pytest.MonkeyPatch, *curves: dict[str, Any]) -> Any:
    """The figure itself, caught before it becomes a file."""
    caught: list[Any] = []
    content = style.content
    monkeypatch.setattr(style, "content", lambda figure, *rest: caught.append(figure) or content(figure, *rest))
    draw_over_optimisation(curves)
    return caught[0]


def test_truth_and_belief_are_drawn_over_the_root_of_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, curve("alpha"))
    believed, true, ring = figure.axes[0].lines
    assert true.get_xdata() == pytest.approx([0, 1, 2, 4]), "an estimate below 0 is at 0"
    assert true.get_ydata() == pytest.approx([0.2, 0.5, 0.7, 0.4])
    assert believed.get_ydata() == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert true.get_linestyle() == "-" and believed.get_linestyle() != "-"
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((2.0, 0.7))
    assert "best 0.700, at the end 0.400" in figure._suptitle.get_text()


def test_a_panel_for_each_method_a_thin_line_for_each_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, curve("alpha"), curve("beta"), curve("alpha", 1), curve("alpha", 2))
    alpha, beta = (panel for panel in figure.axes if panel.get_visible())
    assert [panel.get_title(loc="left") for panel in (alpha, beta)] == ["alpha", "beta"]
    assert (len(alpha.lines), len(beta.lines)) == (9, 3)
    assert alpha.lines[0].get_linewidth() < beta.lines[0].get_linewidth()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(names) == len(set(names)) == 3


def test_panels_can_be_read_against_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have the same axes, and every column names its x below its lowest panel."""
    figure = drawn(monkeypatch, *(curve(name) for name in "abcde"), curve("far", furthest=81.0))
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert len({(panel.get_xlim(), panel.get_ylim()) for panel in shown}) == 1
    assert shown[0].get_xlim()[1] > 8
    assert [bool(panel.get_xlabel()) for panel in shown] == [False, False, True, True, True, True]
    assert all(panel.xaxis.get_tick_params()["labelbottom"] for panel in shown[2:])


def test_without_other_rewards_there_is_only_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(drawn(monkeypatch, curve("alpha", believed=False)).axes[0].lines) == 2


def test_a_run_whose_kl_is_not_known_has_an_empty_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = curve("alpha")
    for row in unknown["rows"]:
        row["kl"] = None
    unknown["best"]["inner_product"]["kl"] = None
    assert drawn(monkeypatch, unknown, curve("beta")).axes[0].lines[:] == []
    assert draw_over_optimisation([unknown])


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_same_bytes_twice_on_the_papers_colour(theme: style.ThemeName) -> None:
    from matplotlib import colors, image

    content = draw_over_optimisation([curve("alpha"), curve("beta")], ".png", theme)
    assert content == draw_over_optimisation([curve("alpha"), curve("beta")], ".png", theme)
    pixels = image.imread(io.BytesIO(content))[..., :3]
    assert np.abs(pixels[0, 0] - np.array(colors.to_rgb(style.THEMES[theme].paper))).max() < 0.01

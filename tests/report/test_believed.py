"""Believed beside true rewards: in the terminal, in Markdown, on the page and in the figure."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moalign.report import figures, markdown, page, verdict
from moalign.report.terminal import print_comparison

Build = Callable[..., dict[str, Any]]
WIN = {"over": "b", "quantity": "hypervolume", "believed": 0.25, "difference": -0.125, "ci": [-0.2, -0.05],
       "certain": True, "nearest_to_base": False}  # fmt: skip


@pytest.fixture
def record(compared: Build) -> dict[str, Any]:
    """a leads b in truth and c has no other rewards in training; b leads a by those that it was trained on."""
    made = compared({"a": 0.3, "b": 0.1, "c": 0.0})
    for row, kl, volume, product in zip(made["rows"], (0.5, 9.25), (0.4, 0.65), (0.45, 0.775), strict=False):
        row["quality"].update(kl=kl, kl_bound=False)
        row["gap"] = volume - row["hypervolume"]
        row["believed"] = {"hypervolume": volume, "inner_product": product, "false_wins": []}
    made["rows"][1]["believed"]["false_wins"] = [{**WIN, "over": "a"}]
    return made


def terminal(record: dict[str, Any]) -> list[str]:
    text = io.StringIO()
    print_comparison(Console(file=text, width=80, markup=False, highlight=False, emoji=False), record)
    return text.getvalue().splitlines()


def test_the_verdict_names_what_is_believed_but_false_once(record: dict[str, Any]) -> None:
    lines = [line for line in verdict.sentences(record) if line.startswith("†")]
    head = "† Ahead by the rewards that were trained on, but not in truth: b over a "
    assert lines == [f"{head}(hypervolume: believed +0.250, true -0.125 [-0.200, -0.050])."]
    near = {**WIN, "quantity": "inner_product", "certain": False, "nearest_to_base": True, "difference": -0.01}
    record["rows"][1]["believed"]["false_wins"] = [near, {**WIN, "over": "a"}]
    record["rows"][0]["believed"]["false_wins"] = [near]
    (line,) = [line for line in verdict.sentences(record) if line.startswith("†")]
    assert line.startswith(head) and "[-0.200, -0.050]; and 1 more); a over b, the nearest to the base, (inner" in line
    assert line.endswith("true -0.010 [-0.200, -0.050], which may be chance).")


def test_where_all_is_true_nothing_is_marked(record: dict[str, Any]) -> None:
    record["rows"][1]["believed"]["false_wins"] = []
    written = "".join([*verdict.sentences(record), *terminal(record), markdown.page(record, Path())])
    assert "†" not in written and "believed" in written


def test_the_terminal_shows_both_at_80_columns(record: dict[str, Any]) -> None:
    lines = terminal(record)
    first = next(k for k, line in enumerate(lines) if "believed and true" in line)
    rows = [line.split() for line in lines[first + 2 : first + 4]]
    true = [[f"{row['hypervolume']:.3f}", f"{row['indicators']['inner_product']:.3f}"] for row in record["rows"]]
    assert rows[0] == ["a", "0.50", "0.400", true[0][0], "0.450", true[0][1]]
    assert rows[1] == ["b", "†", "9.25", "0.650", true[1][0], "0.775", true[1][1]]
    assert any(line.startswith("† ahead of another method") for line in lines)
    assert all(len(line) <= 80 for line in lines if not line.startswith(("figure", "markdown", "json")))


def test_markdown_and_page_have_a_section_of_them(record: dict[str, Any]) -> None:
    text = markdown.page(record, Path())
    section = text.split("## Believed and true")[1].split("\n## ")[0]
    assert "| method | KL (nats) | believed hypervolume | true hypervolume | gap |" in section
    assert "| b † | 9.25 | 0.6500 |" in section and "| c " not in section
    assert "† ahead of another method" in section
    content = page.page(record).decode()
    assert 'id="believed-kl"' in content and "b †</td>" in content
    assert "† ahead of another method" in content


def test_a_record_of_before_shows_what_its_gap_tells(compared: Build) -> None:
    """Hypervolume and gap are known, the believed inner product is not, so nothing is drawn."""
    record = compared({"a": 0.2, "b": 0.0})
    for row in record["rows"]:
        row["gap"] = 0.125
        del row["believed"]
    section = markdown.page(record, Path()).split("## Believed and true")[1].split("\n## ")[0]
    volume = record["rows"][0]["hypervolume"]
    assert f"| a | {volume + 0.125:.4f} | {volume:.4f} | +0.1250 |" in section and "inner product" not in section
    assert 'id="believed-kl"' not in page.page(record).decode()
    assert figures.draw_believed(record) is None


def test_the_figure_draws_every_method_that_has_both(record: dict[str, Any]) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        record["rows"][0]["quality"]["kl"] = 15.0
        content = figures.draw_believed(record, ".svg")
        record["rows"][1]["quality"]["kl"] = None  # a method whose KL is not known has no place over it
        assert figures.draw_believed(record, ".svg") not in (None, content)
    assert content is not None
    written = content.decode()
    assert ">a</text>" in written and ">b</text>" in written and ">c</text>" not in written
    assert "believed inner product" in written and "true hypervolume" in written
    assert ">8</text>" in written and ">16</text>" in written  # what lies at 15 nats can be read


def test_in_a_browser_both_are_drawn_and_the_quantity_can_be_chosen(
    browser: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    prefs = [point["prefs"] for point in record["rows"][0]["points"]]
    answers = page.Answers("a", prefs, ["why ?"], [["so"]] * len(prefs), [[[0.0, 0.0]]] * len(prefs))
    file = tmp_path / "page.html"
    file.write_bytes(page.page(record, [answers]))
    browser.open(file)
    count = "document.querySelectorAll('#believed-{} .mark').length"
    assert [browser.run(count.format(chart)) for chart in ("true", "kl")] == [2, 4]
    read = "document.querySelectorAll('#believed-kl .mark')[0].getAttribute('aria-label')"
    assert browser.run(read).startswith("a\nbelieved hypervolume 0.400, true ")
    browser.run("document.querySelector('#believed-of select').value = 'inner_product'")
    browser.run("document.querySelector('#believed-of select').dispatchEvent(new Event('change'))")
    assert browser.run(read).startswith("a\nbelieved inner product 0.450, true ")

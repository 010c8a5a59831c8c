"""The Markdown page."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from moalign.report import leaderboard, markdown

Build = Callable[..., dict[str, Any]]
FOLDER = Path("results/compare/toy-1")


def tables(page: str) -> list[list[str]]:
    """Return the tables of a page, each as its lines."""
    return [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]


def test_tables_are_whole(compared: Build) -> None:
    page = markdown.page(compared({"a": 0.2, "b|c": 0.0}, dead=("x",)), FOLDER)
    result = tables(page)
    assert len(result) == 3
    for lines in result:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(columns) == 1, lines


def test_what_it_says(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0}, seeds=2)
    page = markdown.page(record, FOLDER)
    assert page.startswith("# Comparison on `toy`\n")
    assert record["verdict"][0] in page and "0123456789abcdef" in page
    row = record["rows"][0]
    ranking = tables(page)[0]
    assert "each seed" in ranking[0] and "% of optimum" in ranking[0] and "regret" in ranking[0]
    assert f"{row['hypervolume']:.4f}" in ranking[2]
    assert ", ".join(f"{v:.3f}" for v in row["hypervolume_by_seed"]) in ranking[2]
    assert tables(page)[1][2].startswith("| a | b | +0.") and tables(page)[1][2].endswith("| yes |")


def test_every_rows_command_is_there(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0}, seeds=2, dead=("x",))
    page = markdown.page(record, FOLDER)
    for row in record["rows"]:
        for run in row["runs"]:
            assert f"\n{run['command']}\n" in page
    assert f"\n{record['command']}\n" in page


def test_failures_are_a_section(compared: Build) -> None:
    assert "## Failures" not in markdown.page(compared({"a": 0.2, "b": 0.0}), FOLDER)
    page = markdown.page(compared({"a": 0.2}, dead=("x",)), FOLDER)
    assert "- **x**, seed 0: WorkError: out of \\| memory" in page and "x (failed)" in page


def test_the_figure_is_linked_from_where_the_page_lies(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    assert "](fronts.png)" in markdown.page(record, FOLDER)
    assert "](results/compare/toy-1/fronts.png)" in markdown.page(record, Path())
    record["figure"] = "results/compare/toy-1/a (1).png"
    assert "](a%20%281%29.png)" in markdown.page(record, FOLDER)
    record["figure"] = None
    assert "![" not in markdown.page(record, FOLDER)


def test_nothing_but_failures(compared: Build) -> None:
    page = markdown.page(compared({}, dead=("x",)), FOLDER)
    assert "No method finished" in page and len(tables(page)) == 1


def test_without_an_optimum(compared: Build) -> None:
    ranking = tables(markdown.page(compared({"a": 0.2, "b": 0.0}, optimum=False), FOLDER))[0]
    assert "optimum" not in ranking[0] and "regret" not in ranking[0]


def test_blocks_stand_only_where_there_is_something_to_show(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    heads = ("## Generalisation", "## Believed and true", "## Training diagnostics", "## Reported by papers")
    assert not any(head in markdown.page(record, FOLDER) for head in heads)
    side = {"preferences": 2, "hypervolume": 0.5, "optimal_share": None, "tau": 0.25, "inner_product": 0.75}
    record["rows"][0].update(
        generalisation={"trained": {**side, "preferences": 9, "utility_share": 0.875}, "held_out": side},
        gap=0.125,
        diagnostics={"k|l": 0.12345},
    )
    record["reported"] = [
        {"method": "R|C", "metric": "HV", "value": 0.8, "source": "arXiv 2402.10207, table 2", "setting": "7B"}
    ]
    page = markdown.page(record, FOLDER)
    assert all(page.count(head) == 1 for head in heads)
    assert "| a | held out | 2 | 0.5000 | – | – | 0.250 | 0.750 |" in page
    assert "| a | trained | 9 | 0.5000 | – | 87.5 % | 0.250 | 0.750 |" in page
    assert "| +0.1250 |" in page and "| b | " in page
    assert f"| a | k\\|l | {0.12345:.4g} |" in page
    assert "| R\\|C | HV | 7B | arXiv 2402.10207, table 2 | 0.8 |" in page


def test_kl_to_base_stands_where_a_row_has_it(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.1, "c": 0.0}, dead=("x",))
    assert "KL to base" not in markdown.page(record, FOLDER)
    record["rows"][0]["quality"].update(kl=3.207, kl_bound=False)
    record["rows"][1]["quality"].update(kl=0.6363, kl_bound=True)
    page = markdown.page(record, FOLDER)
    heads, _, *rows = next(lines for lines in tables(page) if "distinct-3" in lines[0])
    assert heads.endswith("| KL to base |")
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == ["3.21", "≤ 0.64", "–"]
    assert "in nats per response" in page


def test_spacing_stands_beside_the_hypervolume_of_a_front(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    record["rows"][1]["front"] = 1.0
    heads, _, *rows = tables(markdown.page(record, FOLDER))[0]
    assert "hypervolume" in heads and heads.endswith("| spacing |")
    spread = f"{record['rows'][0]['indicators']['spacing']:.3f}"
    assert [row.rsplit("|", 2)[1].strip() for row in rows] == [spread, "–"]


def test_figures_and_the_page_are_linked(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0})
    record["figures"] = {"fronts": record["figure"], "cost": "results/compare/toy-1/cost.png"}
    record["html"] = "results/a page.html"
    page = markdown.page(record, FOLDER)
    assert page.count("](fronts.png)") == 1 and "](cost.png)" in page and "](../../a%20page.html)" in page


def test_how_often_a_seed_beats_a_seed_is_a_column_where_there_are_several(compared: Build) -> None:
    page = markdown.page(compared({"a": 0.2, "b": 0.0}, seeds=3), FOLDER)
    heading, _, row = tables(page)[1]
    assert "| above 0 in | a seed beats a seed in | certain |" in heading and row.endswith("| 100.0 % | 100 % | yes |")
    assert "the share of the resamples, no probability. A seed beats a seed in: the share of pairs" in page
    assert "beats a seed" not in markdown.page(compared({"a": 0.2, "b": 0.0}), FOLDER)


def test_several_seeds_have_their_interquartile_mean(compared: Build) -> None:
    record = compared({"a": 0.2, "b": 0.0}, seeds=3)
    assert f"| {record['rows'][0]['hypervolume_iqm']:.4f} |" in markdown.page(record, FOLDER)
    assert "interquartile" not in markdown.page(compared({"a": 0.2, "b": 0.0}), FOLDER)


def test_hostile_text_acts_neither_in_a_terminal_nor_as_markdown(compared: Build, hostile: Any) -> None:
    """Not the escape sequences, newlines, HTML, bars, code ends, headings and links of labels, errors and commands."""
    record = compared({"a": 0.2, "b": 0.0}, dead=("x",))
    text = hostile.ALL
    record |= {"description": f"# {text}", "verdict": [f"1. {text}", f"[a]: {text}"], "command": text, "task": text}
    for row in record["rows"]:
        row["label"] = f"{row['label']} {text}"
        for run in row["runs"]:
            run.update(command=text, error=text if run["error"] else None)
    record["environment"] = {**record["environment"], "python": text, "packages": {"torch": text}, "commit": text}
    pages = [
        markdown.page(record, FOLDER),
        leaderboard.leaderboard({FOLDER / text.replace("/", "") / "compare.json": record}, FOLDER),
    ]
    for page in pages:
        assert hostile.acting(page) == []
        shown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page)
        assert not re.search('<script|<!--|<strong>d|<s>|evil.example"|<h1>a|<li>a', shown)
        literal = html.unescape(re.sub("<[^>]*>", "", shown))
        for part in ("[red]a[/red]", "<script>alert(1)</script><!-- </table> &lt;b&gt;", "**d** ![x](http", "~~e~~"):
            assert literal.count(part) >= 8
        for lines in tables(page):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_the_pairs_of_many_methods_are_a_matrix(compared: Build) -> None:
    """By hand from the record: a row for each but the last, a column for each but the first, certain ones in bold."""
    record = compared({f"m{n}": 0.3 - 0.05 * n for n in range(7)})
    text = markdown.page(record, Path())
    lines = text.split("Every pair: ")[1].split("\n\n")[1].splitlines()
    assert lines[0] == "| method | 2 | 3 | 4 | 5 | 6 | 7 |"
    assert len(lines) == 2 + 6
    known = {(pair["a"], pair["b"]): pair for pair in record["pairs"]}
    for index, line in enumerate(lines[2:]):
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        assert name == f"{index + 1} m{index}"
        for other, cell in enumerate(cells, 1):
            if other <= index:
                assert cell == ""
                continue
            pair = known[f"m{index}", f"m{other}"]
            assert cell.startswith("**") == pair["certain"]
            assert float(cell.strip("*")) == pytest.approx(pair["difference"], abs=5e-4)
    listed = text.split("## Paired differences")[1].split("Every pair: ")[0]
    assert listed.count("| m0 | m") == 6 and "| m1 | m" not in listed, "the best against each other, with intervals"


def test_the_pairs_of_few_methods_are_a_list(compared: Build) -> None:
    text = markdown.page(compared({f"m{n}": 0.3 - 0.05 * n for n in range(6)}), Path())
    assert "Every pair: " not in text and "| m1 | m5 |" in text

"""README and the pages that it points to: short, true to the records, every command and link good."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from moalign.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "results/README.md", "recipes/README.md", "CONTRIBUTING.md"]


def commands(page: str) -> list[str]:
    """The lines of a page's code blocks that begin with ``moalign``, and its inline commands without an ellipsis."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("moalign ")]
    inline = re.findall(r"`(moalign [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return lines + [" ".join(command.split()) for command in inline if not re.search(r"\.\.\.|\||\[|COMMAND", command)]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_240


@pytest.mark.parametrize("page", PAGES[:3])
def test_every_command_of_a_page_is_one(page: str) -> None:
    """Each is parsed as the program would, up to where its work would begin."""
    group: Any = typer.main.get_command(app)
    lines = commands(page)
    assert len(lines) >= 3
    for line in lines:
        arguments = ["1" if part == "N" else part for part in shlex.split(line, comments=True)[1:]]  # --seed N
        with group.make_context("moalign", arguments) as context:
            name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
            while hasattr(command, "resolve_command"):
                with command.make_context(name, list(rest), parent=context) as inner:
                    name, command, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
            command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_table_of_methods_says_what_the_records_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("| method |") :].partition("\n\n")[0].splitlines()[2:]
    rows = {
        cells[0].strip("`"): cells[3:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in table)
    }
    records = {
        task: {
            row["method"]: row  # of a method with two settings the one that is ahead
            for row in reversed(
                json.loads((ROOT / f"results/published/{task}/compare.json").read_text(encoding="utf-8"))["rows"]
            )
        }
        for task in ("sandbox", "sandbox-learned", "assistant")
    }
    assert set(rows) == set(records["sandbox"])
    for method, cells in rows.items():
        exact, learned, real = (record.get(method) for record in records.values())
        wanted = [f"{100 * exact['optimal_share']:.0f}", f"{exact['indicators']['tau']:.2f}"]
        wanted += ["" if learned is None else f"{100 * learned['optimal_share']:.0f}"]
        wanted += ["", ""] if real is None else [f"{real['hypervolume']:.3f}", f"{real['indicators']['tau']:.2f}"]
        assert cells == wanted, method

"""The templates of pages (``assets/``), and what they write numbers and texts with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from moalign.report import record, units
from moalign.report.tables import Table


def asset(name: str) -> str:
    """Return the text of a file in ``assets/``."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return a filled template of ``assets/``; in HTML every value is escaped that is not marked safe."""
    return _ENVIRONMENT.get_template(template).render(context)


def escaped(text: str) -> str:
    """Return text on one line with Markdown's special characters escaped."""
    flat = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\`*_|<>" else char for char in flat).replace("](", "]\\(")


def markdown_table(table: Table) -> str:
    """Return a Markdown table."""
    heads = [column.heading for column in table.columns]
    rule = ["---" if column.left else "---:" for column in table.columns]
    lines = [
        [cell if column.markdown else escaped(cell) for column, cell in zip(table.columns, cells, strict=True)]
        for cells in table.cells()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines))


def vector(values: Sequence[float]) -> str:
    """Return numbers separated by commas, without zeros at their ends."""
    return ", ".join(f"{value:g}" for value in values)


def software(environment: Mapping[str, Any]) -> str:
    """Return the versions of Python and packages in a captured environment, and the commit, as Markdown."""
    packages = environment.get("packages") or {}
    named = ", ".join(f"{name} {packages[name]}" for name in ("moalign", "torch", "transformers") if packages.get(name))
    changed = " with changes" if environment.get("dirty") else ""
    commit = f", commit `{environment['commit'][:12]}`{changed}" if environment.get("commit") else ""
    return f"Python {environment.get('python')}, {named or 'moalign'}{commit}"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FunctionLoader(asset),
    autoescape=jinja2.select_autoescape(("html",)),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters |= {
    "number": units.number,
    "percent": units.percent,
    "vector": vector,
    "machine": record.machine,
    "md": escaped,
    "table": markdown_table,
    "software": software,
}

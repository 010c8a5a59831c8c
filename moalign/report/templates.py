"""The templates of pages (``assets/``), and what they write numbers and texts with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from moalign.core.text import PROSE, visible
from moalign.report import record, units
from moalign.report.tables import Table


def asset(name: str) -> str:
    """Return the text of a file in ``assets/``."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return a filled template of ``assets/``.

    In HTML every value is escaped that is not marked safe; there are no control characters in either.
    """
    page = _ENVIRONMENT.get_template(template).render(context)
    return visible(page, PROSE)


def escaped(text: str) -> str:
    """Return text on one line that Markdown shows literally: no markup, HTML, link, entity in it."""
    flat = visible(" ".join(text.split()))
    marked = "".join(f"\\{char}" if char in "\\`*_|<>~" else char for char in flat).replace("](", "]\\(")
    return _ENTITY.sub(r"\\&", marked)


def paragraph(text: str) -> str:
    """Return text as :func:`escaped` does, for the beginning of a line: no heading, list or link's definition."""
    return _BLOCK.sub(r"\g<0>\\", escaped(text))


def code(text: str, cell: bool = False) -> str:
    """Return text on one line as Markdown's code; ``cell``: inside a table, where ``|`` must be escaped even there."""
    flat = visible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    pad = " " if flat[:1] == "`" or flat[-1:] == "`" else ""
    return f"{fence}{pad}{flat.replace('|', chr(92) + '|') if cell else flat}{pad}{fence}"


def block(lines: Iterable[str]) -> str:
    """Return commands as a block of shell code, each on one line; no command can end the block."""
    flat = [visible(text) for text in lines]
    fence = "`" * max(3, 1 + max((len(run) for text in flat for run in re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}sh", *flat, fence])


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
    names = [name for name in ("moalign", "torch", "transformers") if packages.get(name)]
    named = ", ".join(f"{name} {escaped(str(packages[name]))}" for name in names)
    changed = " with changes" if environment.get("dirty") else ""
    commit = f", commit {code(environment['commit'][:12])}{changed}" if environment.get("commit") else ""
    return f"Python {escaped(str(environment.get('python')))}, {named or 'moalign'}{commit}"


_ENTITY = re.compile(r"&(?=#?\w+;)")
_BLOCK = re.compile(r"^(?:\d+(?=[.)])|(?=[#+=\[-]))")
"""Where a heading, a list, a rule or a link's definition would begin at the beginning of a line."""

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
    "md": paragraph,
    "code": code,
    "block": block,
    "table": markdown_table,
    "software": software,
}

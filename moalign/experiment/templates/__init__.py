"""The files that ``moalign init`` and ``moalign export`` write, as jinja2 templates beside this module."""

from __future__ import annotations

from typing import Any


def render(template: str, /, **values: Any) -> str:
    """Return the text of a template; jinja2's UndefinedError for a value that it needs and that is not given."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__, "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["repr"] = repr
    return environment.get_template(template).render(values)

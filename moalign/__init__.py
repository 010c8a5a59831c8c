"""moalign: multi-objective alignment of language models, compared under equal conditions.

Importing the package costs nothing: the version is looked up when it is asked for, everything else is
imported from its own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("moalign")
        except metadata.PackageNotFoundError:
            return "0+not.installed"  # a checkout on sys.path
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__"])

"""moalign: multi-objective alignment of language models, compared under equal conditions.

The functions of :mod:`moalign.api` are here by their names: ``moalign.train("mo-odpo")`` is ``moalign train mo-odpo``.
Importing the package costs nothing: each name is looked up when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moalign.api import (
        best,
        compare,
        curve,
        evaluate,
        evaluate_all,
        generate,
        hypervolume,
        load,
        score,
        score_file,
        train,
    )
    from moalign.core.errors import MoalignError, RequestError, WorkError

    __version__: str

__all__ = ["MoalignError", "RequestError", "WorkError", "__version__", "best", "compare", "curve", "evaluate"]
__all__ += ["evaluate_all", "generate", "hypervolume", "load", "score", "score_file", "train"]

_ERRORS = ("MoalignError", "RequestError", "WorkError")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version("moalign")
        except metadata.PackageNotFoundError:
            return "0+not.installed"  # a checkout on sys.path
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("moalign.core.errors" if name in _ERRORS else "moalign.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

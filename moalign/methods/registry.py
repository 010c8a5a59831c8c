"""Finds methods by name: the files of this package and the entry points of the group ``moalign.methods``.

No list to edit: a file ``methods/my_method.py`` that holds a class with ``name = "my-method"`` is found, and so is a
third party's entry point ``my-method = package.module:Class``. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil

from moalign import methods
from moalign.core import foreign
from moalign.core.errors import RequestError, unknown
from moalign.methods.base import Method

GROUP = "moalign.methods"
_NOT_METHODS = {"base", "registry"}


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}


def _own() -> list[str]:
    modules = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    return [name.replace("_", "-") for name in sorted(modules - _NOT_METHODS) if not name.startswith("_")]


def names() -> list[str]:
    """Return the names of all methods, sorted; imports none of them."""
    return sorted({*_own(), *_entry_points()})


def get(name: str) -> Method:
    """Return the method called ``name``.

    Raises RequestError for an unknown name (with the nearest) and for a plugin that cannot be imported or does not
    keep the contract.
    """
    if name in _own():
        module = importlib.import_module(f"moalign.methods.{name.replace('-', '_')}")
        classes = [
            value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__
        ]
        return _checked(next((c for c in classes if getattr(c, "name", None) == name), None), name, module.__name__)
    if name in _entry_points():
        point = _entry_points()[name]
        try:
            with foreign.call():
                return _checked(point.load(), name, point.value)
        except (*foreign.STOPS, RequestError):
            raise
        except BaseException as error:
            raise RequestError(
                f"method {name!r}: its entry point {point.value!r} cannot be loaded ({foreign.described(error)})"
            ) from error
    raise unknown("method", name, names())


def _checked(plugin: object, name: str, where: str) -> Method:
    method = plugin() if inspect.isclass(plugin) else plugin
    contract = ("name", "summary", "capabilities", "Config", "quick", "train", "policy")
    missing = [part for part in contract if not hasattr(method, part)]
    if missing:
        raise RequestError(
            f"method {name!r} ({where}): the plugin lacks {', '.join(missing)}; see moalign.methods.base"
        )
    assert isinstance(method, Method)
    return method

"""Objectives that are a Python callable: of a file, a dotted path, or an entry point in ``moalign.rewards``.

The callable gets ``(prompts: list[str], responses: list[str], **options)`` and gives one number each.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from moalign.config.objectives import PythonObjective
from moalign.core import foreign
from moalign.core.errors import RequestError, did_you_mean
from moalign.rewards.scorer import ScorerFault, digest

GROUP = "moalign.rewards"
"""The entry-point group in which installed packages offer reward functions."""


class PythonScorer:
    """An objective scored by a callable; the store is used unless the card says ``store: false``."""

    def __init__(self, spec: PythonObjective, base_dir: Path) -> None:
        """Find the callable and check that it takes the options; raises RequestError naming the objective."""
        where = f"objective {spec.name!r}"
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = spec.store is False
        self.options: dict[str, Any] = dict(spec.options)
        with foreign.call():
            self.function = load_function(spec.function, base_dir, where)
            _check_options(self.function, spec.function, self.options, where)
        self._called = spec.function
        self._file = file = file_of(spec.function, base_dir)
        source = _source(self.function) if file is None else fingerprint(file)
        name = spec.function if file is None else Path(spec.function).name  # a moved file is the same file
        self.revision = f"python:{name}:{digest(self.options, spec.revision, source)}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """Return what the callable gives, ``[samples]``; the panel checks length and values.

        Raises ScorerFault whatever the callable raises, a ``sys.exit()`` too.
        """
        with foreign.call():
            try:
                scores = np.asarray(self.function(list(prompts), list(responses), **self.options))
            except (*foreign.STOPS, RequestError):
                raise
            except BaseException as error:
                raise ScorerFault(f"{self._called} raised {foreign.described(error, self._file)}") from error
        return cast("Sequence[float]", scores)


def load_function(name: str, base_dir: Path, where: str) -> Callable[..., Any]:
    """Return the callable called ``file.py:callable`` or ``package.module:callable``, or the entry point of that name.

    A file, and a module that is not installed, is looked for in ``base_dir`` (the task card's folder).
    Raises RequestError when it cannot be imported, does not exist or cannot be called.
    """
    function = _from_path(name, base_dir, where) if ":" in name else _from_entry_point(name, where)
    if not callable(function):
        raise RequestError(f"{where}: function {name!r} is a {type(function).__name__}, which cannot be called")
    return function  # type: ignore[no-any-return]


def file_of(name: str, base_dir: Path) -> Path | None:
    """Return the file of a function called ``file.py:callable``; None when it is called otherwise.

    >>> file_of("my_package.scorers:brevity", Path()) is None
    True
    """
    head, colon, _ = name.rpartition(":")
    return base_dir / head if colon and head.endswith(".py") else None


def fingerprint(file: Path) -> str:
    """Return 16 hex digits over a file's content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _from_entry_point(name: str, where: str) -> Any:
    offered = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in offered:
        listed = ", ".join(sorted(offered)) or "none installed"
        raise RequestError(
            f"{where}: unknown function {name!r}; entry points in {GROUP}: {listed}{did_you_mean(name, list(offered))}"
            "; or give a file or dotted path: scorers.py:callable, package.module:callable"
        )
    with _explained(f"{where}: entry point {name!r} ({offered[name].value}) cannot be loaded"):
        return offered[name].load()


def _from_path(name: str, base_dir: Path, where: str) -> Any:
    file = file_of(name, base_dir)
    module_name, _, attribute = name.rpartition(":")
    if not all(part.isidentifier() for part in [*([] if file else module_name.split(".")), *attribute.split(".")]):
        raise RequestError(f"{where}: function {name!r} is not of the form file.py:callable or package.module:callable")
    module = _import(module_name, base_dir, where) if file is None else _import_file(file, where)
    with _explained(f"{where}: looking up {name!r} failed", file):  # a module may compute what it holds
        try:
            return operator.attrgetter(attribute)(module)
        except AttributeError as error:
            part = str(error.name)
            near = did_you_mean(part, [key for key in dir(error.obj) if not key.startswith("_")])
            raise RequestError(f"{where}: {module_name} has no {part!r} (function {name!r}){near}") from None


def _import(module_name: str, base_dir: Path, where: str) -> Any:
    with _explained(f"{where}: importing {module_name!r} failed"):
        try:
            try:
                return importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name != module_name.partition(".")[0]:
                    raise
            _add_to_path(base_dir.resolve())
            return importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise RequestError(
                f"{where}: module {module_name!r} cannot be imported: {error}; looked on the Python path and in "
                f"{base_dir}"
            ) from error


def _import_file(file: Path, where: str) -> Any:
    """Run a file as a module of its own, once per content; every task may have a ``scorers.py``."""
    try:
        path = file.resolve(strict=True)
        name = f"moalign_scorers_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{fingerprint(path)}"
    except OSError as error:
        raise RequestError(f"{where}: the file {file} cannot be read: {error.strerror}") from None
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a path that ends with .py has a loader
    module = importlib.util.module_from_spec(spec)
    _add_to_path(path.parent)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is the user's: no __pycache__ in it
    try:
        with _explained(f"{where}: running {file} failed", path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = before
    return module


def _add_to_path(folder: Path) -> None:
    """Let modules in ``folder`` be imported.

    Last on the path, so that a file beside the card never hides an installed package; it stays there because a module
    may import its neighbours later, inside a function.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


@contextmanager
def _explained(what: str, path: Path | None = None) -> Iterator[None]:
    """Turn any exception into a RequestError: what failed and how, and in which line of ``path``."""
    try:
        yield
    except (*foreign.STOPS, RequestError):
        raise
    except BaseException as error:
        raise RequestError(f"{what}: {foreign.described(error, path)}") from error


def _check_options(function: Callable[..., Any], name: str, options: dict[str, Any], where: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # compiled callables have no signature: the first call will show
    try:
        signature.bind([], [], **options)
    except TypeError as error:
        allowed = list(signature.parameters)[2:]
        wrong = [key for key in options if key not in signature.parameters]
        near = did_you_mean(wrong[0], allowed) if wrong else ""
        raise RequestError(
            f"{where}: {name} does not take (prompts, responses) with options {sorted(options)}: {error}; "
            f"its signature is {signature}{near}"
        ) from None


def _source(function: Callable[..., Any]) -> str:
    """Return the callable's own source text: scores of an edited function must not come from the store."""
    try:
        return inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return ""

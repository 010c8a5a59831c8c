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
        self._called = spec.function
        self._file = file = file_of(spec.function, base_dir)
        self._home = base_dir if file is None else file.parent
        with foreign.call(), _at_home(self._home):
            self.function = load_function(spec.function, base_dir, where)
            _check_options(self.function, spec.function, self.options, where)
            source = _source(self.function, spec.function) if file is None else fingerprint(file)
        name = spec.function if file is None else Path(spec.function).name  # a moved file is the same file
        self.revision = f"python:{name}:{digest(self.options, spec.revision, source)}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Sequence[float]:
        """Return what the callable gives, ``[samples]``; the panel checks length and values.

        Raises ScorerFault whatever the callable raises, a ``sys.exit()`` too.
        """
        with foreign.call(), _at_home(self._home):
            try:
                scores = np.asarray(self.function(list(prompts), list(responses), **self.options))
            except (*foreign.STOPS, RequestError):
                raise
            except BaseException as error:
                raise ScorerFault(f"{self._called} raised {foreign.described(error, self._file)}") from error
        return cast("Sequence[float]", scores)


def load_function(name: str, base_dir: Path, where: str) -> Callable[..., Any]:
    """Return the callable called ``file.py:callable`` or ``package.module:callable``, or the entry point of that name.

    A file is looked for in ``base_dir`` (the task card's folder), a module on the Python path.
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


_NEIGHBOURS: dict[Path, dict[str, Any]] = {}
"""What was imported from each task's folder: modules by name."""


@contextmanager
def _at_home(folder: Path) -> Iterator[None]:
    """Let what runs in the block import modules in ``folder``; others find theirs: each may have a ``lexicon.py``.

    The folder is last on the path, so that a file in it never hides an installed package. Where it is on the path
    already its modules are everybody's.
    """
    home = folder.resolve()
    if str(home) in sys.path:
        yield
        return
    mine, before = _NEIGHBOURS.setdefault(home, {}), set(sys.modules)
    for name, module in mine.items():
        sys.modules.setdefault(name, module)
    sys.path.append(str(home))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(home))
        for name in sorted(set(sys.modules) - before):
            top = name.partition(".")[0]
            if top in mine or _lies_in(home, top):
                mine[name] = sys.modules.pop(name)


def _lies_in(home: Path, name: str) -> bool:
    """Whether a module, or a package with or without ``__init__.py``, was imported from a folder."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    places = {Path(file)} if file else set(map(Path, getattr(module, "__path__", ())))
    return not places.isdisjoint({home / f"{name}.py", home / name / "__init__.py", home / name})


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


def _source(function: Callable[..., Any], name: str) -> str:
    """Return the callable's own source text, or its module's hash where it is more than a function: an instance, a
    ``functools.partial``. Scores of an edited function must not come from the store.
    """
    try:
        if inspect.isroutine(function):
            return inspect.getsource(function)
        points = {point.name: point.module for point in importlib.metadata.entry_points(group=GROUP)}
        found = importlib.util.find_spec(name.rpartition(":")[0] if ":" in name else points[name])
        return fingerprint(Path(str(found and found.origin)))
    except (OSError, TypeError, ValueError):
        return ""

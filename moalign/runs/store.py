"""The store of runs: ``<results>/runs/<task>/<method>/<run-id>/``.

A run's identifier is the hash of its request, so the same request finds its run again: finished, to be resumed, or
being trained by another process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError, did_you_mean
from moalign.core.preferences import Preference
from moalign.core.text import visible
from moalign.runs import atomic, environment
from moalign.runs import record as records
from moalign.runs.record import RunRecord, Status
from moalign.runs.run import Run

SETTINGS = ("config", "policy", "settings")
"""The parts of a recipe of which a request holds only what differs from the defaults."""

_LISTED = 8
"""Runs named in a message."""


def identity(request: Mapping[str, Any]) -> str:
    """Return 12 hex digits over ``request`` (JSON values): the same for any order of keys.

    Raises TypeError or ValueError for what JSON cannot hold (NaN, infinity, objects).
    """
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def results_of(run: Path, otherwise: Path) -> Path:
    """Return the results folder that a run's folder lies in (``<results>/runs/<task>/<method>/<run-id>``).

    The folder as it is named counts (a part of it may be a link to another disk); for a run that is a link, or is named
    from inside its results folder, the place where it really is. ``otherwise``: of one that lies in none, as a copy.
    """
    for named in (run, run.resolve()):
        if len(named.parents) > 3 and named.parents[2].name == RunStore.kind and not named.is_symlink():
            return named.parents[3]
    return otherwise


class RunStore:
    """All runs below a results folder."""

    kind = "runs"
    """The folder's name."""
    command = "moalign train METHOD"
    """What makes one."""

    def __init__(self, results: Path | str = "results") -> None:
        self.results = Path(results)
        self.root = self.results / self.kind
        self._warned: set[Path] = set()

    def folder(self, method: str, task: str, request: Mapping[str, Any]) -> Path:
        """Return the folder of the run that ``request`` asks for; it may not exist."""
        for kind, name in (("task", task), ("method", method)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise RequestError(f"{kind} {name!r}: letters, digits, '.', '_' and '-' only: it names a folder")
        return self.root / task / method / identity({**request, "method": method, "task": task})

    def lookup(
        self, method: str, task: str, request: Mapping[str, Any], recipe: Mapping[str, Any] | None = None
    ) -> Run | None:
        """Return the run that ``request`` asks for if it exists; nothing is written.

        Raises RequestError when its record is damaged, or holds other settings than ``recipe``: a request leaves out
        what is at its default, and a default has changed since.
        """
        folder = self.folder(method, task, request)
        if not folder.exists():
            return None
        run = Run.load(folder)
        changed = list(changes(settings_of(run.record.recipe), settings_of(atomic.plain(recipe or {}))))
        if changed:
            raise RequestError(
                f"{folder}: this run was made when other settings were the default ({', '.join(changed)}), so it is "
                "not the run asked for; move its folder away to train it again"
            )
        return run

    def open(
        self,
        method: str,
        task: str,
        request: Mapping[str, Any],
        *,
        card_hash: str,
        seed: int,
        preferences: Sequence[Preference] | None = None,
        recipe: Mapping[str, Any] | None = None,
        as_given: Mapping[str, Any] | None = None,
    ) -> Run:
        """Return the run that ``request`` asks for, created now (status ``running``) or loaded as it was left.

        The folder appears together with its record; of two processes that create it at once, one succeeds and the other
        loads it. Take :meth:`Run.lock` before writing.

        Raises:
            RequestError: the results folder is read-only, full or not a folder; or as in :meth:`lookup`.
        """
        existing = self.lookup(method, task, request, recipe)
        if existing is not None:
            return existing
        folder = self.folder(method, task, request)
        record = RunRecord(
            run_id=folder.name,
            method=method,
            task=task,
            card_hash=card_hash,
            seed=seed,
            preferences=None if preferences is None else list(preferences),
            identity=atomic.plain(request),
            recipe=atomic.plain(recipe or {}),
            as_given=atomic.plain(as_given or {}),
            created=records.now(),
            environment=environment.capture(),
            moalign_version=environment.version("moalign"),
        )
        # If another process made the same run just now, its record is as good.
        with contextlib.suppress(FileExistsError), atomic.directory(folder, replace=False) as temporary:
            (temporary / records.FILE).write_bytes(atomic.json_bytes(record.model_dump(), indent=2))
        return Run.load(folder)

    def runs(self, task: str | None = None, method: str | None = None, status: Status | None = None) -> list[Run]:
        """Return the runs, newest first, of one task, method or status if given.

        A run whose record is damaged or cannot be read is named once on stderr and left out.
        """
        matching = []
        for label in self._labels():
            of_task, of_method, _ = label.split("/")
            if task not in (None, of_task) or method not in (None, of_method):
                continue
            folder = self.root / label
            try:
                run = Run.load(folder)
            except RequestError as error:
                if folder not in self._warned:
                    self._warned.add(folder)
                    print(visible(f"warning: run left out: {error}"), file=sys.stderr)
                continue
            if status in (None, run.status):
                matching.append(run)
        return sorted(matching, key=lambda run: (run.record.created, run.run_id), reverse=True)

    def newest_finished(self, task: str | None = None, method: str | None = None) -> Run:
        """Return the run that finished last; RequestError when none is finished."""
        finished = self.runs(task, method, status="done")
        if not finished:
            which = "".join(f" {kind} {name}" for kind, name in (("task", task), ("method", method)) if name)
            raise RequestError(
                f"{self.root}: no finished run{' of' + which if which else ''}; "
                f"train one: moalign train {method or 'METHOD'}, or name another folder with --results DIR"
            )
        return max(finished, key=lambda run: (run.record.finished or run.record.created, run.run_id))

    def find(self, name: str) -> Run:
        """Return the run named by its folder, its identifier, or the beginning of it.

        ``method/id`` and ``task/method/id`` (again, a beginning of the identifier is enough) work too.

        Raises RequestError when no run or more than one fits, listing candidates.
        """
        path = Path(name)
        if path.name == records.FILE and records.is_run(path.parent):
            path = path.parent
        if name and records.is_run(path):
            return Run.load(path)
        if os.path.isdir(path) and (os.sep in name or name.startswith(".")):
            raise RequestError(f"{name}: not a run: this folder holds no {records.FILE}")
        labels = list(self._labels())
        fitting = [label for label in labels if _fits(label, name)]
        exact = [label for label in fitting if label.rpartition("/")[2] == name.rpartition("/")[2]]
        candidates = exact or fitting
        if len(candidates) == 1:
            return Run.load(self.root / candidates[0])
        if candidates:
            raise RequestError(
                f"run {name!r}: {len(candidates)} runs fit: {_listed(candidates)}; give more of the identifier"
            )
        if not labels:
            raise RequestError(
                f"unknown run {name!r}: there are no runs in {self.root}; "
                f"train one: {self.command}, or name another folder with --results DIR"
            )
        allowed = [label.rpartition("/")[2] for label in labels]
        if "/" in name:
            allowed = labels + [str(self.root / label) for label in labels]
        hint = did_you_mean(name, allowed)
        raise RequestError(f"unknown run {name!r}; runs in {self.root}: {_listed(labels)}{hint}")

    def _labels(self) -> Iterator[str]:
        """Yield ``task/method/run-id`` of every run in order of name; hidden folders are being written."""
        if self.results.exists() and not self.results.is_dir():
            raise RequestError(f"--results {self.results}: not a folder")
        for folder in sorted(self.root.glob("*/*/*")):
            label = folder.relative_to(self.root)
            if _is_folder(folder) and not any(part.startswith(".") for part in label.parts):
                yield label.as_posix()


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, or nobody may look at it: to read it then says so."""
    try:
        return path.is_dir()
    except OSError:
        return True


def _fits(label: str, name: str) -> bool:
    *parents, run_id = label.split("/")
    *above, start = name.rstrip("/").split("/")
    return bool(start) and run_id.startswith(start) and parents[len(parents) - len(above) :] == above


def _listed(labels: Sequence[str]) -> str:
    more = len(labels) - _LISTED
    return ", ".join(labels[:_LISTED]) + (f" and {more} more (moalign ls runs)" if more > 0 else "")


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the :data:`SETTINGS` of a recorded recipe, with the values that were the defaults when it was made."""
    return {key: recipe[key] for key in SETTINGS if key in recipe}


def changes(recorded: Any, requested: Any, name: str = "") -> Iterator[str]:
    """Yield the settings that differ; one that only one side has is newer or older than the run, and no change."""
    if isinstance(recorded, Mapping) and isinstance(requested, Mapping):
        for key, value in recorded.items():
            if key in requested:
                yield from changes(value, requested[key], f"{name}.{key}".lstrip("."))
    elif recorded != requested:
        yield f"{name}: {recorded} then, {requested} now"

"""The store of runs: ``<results>/runs/<task>/<method>/<run-id>/``.

A run's identifier is the hash of its request, so the same request finds its run again: finished, to be resumed, or
being trained by another process.
"""

from __future__ import annotations

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
from moalign.runs import atomic, environment
from moalign.runs import record as records
from moalign.runs.record import RunRecord, Status
from moalign.runs.run import Run

_LISTED = 8
"""Runs named in a message."""


def identity(request: Mapping[str, Any]) -> str:
    """Return 12 hex digits over ``request`` (JSON values): the same for any order of keys.

    Raises TypeError or ValueError for what JSON cannot hold (NaN, infinity, objects).
    """
    text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


class RunStore:
    """All runs below a results folder."""

    def __init__(self, results: Path | str = "results") -> None:
        self.results = Path(results)
        self.root = self.results / "runs"
        self._warned: set[Path] = set()

    def run_id(self, method: str, task: str, request: Mapping[str, Any]) -> str:
        """Return the identifier of the run that ``request`` asks for."""
        return identity({**request, "method": method, "task": task})

    def folder(self, method: str, task: str, request: Mapping[str, Any]) -> Path:
        """Return the folder of the run that ``request`` asks for; it may not exist."""
        for kind, name in (("task", task), ("method", method)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise RequestError(f"{kind} {name!r}: letters, digits, '.', '_' and '-' only: it names a folder")
        return self.root / task / method / self.run_id(method, task, request)

    def lookup(self, method: str, task: str, request: Mapping[str, Any]) -> Run | None:
        """Return the run that ``request`` asks for if it exists; nothing is written."""
        folder = self.folder(method, task, request)
        return Run.load(folder) if folder.exists() else None

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
            RequestError: the results folder is read-only, full or not a folder; or the existing record is damaged.
        """
        folder = self.folder(method, task, request)
        if not folder.exists():
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
            try:
                with atomic.directory(folder, replace=False) as temporary:
                    (temporary / records.FILE).write_bytes(atomic.json_bytes(record.model_dump(), indent=2))
            except FileExistsError:
                # Another process made the same run between the two lines above: its record is as good.
                return Run.load(folder)
        return Run.load(folder)

    def runs(self, task: str | None = None, method: str | None = None, status: Status | None = None) -> list[Run]:
        """Return the runs, newest first, of one task, method or status if given.

        A run whose record is damaged is named once on stderr and left out.
        """
        matching = []
        for folder in self._folders():
            if task not in (None, folder.parts[-3]) or method not in (None, folder.parts[-2]):
                continue
            try:
                run = Run.load(folder)
            except RequestError as error:
                self._warn(folder, str(error))
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
        if path.name == records.FILE and path.is_file():
            path = path.parent
        if name and (path / records.FILE).is_file():
            return Run.load(path)
        if path.is_dir() and (os.sep in name or name.startswith(".")):
            raise RequestError(f"{name}: not a run: this folder holds no {records.FILE}")
        folders = list(self._folders())
        fitting = [folder for folder in folders if self._fits(folder, name)]
        exact = [folder for folder in fitting if folder.name == name.rpartition("/")[2]]
        candidates = exact or fitting
        if len(candidates) == 1:
            return Run.load(candidates[0])
        if candidates:
            raise RequestError(
                f"run {name!r}: {len(candidates)} runs fit: {self._list(candidates)}; give more of the identifier"
            )
        raise self._unknown(name, folders)

    def _unknown(self, name: str, folders: Sequence[Path]) -> RequestError:
        if not folders:
            return RequestError(
                f"unknown run {name!r}: there are no runs in {self.root}; "
                "train one: moalign train METHOD, or name another folder with --results DIR"
            )
        allowed = [folder.name for folder in folders]
        if "/" in name:
            allowed = [self._label(folder) for folder in folders] + [str(folder) for folder in folders]
        listed = self._list(folders)
        return RequestError(f"unknown run {name!r}; runs in {self.root}: {listed}{did_you_mean(name, allowed)}")

    def _fits(self, folder: Path, name: str) -> bool:
        *above, last = name.rstrip("/").split("/")
        parts = folder.relative_to(self.root).parts
        return bool(last) and folder.name.startswith(last) and list(parts[:-1][len(parts) - 1 - len(above) :]) == above

    def _list(self, folders: Sequence[Path]) -> str:
        listed = ", ".join(self._label(folder) for folder in folders[:_LISTED])
        more = len(folders) - _LISTED
        return f"{listed} and {more} more (moalign ls runs)" if more > 0 else listed

    def _label(self, folder: Path) -> str:
        return folder.relative_to(self.root).as_posix()

    def _folders(self) -> Iterator[Path]:
        """Yield the run folders in order of name; hidden ones are being written."""
        if self.results.exists() and not self.results.is_dir():
            raise RequestError(f"--results {self.results}: not a folder")
        for folder in sorted(self.root.glob("*/*/*")):
            if folder.is_dir() and not any(part.startswith(".") for part in folder.relative_to(self.root).parts):
                yield folder

    def _warn(self, folder: Path, message: str) -> None:
        if folder not in self._warned:
            self._warned.add(folder)
            print(f"warning: run left out: {message}", file=sys.stderr)

"""The run record ``run.json``: what a run was, in enough detail to repeat it."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moalign.config.strict import faults
from moalign.core.errors import RequestError
from moalign.core.paths import shown
from moalign.core.preferences import Preference
from moalign.runs import atomic

FILE = "run.json"

Status = Literal["running", "done", "failed", "interrupted"]


class Cost(BaseModel):
    """What a run took, in the units that every comparison uses."""

    model_config = ConfigDict(extra="forbid")

    tokens_generated: int = Field(default=0, ge=0)
    tokens_trained: int = Field(default=0, ge=0)
    reward_calls: int = Field(default=0, ge=0)
    """Requested scores (responses x objectives), computed or read from the store."""
    peak_memory_bytes: int = Field(default=0, ge=0)


class RunRecord(BaseModel):
    """The content of ``run.json``."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    format: Literal[1] = 1
    """Version of this file's layout."""
    run_id: str
    method: str
    task: str
    card_hash: str
    seed: int
    preferences: list[Preference] | None = None
    """``--prefs``, or None for the task's own."""
    identity: dict[str, Any] = Field(default_factory=dict)
    """What ``run_id`` is the hash of: two requests with the same identity are the same run."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The recipe as resolved: every default and override filled in."""
    as_given: dict[str, Any] = Field(default_factory=dict)
    """The recipe and overrides as the user wrote them."""
    status: Status = "running"
    created: datetime
    finished: datetime | None = None
    seconds: float = Field(default=0.0, ge=0)
    """Wall-clock time of the work that is in the result, over all resumes."""
    cost: Cost = Field(default_factory=Cost)
    phases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Finished phases of training, with the small results of each."""
    weights: dict[str, str] = Field(default_factory=dict)
    """SHA-256 of every final weight file, by its path in the folder; empty in records of older versions."""
    notes: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    moalign_version: str | None = None

    def write(self, folder: Path) -> None:
        """Write ``folder/run.json`` atomically."""
        atomic.write_json(folder / FILE, self.model_dump())


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a record; RequestError where the system does not let anyone look."""
    path = folder / FILE
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name that no file can have
        return False
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return error.errno == errno.ELOOP  # a link to itself is there, and says more when it is read
        raise RequestError(f"{path}: cannot be read: {error.strerror}; make the run's folder readable") from error
    return True


def read(folder: Path) -> RunRecord:
    """Read ``folder/run.json``.

    Raises RequestError naming the file (and line or key) when it is missing, unreadable, not JSON or not a record.
    """
    path, remedy = folder / FILE, "move the run's folder away to train it again"
    if not is_run(folder):
        raise RequestError(f"{folder}: not a run: it holds no {FILE}; {remedy}")
    try:
        return RunRecord.model_validate(atomic.read_json(path, remedy))
    except ValidationError as error:
        wrong = "; ".join(faults(error))
        if any(fault["type"] == "extra_forbidden" for fault in error.errors()):
            remedy = f"if a newer moalign wrote it, update moalign; else {remedy}"
        raise RequestError(f"{path}: not a run record of this moalign: {wrong}; {remedy}") from error


def again(as_given: Mapping[str, Any], seed: int, prefs: Sequence[Preference] | None, results: Path) -> list[str]:
    """Return the ``moalign`` arguments that ask for a run again."""
    from moalign.config import find

    method, task = str(as_given["method"]), str(as_given["task"])
    parts = ["train", method, "--task", task]
    recipe = as_given.get("recipe_file")
    default = None
    with contextlib.suppress(RequestError):  # the task was moved since, so the recipe has to be named
        default = find.find_recipe_file(task, method)
    if recipe is not None and (default is None or recipe != shown(default)):
        parts += ["--recipe", str(recipe)]
    own = (as_given.get("recipe") or {}).get("prefs")
    if prefs and [list(row) for row in prefs] != own:
        parts += [part for row in prefs for part in ("--prefs", ",".join(map(repr, row)))]
    parts += [part for text in as_given.get("set") or [] for part in ("--set", str(text))]
    return [*parts, "--seed", str(seed), "--results", str(results)]


def now() -> datetime:
    """Return the current time, in UTC."""
    return datetime.now(UTC)

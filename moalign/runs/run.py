"""One run on disk: its record, lock, metrics, phases, checkpoints, tables and tensors."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from moalign.core.errors import MoalignError, RequestError, WorkError
from moalign.core.text import command as typed
from moalign.runs import atomic, checkpoint, environment
from moalign.runs import record as records
from moalign.runs.checkpoint import Checkpoint
from moalign.runs.meter import Meter
from moalign.runs.record import Cost, RunRecord, Status

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from moalign.runs.trackers import Mirrors

METRICS = "metrics.jsonl"
LOCK = ".lock"
OWNER = ".owner.json"
_ALWAYS = {records.FILE, LOCK, OWNER}
"""What lies in the folder of a run that has not begun."""
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
"""Inside a run; also the key of ``job.notes`` under which the steps of each part stand, in the order of training."""
STAGES = "stages"
"""Folder of the weights that a finished stage ended with, from which an interrupted training goes on."""

REMEDY = "move the run's folder away to train it again"
"""What to do about a damaged part of a run, unless its reader knows better."""

_POLL = 0.5
"""Seconds between two looks at a lock that is waited for."""
_GRACE = 0.5
"""Seconds to wait for the lock: a look at it (``ls runs``) holds it for an instant."""


class Run:
    """A run's folder. Only the holder of :meth:`lock` may write; anyone may read at any time."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self.path = path
        self.record = record
        self.mirrors: Mirrors | None = None
        """Trackers that receive every line of metrics while the run trains."""
        self._mended = False
        self._held: int | None = None
        """The folder, open while it is locked: so that it can be told from another that takes its place."""

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read the run in the folder ``path``; RequestError when there is none or its record is damaged."""
        return cls(path, records.read(path))

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.record.status})"

    # -- record ------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str:
        """The run's identifier: the hash of its request, 12 hex digits."""
        return self.record.run_id

    @property
    def status(self) -> Status:
        """The record's status; ``interrupted`` when it says running but no process holds the lock."""
        if self.record.status == "running" and not self.is_locked():
            return "interrupted"
        return self.record.status

    def save_record(self) -> None:
        """Write ``run.json`` atomically."""
        self._require_kept()
        self.record.write(self.path)

    def mark(self, status: Status, error: str | None = None, meter: Meter | None = None) -> None:
        """Set the status and save the record; with a meter also the cost so far, and the environment as it is now.

        The environment is captured again because torch, which knows the GPUs, is loaded after the record is first
        written.
        """
        self.record.status = status
        self.record.error = error
        self.record.finished = None if status == "running" else records.now()
        if meter is not None:
            self.record.cost = Cost(**meter.cost())
            self.record.seconds = meter.seconds
            self.record.environment = environment.capture()
        self.save_record()

    # -- lock --------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, wait: bool = False) -> Iterator[Run]:
        """Hold the run for writing; ``wait`` until another process that holds it is done.

        The record is read again once the lock is held, since another process may have finished the run meanwhile;
        leftovers of killed writers are removed. The lock is the system's: it dies with its process.

        Raises RequestError naming the other process when it is held (unless ``wait``).
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / LOCK)
        with atomic.refusals(self.path):
            try:
                lock.acquire(timeout=-1 if wait else _GRACE, poll_interval=_POLL if wait else 0.02)
                self._held = os.open(self.path, os.O_RDONLY)
            except Timeout:
                raise RequestError(self.busy()) from None
            except FileNotFoundError:
                lock.release()
                raise RequestError(
                    f"{self.path}: the run is gone: the process that this one waited for was refused (its own message "
                    "says why) and kept nothing, or somebody removed the folder; repeat the command"
                ) from None
        owner = self.path / OWNER
        try:
            atomic.write_json(owner, {"pid": os.getpid(), "host": platform.node(), "since": records.now()})
            atomic.sweep(self.path)
            self.record = records.read(self.path)
            self._mended = False
            yield self
        finally:
            with contextlib.suppress(OSError):
                owner.unlink()
            lock.release()
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def _require_kept(self) -> None:
        """Raise WorkError when the locked folder was removed: to write into its place would make half a run of it."""
        if self._held is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._held), os.stat(self.path)):
                return
        raise WorkError(
            f"{self.path}: the run's folder was removed or moved while the run was trained; put it back to go on from "
            "the last checkpoint, or repeat the command to train it from the start"
        )

    @contextlib.contextmanager
    def training(self, wait: bool = False) -> Iterator[Meter | None]:
        """Hold the run while it is trained; yields its meter, or None when it is done already.

        It is ``done`` when the block ends well; else ``failed`` with the error, or ``interrupted``, and its checkpoints
        stay for the next attempt. A request refused before anything was written leaves no run. Raises what
        :meth:`lock` raises.
        """
        with self.lock(wait):
            if self.record.status == "done":
                yield None
                return
            self.mark("running")
            meter = Meter()
            try:
                yield meter
            except KeyboardInterrupt:
                with contextlib.suppress(MoalignError):  # of a folder that is gone or full: the interruption counts
                    self.mark("interrupted")
                raise
            except BaseException as error:
                if isinstance(error, RequestError) and self._is_bare():
                    atomic.remove_directory(self.path)
                else:
                    self.mark("failed", error=f"{type(error).__name__}: {error}")
                raise
            self.record.weights = self._weight_sums()
            self.mark("done", meter=meter)
            self.drop_checkpoints()

    def _is_bare(self) -> bool:
        """Whether nothing was computed yet: no file beside the record, and no phase or note (a judge's costs) in it."""
        there = {path.name for path in self.path.glob("*")}
        return there <= _ALWAYS and not self.record.phases and not self.record.notes

    def drop_leftovers(self) -> None:
        """Remove the checkpoints of a run that is done, whose process was killed before it did; if that can be."""
        if (self.path / CHECKPOINTS).is_dir():
            with contextlib.suppress(MoalignError), self.lock():
                if self.record.status == "done":
                    self.drop_checkpoints()

    def is_locked(self) -> bool:
        """Whether any process is writing this run now. Works without write permission.

        A lock that may not be read counts as held: its owner may be at work.
        """
        import fcntl

        try:
            descriptor = os.open(self.path / LOCK, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            return isinstance(error, PermissionError)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.ENOSYS:  # no flock here: the file's existence is the lock
                owner = self._owner()
                return owner is None or owner["host"] != platform.node() or atomic.alive(owner["pid"])
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOLCK):  # the last: not known
                return True
            raise
        finally:
            os.close(descriptor)
        return False

    def require_done(self) -> None:
        """Raise RequestError when the run is not finished."""
        if self.status != "done":
            raise RequestError(
                f"run {self.path}: it is {self.status}, not done; finish it with the same train command first"
            )

    def busy(self) -> str:
        """Return which other process trains this run, and what to do about it."""
        owner = self._owner()
        who = "another process"
        if owner is not None:
            who += f" (pid {owner['pid']} on {owner['host']}, since {owner['since'][:19]} UTC)"
        return f"{self.path}: {who} is training this run; wait for it or stop it, then repeat the command"

    def _owner(self) -> dict[str, Any] | None:
        """Return pid, host and since of who holds the lock, or did last; None while it has not written its name yet."""
        try:
            owner = atomic.parsed_json((self.path / OWNER).read_bytes())
            return {"pid": int(owner["pid"]), "host": str(owner["host"]), "since": str(owner["since"])}
        except (OSError, ValueError, LookupError, TypeError):
            return None

    # -- metrics -----------------------------------------------------------------------------------

    def log(self, step: int, phase: str = "train", **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``: step, phase and the metrics (NaN and infinity become null)."""
        self._require_kept()
        line = atomic.json_bytes({"step": step, "phase": phase, **metrics})
        path = self.path / METRICS
        if not self._mended:
            self._mend_tail()
        with atomic.refusals(self.path), open(path, "ab", buffering=0) as stream:
            end = stream.seek(0, os.SEEK_END)
            try:
                written = stream.write(line)
                if written != len(line):  # the disk took only a part
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                stream.truncate(end)
                raise
        if self.mirrors is not None:
            self.mirrors.log(step, phase, metrics)

    def metrics(self) -> list[dict[str, Any]]:
        """Return all lines of ``metrics.jsonl``; a half-written last line (after a kill) is passed over.

        Raises RequestError naming file and line when a line in the middle is damaged.
        """
        return [entry for _, entry in self._metric_lines()]

    def truncate_metrics(self, phase: str, step: int) -> None:
        """Drop the lines of ``phase`` after ``step``: a resume from the checkpoint of ``step`` writes them again."""
        lines = self._metric_lines()
        remaining = [raw for raw, entry in lines if entry.get("phase") != phase or entry["step"] <= step]
        path = self.path / METRICS
        content = b"".join(raw + b"\n" for raw in remaining)
        if path.exists() and path.read_bytes() != content:
            atomic.write_bytes(path, content)
        self._mended = True

    def _mend_tail(self) -> None:
        """Make the file end with a newline, so that a new line is not glued to a half one; no other line is read."""
        path = self.path / METRICS
        content = path.read_bytes() if path.exists() else b""
        last = content.rpartition(b"\n")[2]
        if last:
            with atomic.refusals(self.path), open(path, "r+b") as stream:
                if _metric(last) is None:
                    stream.truncate(len(content) - len(last))
                else:
                    stream.seek(0, os.SEEK_END)
                    stream.write(b"\n")
        self._mended = True

    def _metric_lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        path = self.path / METRICS
        if not os.path.exists(path):
            return []
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise RequestError(f"{path}: cannot be read: {error.strerror}; remove it, or make it readable") from error
        entries = []
        for number, raw in enumerate(lines, start=1):
            entry = _metric(raw)
            if entry is not None:
                entries.append((raw, entry))
            elif number < len(lines):  # the last is empty, unless a kill cut its line
                raise RequestError(f"{path}:{number}: damaged line {raw[:60]!r}; delete it")
        return entries

    # -- phases and checkpoints ----------------------------------------------------------------------

    def phase_done(self, name: str) -> bool:
        """Whether the phase was finished, by this process or an earlier one."""
        return name in self.record.phases

    def phase_info(self, name: str) -> dict[str, Any]:
        """What :meth:`finish_phase` was given for a finished phase, and its time under ``finished``."""
        return self.record.phases[name]

    def finish_phase(self, name: str, **info: Any) -> None:
        """Record that a phase is done, with small results. Call it after the phase's files are written."""
        entry = {"finished": records.now(), **info}
        self.record.phases = {**self.record.phases, name: atomic.plain(entry)}
        self.save_record()

    def checkpoint_dir(self, phase: str) -> Path:
        """The folder of the phase's checkpoints (it may not exist yet); ValueError for what is no folder's name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._,+=-]*", phase):
            raise ValueError(f"a phase's name must do as a folder's name; found {phase!r}")
        return self.path / CHECKPOINTS / phase

    def save_checkpoint(
        self, phase: str, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
    ) -> None:
        """Save where ``phase`` stands after ``step`` steps; see :func:`moalign.runs.checkpoint.save`."""
        self._require_kept()
        checkpoint.save(self.checkpoint_dir(phase), step, tensors, state)

    def load_checkpoint(self, phase: str) -> Checkpoint | None:
        """Return the newest undamaged checkpoint (step, tensors, state) of ``phase``, or None."""
        return checkpoint.load(self.checkpoint_dir(phase))

    def drop_checkpoints(self, phase: str | None = None) -> None:
        """Remove every checkpoint (the run is finished), or those of a finished phase and of its parts ``phase-*``."""
        if phase is None:
            atomic.remove_directory(self.path / CHECKPOINTS)
            return
        place = self.checkpoint_dir(phase)
        for folder in [place, *place.parent.glob(f"{phase}-*")]:
            atomic.remove_directory(folder)

    # -- final weights ------------------------------------------------------------------------------

    def require_weights(self) -> None:
        """Raise RequestError for a final weight file that is missing, or whose content is not what training wrote.

        Snapshots that are missing are left to whoever reads them, and records of older versions hold no sums.
        """
        for name, known in self.record.weights.items():
            path, folder = self.path / name, Path(name).parts[0]
            there = path.is_file()
            if not there and folder == SNAPSHOTS:
                continue
            if not there or checkpoint.file_sum(path) != known:
                command, given = "the command that made it", self.record.as_given
                if given.keys() >= {"method", "task"}:
                    from moalign.runs.store import results_of

                    results = results_of(self.path, Path("results"))
                    words = records.again(given, self.record.seed, self.record.preferences, results)
                    command = typed(*words)
                if not there:  # as of every restored run of a published comparison
                    raise RequestError(
                        f"run {self.path}: {folder} is missing, so that it can be compared but gives no new answers; "
                        f"delete the run and train it again: {command}"
                    )
                raise RequestError(
                    f"damaged: {path}: its content is not what training wrote; delete {self.path} and train again: "
                    f"{command}"
                )

    def _weight_sums(self) -> dict[str, str]:
        """Return the SHA-256 of every weight file by its path in the run, but for what training alone goes on from."""
        files = {path.relative_to(self.path): path for path in sorted(self.path.rglob("*.safetensors"))}
        return {
            name.as_posix(): checkpoint.file_sum(path)
            for name, path in files.items()
            if name.parts[0] not in (CHECKPOINTS, STAGES)
        }

    # -- tables and tensors --------------------------------------------------------------------------

    def write_table(self, name: str, table: pd.DataFrame) -> Path:
        """Write ``<name>.parquet`` atomically, without the index; return its path."""
        path = self._named(name, ".parquet")
        self._require_kept()
        with atomic.file(path) as temporary:
            table.to_parquet(temporary, index=False)
        return path

    def read_table(self, name: str, remedy: str = REMEDY) -> pd.DataFrame:
        """Read ``<name>.parquet``; RequestError, with the remedy, when it is missing or damaged."""
        path = self._named(name, ".parquet")
        if not path.is_file():
            raise RequestError(f"{path}: no such table in this run; {remedy}")
        return read_parquet(path, f"; {remedy}")

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Path:
        """Write ``<name>.safetensors`` atomically; return its path."""
        path = self._named(name, ".safetensors")
        self._require_kept()
        checkpoint.save_tensors(path, tensors)
        return path

    def load_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read ``<name>.safetensors`` onto the CPU; RequestError when it is missing or truncated."""
        return checkpoint.load_tensors(self._named(name, ".safetensors"))

    def folder(self, name: str) -> Path:
        """Return where a folder of the run is to be written; WorkError when the locked run was removed meanwhile."""
        self._require_kept()
        return self._named(name, "")

    def _named(self, name: str, suffix: str) -> Path:
        inside = PurePosixPath(name if name.endswith(suffix) else name + suffix)
        if inside.is_absolute() or ".." in inside.parts:
            raise ValueError(f"a file of a run lies in its folder; found {name!r}")
        return self.path / inside


def read_parquet(path: Path, remedy: str = "") -> pd.DataFrame:
    """Read a parquet file; RequestError, with the remedy, when it is damaged."""
    import pandas as pd
    import pyarrow as pa

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RequestError(f"{path}: truncated, or not a parquet file ({error}){remedy}") from error


def _metric(raw: bytes) -> dict[str, Any] | None:
    """Return the line's content, or None when the line is incomplete."""
    try:
        entry = atomic.parsed_json(raw)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None

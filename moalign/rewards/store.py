"""The score store: one sqlite file, so that no text is scored twice by the same revision of a scorer.

Write-ahead logging keeps every committed score when a process is killed, and lets several processes read
and write at once. The key is a hash over (scorer revision, prompt, response); the value is the raw score.
Write-ahead logging needs a local disk: do not put the file on a network share.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from moalign.core.errors import RequestError, WorkError
from moalign.runs.atomic import read_only, require_writable

APPLICATION_ID = 0x6D6F616C
"""Marks the sqlite file as a score store (``moal``), so that another program's database is never written to."""

_TABLE = "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID"
_CHUNK = 500


def key_of(revision: str, prompt: str, response: str) -> bytes:
    """Return the 32-byte key of one score. Parts are length-prefixed: ("ab", "c") differs from ("a", "bc")."""
    digest = hashlib.sha256()
    for part in (revision, prompt, response):
        # Lone surrogates occur in sampled text; they must be hashed, not refused.
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.digest()


class Store:
    """Scores by (scorer revision, prompt, response). Use as a context manager or call :meth:`close`."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        """Open the file; ``timeout``: seconds to wait for other processes' writes.

        Where there is none, it and its folder are made with the first score that is kept: a command that is refused
        leaves nothing behind. In a folder that is read-only what is there is read, and no score is kept.

        Raises RequestError when the file is damaged or not a score store, or its folder cannot be made.
        """
        self.path = Path(path)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._read_only = read_only(self.path.parent)
        self._missing = not self._read_only and not self.path.exists()
        """No process has kept a score yet: an empty store in memory stands for the file."""
        if self._missing:
            require_writable(self.path.parent)
        with self._explained():
            in_place = not (self._read_only or self._missing)
            self._connection = self._opened_to_write() if in_place else self._opened_to_read()

    def _opened_to_write(self) -> sqlite3.Connection:
        """Open the store, made now where it is missing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = self._connected(str(self.path))
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected(self, name: str) -> sqlite3.Connection:
        # isolation_level None: transactions begin and end where the code says so.
        return sqlite3.connect(
            name, self._timeout, isolation_level=None, check_same_thread=False, uri=name.startswith("file:")
        )

    def _opened_to_read(self) -> sqlite3.Connection:
        """Open the store without writing; one in memory, without a score, where there is none."""
        if self.path.is_file():
            place = self.path.absolute().as_uri()
            # Immutable is right, and works, only while no other process has the file open: sqlite then keeps files of
            # its own beside it, with which it can be read as usual.
            for way in ("mode=ro", "mode=ro&immutable=1"):
                connection = self._connected(f"{place}?{way}")
                try:
                    self._check(connection)
                    return connection
                except sqlite3.OperationalError:
                    connection.close()
        connection = self._connected(":memory:")
        connection.execute(_TABLE)
        return connection

    def get_many(self, revision: str, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Return the stored score of each (prompt, response), None where there is none; ``[pairs]``."""
        keys = [key_of(revision, *pair) for pair in pairs]
        scores: dict[bytes, float] = {}
        with self._using() as connection:
            for start in range(0, len(keys), _CHUNK):
                part = keys[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                scores.update(connection.execute(f"SELECT key, value FROM scores WHERE key IN ({marks})", part))
        return [scores.get(key) for key in keys]

    def put_many(self, revision: str, pairs: Sequence[tuple[str, str]], values: Sequence[float]) -> None:
        """Store scores in one transaction each 500; a score that is there already is left as it is.

        Raises WorkError for a value that is not finite or a file that stays locked by other processes, RequestError
        when the disk is full or read-only.
        """
        rows = [(key_of(revision, *pair), float(value)) for pair, value in zip(pairs, values, strict=True)]
        if not all(math.isfinite(value) for _, value in rows):
            raise WorkError(f"{self.path}: a score that is not finite cannot be stored")
        if self._read_only:
            return
        with self._using(to_write=bool(rows)) as connection:
            for start in range(0, len(rows), _CHUNK):
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", rows[start : start + _CHUNK])

    def __len__(self) -> int:
        """Return the number of stored scores."""
        with self._using() as connection:
            count: int = connection.execute("SELECT COUNT(*) FROM scores").fetchone()[0]
        return count

    def close(self) -> None:
        """Close the file; using the store afterwards raises ValueError."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        """Return the open store."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _check(self, connection: sqlite3.Connection) -> int:
        """Return the file's mark, 0 for a new file; RequestError for another program's."""
        # Tables before mark: another process may be creating both, in one transaction, at this moment.
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        marked = connection.execute("PRAGMA application_id").fetchone()[0]
        if marked != APPLICATION_ID and (marked or tables):
            raise RequestError(
                f"{self.path}: an sqlite file, but not a moalign score store; it was left as it is; name another file"
            )
        return int(marked)

    def _set_up(self, connection: sqlite3.Connection) -> None:
        marked = self._check(connection)
        # Switching a fresh file to write-ahead logging takes an exclusive lock for which sqlite does not
        # always wait, so that two processes that create the file at once would fail without this.
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                if marked != APPLICATION_ID:
                    with connection:
                        connection.execute("BEGIN IMMEDIATE")
                        connection.execute(_TABLE)
                        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("SELECT key, value FROM scores LIMIT 1").fetchone()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn errors of sqlite and the file system into messages with a remedy."""
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            path = self.path
            text = (isinstance(error, OSError) and error.strerror) or str(error)  # str(OSError) names the path, too
            broken = any(words in text for words in ("no such table", "no such column", "malformed"))
            if broken or not isinstance(error, sqlite3.OperationalError | OSError):
                raise RequestError(
                    f"{path}: the score store is damaged ({text}); delete or move that file (and {path.name}-wal, "
                    f"{path.name}-shm beside it): its scores are then made again"
                ) from error
            if "locked" in text:
                raise WorkError(
                    f"{path}: other processes kept the score store locked ({text}); run the command again"
                ) from error
            raise RequestError(
                f"{path}: the score store cannot be written ({text}); free space or make {path.parent} writable, or "
                "choose another folder with --results DIR"
            ) from error

    @contextmanager
    def _using(self, to_write: bool = False) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread at a time."""
        with self._lock, self._explained():
            if self._connection is None:
                raise ValueError(f"the score store {self.path} is closed")
            if self._missing and (to_write or self.path.exists()):
                opened = self._opened_to_write()
                self._connection.close()
                self._connection, self._missing = opened, False
            yield self._connection

"""Atomic writes: files and folders appear complete or not at all.

Everything is written under a hidden name beside its target, flushed to the disk and renamed into place: a reader, and a
process that continues after ``kill -9``, sees the old content or the new one. A folder that cannot be written
(read-only, full, over quota) is the request's fault: RequestError naming the folder and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError

REMEDY = "free or unlock it, or choose another folder with --results DIR"

_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR}
_REFUSALS |= {errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOLCK}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
MOST_LEVELS = 100
"""Lists and objects inside each other in a JSON file that is read."""
_ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a leftover of another machine is taken for abandoned."""


@contextlib.contextmanager
def refusals(folder: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a refused write below ``folder`` into a RequestError; other errors pass, and those about other files."""
    try:
        yield
    except Exception as error:
        code = _errno(error)
        if code not in _REFUSALS or not _concerns(error, folder):
            raise
        raise RequestError(f"{folder}: cannot write here: {os.strerror(code)}; {remedy}") from error


def _errno(error: Exception) -> int:
    """Return the number of a system's error, else 0."""
    if type(error).__module__.split(".")[0] == "safetensors":
        # safetensors reports a full disk as its own error, with the number only in the text.
        match = re.search(r"\(os error (\d+)\)", str(error))
        return int(match[1]) if match else 0
    return (error.errno or 0) if isinstance(error, OSError) else 0


def _concerns(error: Exception, folder: Path) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike):
        return True
    path, ours = Path(os.path.realpath(name)), Path(os.path.realpath(folder))
    return path.is_relative_to(ours) or ours.is_relative_to(path)


def require_writable(folder: Path, remedy: str = REMEDY) -> None:
    """Raise RequestError for a folder that cannot be made or written, before hours are spent on what goes there."""
    existing = _nearest(folder)
    if not existing.is_dir():
        raise RequestError(f"{folder}: cannot write here: {existing} is not a folder; {remedy}")
    with refusals(existing, remedy), tempfile.TemporaryFile(dir=existing) as probe:
        probe.write(b"\0" * 65536)


def require_new(path: Path) -> None:
    """Raise RequestError where a file cannot be written, or something that is no file is in its place."""
    require_writable(path.parent)
    if os.path.lexists(path) and not path.is_file():
        raise RequestError(f"{path}: exists and is not a regular file; remove it, or move it away")


def read_only(folder: Path) -> bool:
    """Whether a folder may not be written, or not be made: its permissions or its file system forbid it."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(folder)):
            return False
    except OSError as error:
        return error.errno in _READ_ONLY


def _nearest(folder: Path) -> Path:
    """Return the folder, or what exists of the path above it."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


# -- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def file(path: Path | str, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` when the block ends well.

    The temporary name keeps the suffix (libraries choose a format by it). On any exception the temporary file is
    removed and ``path`` stays as it was. Missing parent folders are made.

    Raises:
        RequestError: the folder is read-only, full, or not a folder; or ``path`` is no regular file.
    """
    with _temporary(path, Path.is_file, "regular file", remedy) as (target, temporary):
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def directory(path: Path | str, *, replace: bool = True, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` when the block ends well.

    An old folder of that name is replaced. With ``replace=False`` an existing one is left alone and FileExistsError is
    raised: of several processes making the same folder exactly one succeeds. A kill between the two renames of a
    replacement leaves the old folder under a hidden name, which :func:`sweep` puts back.
    """
    with _temporary(path, Path.is_dir, "folder", remedy) as (target, temporary):
        temporary.mkdir()
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _sync(written)
        _swap_in(temporary, target, replace)


@contextlib.contextmanager
def filled(folder: Path, last: str, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary folder; what is in it when the block ends well becomes the content of a new or empty one.

    An empty folder stays the folder it is: somebody may stand in it, and a mounted one cannot be replaced. What names
    the other files, ``last``, comes last. Raises RequestError as :func:`directory` does.
    """
    if not folder.is_dir():
        with directory(folder, remedy=remedy) as temporary:
            yield temporary
        return
    with refusals(folder, remedy):
        temporary = _beside(folder / "content", "tmp")
        temporary.mkdir()
        try:
            yield temporary
            for written in temporary.rglob("*"):
                _sync(written)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == last):
                path.rename(folder / path.name)
            _sync(folder)
        finally:
            _remove(temporary)


def is_free(folder: Path) -> bool:
    """Whether a folder is empty, but for what a killed writer of its content left there, which is removed."""
    with contextlib.suppress(OSError):  # of another user: then it is not empty
        for leftover in filter(_abandoned, folder.glob(".tmp-*")):
            _remove(leftover)
    return not any(folder.iterdir())


@contextlib.contextmanager
def _temporary(path: Path | str, fits: Callable[[Path], bool], noun: str, remedy: str) -> Iterator[tuple[Path, Path]]:
    """Yield the real path to write and a hidden name beside it, which is removed on any exception.

    What writers of the same path that were killed left beside it is removed, too.
    """
    target = Path(os.path.realpath(path))  # a link is written through, as open() would
    shown = Path(path).parent
    with refusals(shown, remedy):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise RequestError(f"{shown}: cannot write here: not a folder; {remedy}") from None
        if target.exists() and not fits(target):
            raise RequestError(f"{path}: exists and is not a {noun}; choose another name")
        _remove_leftovers(target, "tmp")
        temporary = _beside(target, "tmp")
        try:
            yield target, temporary
        except BaseException:
            _remove(temporary)
            raise


def _swap_in(temporary: Path, target: Path, replace: bool) -> None:
    if not replace:
        try:
            os.rename(temporary, target)  # refused by the system when target has content
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise
        _sync(target.parent)
        return
    old = _beside(target, "old") if target.exists() else None
    if old is not None:
        os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        if old is not None:
            os.rename(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old)
    _remove_leftovers(target, "old")


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    if not (path.is_file() or path.is_dir()):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot flush a folder; what was renamed there is renamed.
        if path.is_file() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, data: bytes, remedy: str = REMEDY) -> None:
    """Write ``data`` to ``path`` atomically."""
    with file(path, remedy) as temporary, open(temporary, "xb") as stream:
        stream.write(data)


def write_text(path: Path | str, text: str, remedy: str = REMEDY) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"), remedy)


# -- JSON ------------------------------------------------------------------------------------------------------------


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON (see :func:`plain`) to ``path`` atomically."""
    write_bytes(path, json_bytes(value, indent=2))


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file; RequestError naming file and line when it cannot be read, with the remedy."""
    try:
        return parsed_json(path.read_bytes())
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: not JSON ({error.msg}); {remedy}") from error
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise RequestError(f"{path}: cannot be read: {why}; {remedy}") from error


def parsed_json(text: str | bytes) -> Any:
    """Return what JSON text (bytes: UTF-8) says.

    Raises ValueError for all that is wrong with it: no JSON, no UTF-8, a number too long, or values nested deeper than
    :data:`MOST_LEVELS`, which nothing could walk through or write again.
    """
    try:
        content = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [content]
    for _ in range(MOST_LEVELS):
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
    if level:
        raise ValueError("nested too deeply")
    return content


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Return ``value`` as UTF-8 JSON with a final newline."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate becomes \udXXX, which inside a JSON string is its escape: it reads back the same.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def plain(value: Any) -> Any:
    """Return ``value`` made of JSON's types only.

    NaN and infinity become null (JSON has neither), arrays, tensors and numpy numbers become lists and numbers, times
    ISO text. Raises TypeError for anything else.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for method in ("tolist", "model_dump"):  # numpy and torch; pydantic
        if hasattr(value, method):
            return plain(getattr(value, method)())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


# -- removing --------------------------------------------------------------------------------------------------------


def remove_directory(path: Path) -> None:
    """Remove a folder so that nobody sees half of it; nothing happens when it does not exist."""
    if path.exists():
        with refusals(path.parent):
            hidden = _beside(path, "tmp")
            os.rename(path, hidden)
            shutil.rmtree(hidden)


def sweep(folder: Path) -> None:
    """Remove what killed writers left below ``folder``, and put back a folder caught mid-replacement.

    A leftover counts as abandoned when its process is gone, or (written on another machine) after a day.
    """
    with refusals(folder):
        # What lies inside another leftover first, before that moves; of two for one target the newer is put back.
        leftovers = [(len(old.parts), old.stat().st_mtime, old) for old in folder.rglob(".old-*") if _abandoned(old)]
        for *_, old in sorted(leftovers, reverse=True):
            target = old.with_name(old.name.split("-", 4)[-1])
            if target.exists():
                _remove(old)
            else:
                os.rename(old, target)
        for temporary in sorted(folder.rglob(".tmp-*")):
            if _abandoned(temporary):
                _remove(temporary)


def _remove_leftovers(target: Path, kind: str) -> None:
    """Remove what killed writers of ``target`` left beside it; another process may be doing the same."""
    for path in target.parent.glob(f".{kind}-*-{glob.escape(target.name)}"):
        with contextlib.suppress(FileNotFoundError):
            if path.name.split("-", 4)[-1] == target.name and _abandoned(path):
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _beside(target: Path, kind: str) -> Path:
    """Return a new hidden name beside ``target`` that says which process on which machine made it."""
    return target.with_name(f".{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{target.name}")


def _abandoned(path: Path) -> bool:
    parts = path.name.split("-", 4)
    if len(parts) != 5 or not parts[2].isdecimal() or not path.exists():
        return False  # not one of ours, or gone with the folder it was in
    if parts[1] == _host() and not alive(int(parts[2])):
        return True
    return time.time() - path.stat().st_mtime > _ABANDONED_AFTER


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it exists and belongs to someone else
    return True

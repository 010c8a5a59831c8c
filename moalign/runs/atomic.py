"""Atomic writes: files and folders appear complete or not at all.

Everything is written under a hidden name beside its target, flushed to the disk and renamed into
place: a reader, and a process that continues after ``kill -9``, sees the old content or the new one.
A folder that cannot be written (read-only, full, over quota) is the request's fault: RequestError
naming the folder and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from moalign.core.errors import RequestError

REMEDY = "free or unlock it, or choose another folder with --results DIR"

_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}
_ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a leftover of another machine is taken for abandoned."""


@contextlib.contextmanager
def refusals(folder: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a refused write below ``folder`` into a RequestError; other errors pass unchanged.

    Errors about files elsewhere (a missing input, say) are not ours and pass too.
    """
    try:
        yield
    except Exception as error:
        code = _refusal(error)
        if code is None or not _concerns(error, folder):
            raise
        raise RequestError(f"{folder}: cannot write here: {os.strerror(code)}; {remedy}") from error


def _refusal(error: Exception) -> int | None:
    """Return the error number when the system refused the write, else None."""
    code: int | None = None
    if isinstance(error, OSError):
        code = error.errno
    elif type(error).__module__.split(".")[0] == "safetensors":
        # safetensors reports a full disk as its own error, with the number only in the text.
        match = re.search(r"\(os error (\d+)\)", str(error))
        code = int(match.group(1)) if match else None
    return code if code in _REFUSALS else None


def _concerns(error: Exception, folder: Path) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, str | os.PathLike):
        return True
    path, ours = Path(os.path.realpath(name)), Path(os.path.realpath(folder))
    return path.is_relative_to(ours) or ours.is_relative_to(path)


@contextlib.contextmanager
def file(path: Path | str, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes ``path`` when the block ends well.

    The temporary name keeps the suffix (libraries choose a format by it). On any exception the
    temporary file is removed and ``path`` stays as it was. Missing parent folders are made.

    Raises:
        RequestError: the folder is read-only, full, or not a folder; or ``path`` is no regular file.
    """
    target = Path(os.path.realpath(path))  # a link is written through, as open() would
    shown = Path(path).parent
    with refusals(shown, remedy):
        _make_parents(target, shown, remedy)
        if target.exists() and not target.is_file():
            raise RequestError(f"{path}: exists and is not a regular file; choose another name")
        temporary = _beside(target, "tmp")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, target)
            _sync_folder(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def directory(path: Path | str, *, replace: bool = True, remedy: str = REMEDY) -> Iterator[Path]:
    """Yield a temporary folder to fill; it becomes ``path`` when the block ends well.

    An old folder of that name is replaced. With ``replace=False`` an existing one is left alone and
    FileExistsError is raised: of several processes making the same folder exactly one succeeds.
    A kill between the two renames of a replacement leaves the old folder under a hidden name, which
    :func:`sweep` puts back.
    """
    target = Path(os.path.realpath(path))
    shown = Path(path).parent
    with refusals(shown, remedy):
        _make_parents(target, shown, remedy)
        if target.exists() and not target.is_dir():
            raise RequestError(f"{path}: exists and is not a folder; choose another name")
        temporary = _beside(target, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _swap_in(temporary, target, replace)
        except BaseException:
            if temporary.exists():
                shutil.rmtree(temporary)
            raise


def write_bytes(path: Path | str, data: bytes, remedy: str = REMEDY) -> None:
    """Write ``data`` to ``path`` atomically."""
    with file(path, remedy) as temporary, open(temporary, "xb") as stream:
        stream.write(data)


def write_text(path: Path | str, text: str, remedy: str = REMEDY) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"), remedy)


def write_json(path: Path | str, value: Any, remedy: str = REMEDY) -> None:
    """Write ``value`` as indented JSON (see :func:`plain`) to ``path`` atomically."""
    write_bytes(path, json_bytes(value, indent=2), remedy)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Return ``value`` as UTF-8 JSON with a final newline."""
    text = json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate becomes \udXXX, which inside a JSON string is its escape: it reads back the same.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def plain(value: Any) -> Any:
    """Return ``value`` made of JSON's types only.

    NaN and infinity become null (JSON has neither), arrays, tensors and numpy numbers become lists
    and numbers, times ISO text. Raises TypeError for anything else.
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
        for old in sorted(folder.rglob(".old-*")):
            if old.exists() and _abandoned(old):
                target = old.with_name(old.name.split("-", 4)[4])
                if target.exists():
                    shutil.rmtree(old)
                else:
                    os.rename(old, target)
        for leftover in sorted(folder.rglob(".tmp-*")):
            if leftover.exists() and _abandoned(leftover):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:6]


def _beside(target: Path, kind: str) -> Path:
    """Return a new hidden name beside ``target`` that says which process on which machine made it."""
    return target.with_name(f".{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{target.name}")


def _abandoned(path: Path) -> bool:
    parts = path.name.split("-", 4)
    if len(parts) != 5 or not parts[2].isdigit():
        return False  # not one of ours
    if parts[1] == _host() and not _alive(int(parts[2])):
        return True
    return time.time() - path.stat().st_mtime > _ABANDONED_AFTER


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # it exists and belongs to someone else
    return True


def _make_parents(target: Path, shown: Path, remedy: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise RequestError(f"{shown}: cannot write here: not a folder; {remedy}") from None


def _swap_in(temporary: Path, target: Path, replace: bool) -> None:
    if not replace:
        try:
            os.rename(temporary, target)  # refused by the system when target has content
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
            raise
        _sync_folder(target.parent)
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
    _sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    try:
        _sync(folder)
    except OSError as error:
        # Some file systems cannot flush a folder; the rename itself is done.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if path.is_file():
                _sync(path)
        _sync_folder(Path(root))

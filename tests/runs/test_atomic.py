"""Atomic files and folders: whole or not at all, whatever interrupts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moalign.core.errors
from moalign.core.errors import RequestError
from moalign.runs import atomic

ROOT = Path(moalign.core.errors.__file__).parents[2]


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(code: int) -> Callable[..., Any]:
    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    return fail


def test_writes_new_and_replaces_old(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder" / "a.txt"
    atomic.write_text(target, "old é")
    atomic.write_text(target, "new")
    atomic.write_bytes(tmp_path / "b", b"\x00\xff")
    assert target.read_text(encoding="utf-8") == "new"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert names(target.parent) == ["a.txt"]


def test_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("x")
    atomic.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_temporary_name_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with atomic.file(tmp_path / "front.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path.resolve()
        temporary.write_bytes(b"x")
    assert names(tmp_path) == ["front.png"]


def test_writes_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(type(error)), atomic.file(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        atomic.write_json(target, {"a": object()})
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_sigkill_in_the_middle_leaves_the_old_file_and_sweep_cleans(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = """
import sys, time
from moalign.runs import atomic
with atomic.file(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with python(code, str(target)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        atomic.sweep(tmp_path)  # its writer is alive: stays
        assert len(names(tmp_path)) == 2
        process.send_signal(signal.SIGKILL)
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["open", "replace"])
def test_refused_write_names_folder_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    if where == "open":
        monkeypatch.setattr(atomic, "open", failing(code), raising=False)
    else:
        monkeypatch.setattr(atomic.os, "replace", failing(code))
    with pytest.raises(RequestError) as caught:
        atomic.write_text(target, "new")
    monkeypatch.undo()
    assert str(caught.value).startswith(f"{tmp_path}: cannot write here: {os.strerror(code)}")
    assert "--results DIR" in str(caught.value)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("below", ["a.txt", "deep/er/a.txt"])
def test_a_path_below_a_regular_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "plain").write_text("not a folder")
    for write in (lambda path: atomic.write_text(path, "x"), lambda path: atomic.directory(path).__enter__()):
        with pytest.raises(RequestError, match=r"plain.*cannot write here: .*--results DIR"):
            write(tmp_path / "plain" / below)
    assert names(tmp_path) == ["plain"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RequestError, match="Permission denied"):
            atomic.write_text(tmp_path / "a.txt", "x")
    finally:
        tmp_path.chmod(0o700)


FULL = """
import resource, sys
from moalign.core.errors import RequestError
from moalign.runs import atomic, checkpoint
kind, target = sys.argv[1:]
if kind == "tensors":
    import torch
    tensors = {"a": torch.zeros(100_000)}
if kind == "table":
    import pandas
    table = pandas.DataFrame({"a": range(100_000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if kind == "bytes":
        atomic.write_bytes(target, b"x" * 100_000)
    elif kind == "tensors":
        checkpoint.save_tensors(__import__("pathlib").Path(target), tensors)
    else:
        with atomic.file(target) as temporary:
            table.to_parquet(temporary)
except RequestError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "tensors", "table"])
def test_a_write_that_the_system_stops_halfway(tmp_path: Path, kind: str) -> None:
    """A file-size limit stops the real write after 4096 bytes, as a full disk does."""
    target = tmp_path / "file"
    target.write_text("old")
    process = python(FULL, kind, str(target))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert output.startswith(f"{tmp_path}: cannot write here: File too large; ")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_errors_about_other_files_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    with (
        pytest.raises(IsADirectoryError),
        atomic.file(tmp_path / "out" / "a") as temporary,
        open(tmp_path / "input") as stream,
    ):
        temporary.write_text(stream.read())
    with pytest.raises(FileNotFoundError), atomic.refusals(tmp_path):
        (tmp_path / "missing").read_text()
    assert names(tmp_path / "out") == []


def test_a_refusal_at_a_folder_above_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "mkdir", lambda path, mode=0o777: failing(errno.EROFS)(tmp_path / "results"))
    with pytest.raises(RequestError, match="Read-only file system; .*--results DIR"):
        atomic.write_text(tmp_path / "results" / "runs" / "a.txt", "x")


def test_only_regular_files_and_folders_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(RequestError, match=f"{name}: exists and is not a regular file"):
            atomic.write_text(tmp_path / name, "x")
    (tmp_path / "file").write_text("old")
    with pytest.raises(RequestError, match="file: exists and is not a folder"), atomic.directory(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file", "folder", "pipe"]


def test_directory_appears_whole_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for content in ("old", "new"):
        with atomic.directory(target) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / content).write_text(content)
            assert not (target / "sub" / content).exists()
    assert names(target / "sub") == ["new"]
    assert names(tmp_path) == ["adapter"]


def test_directory_on_error_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    with atomic.directory(target) as temporary:
        (temporary / "old").write_text("old")
    with pytest.raises(ValueError, match="boom"), atomic.directory(target) as temporary:
        (temporary / "new").write_text("half")
        raise ValueError("boom")
    assert (names(tmp_path), names(target)) == (["adapter"], ["old"])

    rename = os.rename

    def full(source: Path, destination: Path) -> None:
        if Path(destination) == target and ".tmp-" in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source))
        rename(source, destination)

    monkeypatch.setattr(atomic.os, "rename", full)
    with pytest.raises(RequestError, match="No space left"), atomic.directory(target) as temporary:
        (temporary / "new").write_text("new")
    assert (names(tmp_path), names(target)) == (["adapter"], ["old"])


def test_directory_without_replace_lets_the_first_win(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with atomic.directory(target, replace=False) as temporary:
        (temporary / "first").write_text("1")
    with pytest.raises(FileExistsError), atomic.directory(target, replace=False) as temporary:
        (temporary / "second").write_text("2")
    assert (names(tmp_path), names(target)) == (["run"], ["first"])


def test_sigkill_between_the_renames_is_put_back_by_sweep(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from moalign.runs import atomic
target = Path(sys.argv[1])
for content in ("old", "new"):
    if content == "new":
        rename = os.rename
        def killed(source, destination):
            rename(source, destination)
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename = killed
    with atomic.directory(target) as temporary:
        (temporary / content).write_text(content)
"""
    target = tmp_path / "a-b-c-d-adapter"
    process = python(code, str(target))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    atomic.sweep(tmp_path)
    assert (names(tmp_path), names(target)) == (["a-b-c-d-adapter"], ["old"])


def test_whoever_writes_again_removes_what_killed_writers_left(tmp_path: Path) -> None:
    """A command that is given again after a kill leaves no half folder beside the whole one."""
    code = """
import os, signal, sys
from pathlib import Path
from moalign.runs import atomic
with atomic.directory(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("half")
    if sys.argv[2:]:
        rename = os.rename
        os.rename = lambda source, target: (rename(source, target), os.kill(os.getpid(), signal.SIGKILL))
    else:
        os.kill(os.getpid(), signal.SIGKILL)
"""
    target, other = tmp_path / "run-a", tmp_path / "other-run-a"
    target.mkdir()
    for arguments in ([str(target)], [str(target), "between the renames"], [str(other)]):
        python(code, *arguments).communicate(timeout=60)
    assert not target.exists() and len(names(tmp_path)) == 3, "the old one, a new one, and one of another name"
    with atomic.directory(target) as mine, atomic.directory(target) as theirs:
        assert theirs.exists() and mine.exists(), "writers at work are left alone"
    assert [name for name in names(tmp_path) if not name.endswith("other-run-a")] == ["run-a"]
    assert len(names(tmp_path)) == 2


def test_sweep_judges_leftovers_of_other_machines_by_age(tmp_path: Path) -> None:
    gone = python("")
    gone.communicate(timeout=60)  # no such process here, but there may be one over there
    fresh, stale = (tmp_path / f".tmp-zzzzzz-{gone.pid}-{letter * 8}-x" for letter in "ab")
    foreign = tmp_path / ".tmp-notours"
    for path in (fresh, stale, foreign):
        path.write_text("x")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (stale, foreign):
        os.utime(path, (two_days_ago, two_days_ago))
    atomic.sweep(tmp_path)
    assert names(tmp_path) == sorted([fresh.name, foreign.name])


DEAD = 4_194_305
"""A process that no Linux has: one above the largest number that it gives."""


def leftover(folder: Path, name: str, kind: str = "old", number: int = 0) -> Path:
    """A folder, with one file, that a process which is gone left beside ``folder / name``."""
    place = folder / f".{kind}-{atomic._host()}-{DEAD}-{number:08x}-{name}"
    place.mkdir(parents=True)
    (place / "content").write_text(str(number))
    return place


def test_sweep_puts_back_a_folder_inside_one_that_is_put_back(tmp_path: Path) -> None:
    inner = leftover(leftover(tmp_path, "adapter"), "part", number=7)
    leftover(inner, "leaf", kind="tmp")
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["adapter"] and names(tmp_path / "adapter") == ["content", "part"]
    assert names(tmp_path / "adapter" / "part") == ["content"]
    assert (tmp_path / "adapter" / "part" / "content").read_text() == "7"


def test_sweep_removes_what_was_replaced_and_puts_back_the_newest(tmp_path: Path) -> None:
    for number, days in ((1, 3), (2, 1), (3, 2)):
        old = leftover(tmp_path, "adapter", number=number)
        then = time.time() - days * 24 * 3600
        os.utime(old, (then, then))
    (tmp_path / "other").mkdir()
    leftover(tmp_path, "other", number=9)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["adapter", "other"] and names(tmp_path / "other") == []
    assert (tmp_path / "adapter" / "content").read_text() == "2"


def test_a_writer_that_dies_during_a_sweep_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives when the sweep looks first: whatever the sweep sees later, the only copy stays."""
    leftover(tmp_path, "adapter", number=5)
    looks = iter([True])
    monkeypatch.setattr(atomic, "alive", lambda _: next(looks, False))
    atomic.sweep(tmp_path)
    atomic.sweep(tmp_path)
    assert names(tmp_path) == ["adapter"] and (tmp_path / "adapter" / "content").read_text() == "5"


# -- order of writing ------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What reaches the disk, in order: ("sync", name) and ("rename", name before); a temporary name is ``new``."""
    made: list[tuple[str, str]] = []
    real, open_ = {"replace": os.replace, "rename": os.rename}, os.open
    names_of: dict[int, str] = {}

    def name(path: str | os.PathLike[str]) -> str:
        place = Path(path)
        parts = ["new" if part.startswith(".tmp-") else part for part in place.parts[-2:]]
        return "/".join(parts) if parts[0] == "new" else parts[-1]

    def recording(kind: str) -> Callable[[Any, Any], None]:
        def call(source: Any, target: Any) -> None:
            made.append(("rename", name(source)))
            real[kind](source, target)

        return call

    def opening(path: Any, *more: Any, **options: Any) -> int:
        number = open_(path, *more, **options)
        names_of[number] = name(path)
        return number

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda number: made.append(("sync", names_of[number])))
    for kind in real:
        monkeypatch.setattr(os, kind, recording(kind))
    return made


def test_a_file_is_on_the_disk_before_it_is_renamed(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    for _ in range(2):  # new, and in the place of an old one
        calls.clear()
        atomic.write_text(tmp_path / "a.txt", "x")
        assert calls == [("sync", "new"), ("rename", "new"), ("sync", tmp_path.name)]


@pytest.mark.parametrize("replace", [True, False])
def test_all_of_a_folder_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, calls: list[tuple[str, str]], replace: bool
) -> None:
    with atomic.directory(tmp_path / "adapter", replace=replace) as temporary:
        (temporary / "part").mkdir()
        (temporary / "whole").write_text("x")
    assert sorted(calls[:3]) == [("sync", "new"), ("sync", "new/part"), ("sync", "new/whole")]
    assert calls[3:] == [("rename", "new"), ("sync", tmp_path.name)]


def test_a_new_folder_is_on_the_disk_before_the_old_one_makes_room(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    (tmp_path / "adapter").mkdir()
    with atomic.directory(tmp_path / "adapter") as temporary:
        (temporary / "whole").write_text("x")
    assert sorted(calls[:2]) == [("sync", "new"), ("sync", "new/whole")]
    assert calls[2:] == [("rename", "adapter"), ("rename", "new"), ("sync", tmp_path.name)]


def test_remove_directory(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    atomic.remove_directory(tmp_path / "a")
    atomic.remove_directory(tmp_path / "a")
    assert names(tmp_path) == []


FILL = """
import sys, time
from pathlib import Path
from moalign.runs import atomic
with atomic.filled(Path(sys.argv[1]), "last") as place:
    (place / "part").write_text("half")
    print("filling", flush=True)
    time.sleep(60)
"""


def test_an_empty_folder_that_a_killed_process_was_filling_is_free_again(tmp_path: Path) -> None:
    before = tmp_path.stat().st_ino
    with python(FILL, str(tmp_path)) as process:
        assert process.stdout is not None and process.stdout.readline() == "filling\n"
        assert not atomic.is_free(tmp_path), "somebody is at work there"
        process.kill()
    assert [name.split("-")[0] for name in names(tmp_path)] == [".tmp"]
    assert atomic.is_free(tmp_path) and names(tmp_path) == []
    with atomic.filled(tmp_path, "last") as place:
        for name in ("last", "part"):
            (place / name).write_text("whole")
    assert names(tmp_path) == ["last", "part"] and tmp_path.stat().st_ino == before
    assert not atomic.is_free(tmp_path)

"""The sqlite store: exact values, distinct keys, damaged files, killed and concurrent processes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import RequestError, WorkError
from moalign.rewards.store import Store, key_of

ROOT = Path(__file__).resolve().parents[2]


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdin=pipe, stdout=pipe, stderr=pipe)


def test_values_come_back_exactly_and_in_order(tmp_path: Path) -> None:
    pairs = [(f"p{n}", "r") for n in range(1203)]
    values = [n / 7 - 50 for n in range(1203)]
    with Store(tmp_path / "deep" / "scores.sqlite") as store:
        store.put_many("a", pairs, values)
        assert len(store) == 1203
    with Store(tmp_path / "deep" / "scores.sqlite") as store:
        requested = [*reversed(pairs), ("p0", "other"), ("p0", "r")]
        assert store.get_many("a", requested) == [*reversed(values), None, values[0]]
        assert store.get_many("b", pairs[:2]) == [None, None]
        assert store.get_many("a", []) == []


def test_the_file_is_made_with_the_first_score(tmp_path: Path) -> None:
    """Until then nothing is left behind, and what another process keeps meanwhile is read."""
    pairs = [("p", "r")]
    with Store(tmp_path / "new" / "s.sqlite") as store, Store(tmp_path / "new" / "s.sqlite") as other:
        assert store.get_many("a", pairs) == [None] and len(store) == 0
        store.put_many("a", [], [])
        assert list(tmp_path.iterdir()) == []
        other.put_many("a", pairs, [1.0])
        assert store.get_many("a", pairs) == [1.0]


def test_the_first_score_stays(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many("a", [("p", "r")], [1.0])
        store.put_many("a", [("p", "r")], [2.0])
        assert store.get_many("a", [("p", "r")]) == [1.0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), unique=True, max_size=20))
def test_different_texts_have_different_keys(parts: list[tuple[str, str, str]]) -> None:
    assert len({key_of(*part) for part in parts}) == len(parts)


def test_boundaries_between_texts_count_and_surrogates_are_taken(tmp_path: Path) -> None:
    assert len({key_of("a", "bc", "d"), key_of("ab", "c", "d"), key_of("a", "b", "cd"), key_of("", "abcd", "")}) == 4
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many("a", [("\ud800", "\x00")], [0.5])
        assert store.get_many("a", [("\ud800", "\x00"), ("\ud801", "\x00")]) == [0.5, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_only_finite_scores_are_stored(tmp_path: Path, value: float) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(WorkError, match="not finite"):
            store.put_many("a", [("p", "r"), ("q", "r")], [1.0, value])
        assert len(store) == 0


def test_garbage_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"these are not scores " * 400)
    with pytest.raises(RequestError, match=r"s\.sqlite: the score store is damaged.*delete or move"):
        Store(path)
    assert path.read_bytes() == b"these are not scores " * 400


def test_damaged_pages_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.put_many("a", [(f"p{n}", "r") for n in range(3000)], [1.0] * 3000)
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(RequestError, match="the score store is damaged"), Store(path) as store:
        store.get_many("a", [("p1", "r")])


def test_another_programs_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mail (body TEXT)")
    other.commit()
    other.close()
    before = path.read_bytes()
    with pytest.raises(RequestError, match="not a moalign score store"):
        Store(path)
    assert path.read_bytes() == before


def test_unwritable_place_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--results DIR"):
        Store(tmp_path / "file" / "s.sqlite")
    (tmp_path / "folder.sqlite").mkdir()
    with pytest.raises(RequestError, match="--results DIR"):
        Store(tmp_path / "folder.sqlite")


@pytest.mark.parametrize("name", ["locked", "malformed"])
def test_the_name_of_a_folder_is_not_taken_for_the_reason(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / name / "s.sqlite")
    (tmp_path / name).write_text("")
    with pytest.raises(RequestError, match=r"cannot be written \((File exists|Not a directory)\).*--results DIR"):
        store.put_many("a", [("p", "r")], [1.0])


def test_full_disk_names_the_remedy_and_keeps_what_was_there(tmp_path: Path) -> None:
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many("a", [("p", "r")], [1.0])
        assert store._connection is not None
        store._connection.execute("PRAGMA max_page_count=3")  # sqlite then reports a full disk
        with pytest.raises(RequestError, match=r"full.*--results DIR"):
            store.put_many("a", [(f"p{n}", "r") for n in range(2000)], [1.0] * 2000)
        assert store.get_many("a", [("p", "r")]) == [1.0]


def test_a_lock_that_stays_is_told(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with Store(path) as store:
        store.put_many("a", [("p", "r")], [1.0])
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with Store(path, timeout=0.05) as store, pytest.raises(WorkError, match="locked"):
        store.put_many("a", [("p", "s")], [1.0])
    holder.close()


def test_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.get_many("a", [("p", "r")])


def test_several_processes_create_and_write_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from moalign.rewards.store import Store

        offset = int(sys.argv[2])
        with Store(Path(sys.argv[1])) as store:
            for n in range(60):
                pairs = [(f"p{offset + n}", "r"), (f"shared{n}", "r")]
                store.put_many("a", pairs, [float(offset + n), float(n)])
                assert store.get_many("a", pairs) == [float(offset + n), float(n)]
    """
    path = str(tmp_path / "s.sqlite")
    processes = [start(code, path, str(1000 * n)) for n in range(3)]
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    with Store(Path(path)) as store:
        assert len(store) == 3 * 60 + 60
        assert store.get_many("a", [("p2059", "r"), ("shared7", "r")]) == [2059.0, 7.0]


@pytest.mark.slow
def test_several_processes_open_fresh_files_at_the_same_moment(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from moalign.rewards.store import Store

        print("ready", flush=True)
        begin = float(sys.stdin.readline())
        for n in range(60):
            while time.time() < begin + n / 100:
                pass
            with Store(Path(sys.argv[1]) / f"{n}.sqlite") as store:
                store.put_many("a", [("p", sys.argv[2])], [1.0])
    """
    processes = [start(code, str(tmp_path), str(n)) for n in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{time.time() + 0.1}\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60)[1] == ""
    for n in range(60):
        with Store(tmp_path / f"{n}.sqlite") as store:
            assert len(store) == 3


def test_importing_the_panel_stays_light() -> None:
    code = """
        import sys
        import moalign.rewards.panel, moalign.rewards.store, moalign.rewards.normaliser
        heavy = {"torch", "transformers", "pandas", "datasets", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
    """
    process = start(code)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0

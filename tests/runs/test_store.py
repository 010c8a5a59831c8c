"""The store: the same request is the same run; runs are found by any clear name."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moalign.core.errors
from moalign.core.errors import RequestError
from moalign.runs import atomic
from moalign.runs import record as records
from moalign.runs.record import RunRecord
from moalign.runs.run import Run
from moalign.runs.store import RunStore, identity

ROOT = Path(moalign.core.errors.__file__).parents[2]

KEYS = st.text(max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_identity_does_not_depend_on_the_order_of_keys(request_: dict[str, Any]) -> None:
    found = identity(request_)
    assert identity(reversed_keys(request_)) == found
    assert len(found) == 12
    assert int(found, 16) >= 0


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=5), KEYS)
def test_identity_differs_for_another_value(request_: dict[str, Any], key: str) -> None:
    assert identity({**request_, key: 1}) != identity({**request_, key: 2})
    assert identity({**request_, key: [1, 2]}) != identity({**request_, key: [2, 1]})


def test_identity_is_fixed_for_ever() -> None:
    # printf '{"a":1,"b":[0.3,0.7]}' | sha256sum
    assert identity({"b": (0.3, 0.7), "a": 1}) == "b92b336cf357"
    with pytest.raises(ValueError, match="not JSON compliant"):
        identity({"a": math.nan})


def make(store: RunStore, method: str = "moc", task: str = "sandbox", **request_: Any) -> Run:
    return store.open(method, task, request_ or {"seed": 0}, card_hash="card", seed=0)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "results")


def test_open_makes_the_folder_with_its_record(store: RunStore) -> None:
    run = store.open(
        "moc",
        "sandbox",
        {"seed": 3, "config": {"lr": 1e-4}},
        card_hash="c0ffee",
        seed=3,
        preferences=[(0.3, 0.7)],
        recipe={"config": {"lr": 1e-4, "steps": 10}},
        as_given={"set": ["lr=1e-4"]},
    )
    assert run.path == store.results / "runs" / "sandbox" / "moc" / run.run_id
    assert [path.name for path in run.path.iterdir()] == ["run.json"]
    found = Run.load(run.path).record
    assert found.run_id == identity({**found.identity, "method": "moc", "task": "sandbox"})
    assert (found.status, found.seed, found.card_hash) == ("running", 3, "c0ffee")
    assert found.preferences == [(0.3, 0.7)]
    assert found.recipe["config"]["steps"] == 10
    assert found.as_given == {"set": ["lr=1e-4"]}
    assert found.environment["packages"]["numpy"]


def test_the_same_request_finds_its_run(store: RunStore) -> None:
    first = make(store, seed=1, lr=0.5)
    first.mark("done")
    again = make(store, lr=0.5, seed=1)
    assert (again.path, again.status) == (first.path, "done")
    others = [
        make(store, seed=2, lr=0.5),
        make(store, "ric", seed=1, lr=0.5),
        make(store, task="stories", seed=1, lr=0.5),
    ]
    assert len({run.run_id for run in [first, *others]}) == 4


def test_lookup_writes_nothing(store: RunStore) -> None:
    assert store.lookup("moc", "sandbox", {"seed": 0}) is None
    assert not store.results.exists()
    run = make(store)
    found = store.lookup("moc", "sandbox", {"seed": 0})
    assert found is not None
    assert found.path == run.path


def test_a_run_under_other_defaults_is_no_run_of_the_request(store: RunStore) -> None:
    """The request leaves defaults out; the record tells when one has changed, a new option is no change."""
    request, recorded = {"settings": {}, "seed": 0}, {"lr": 0.1, "splits": {"train": 0.6, "eval": 0.4}, "gone": 1}
    made = store.open("bt", "pairs", request, card_hash="c", seed=0, recipe={"settings": recorded, "model": "a"})
    now: dict[str, Any] = {"lr": 0.1, "splits": {"train": 0.6, "eval": 0.4}, "new": 3}
    found = store.lookup("bt", "pairs", request, {"settings": now, "model": "b"})
    assert found is not None and found.path == made.path
    changed = {"settings": {**now, "lr": 0.2, "splits": {"train": 0.6, "eval": 0.3}}}
    with pytest.raises(RequestError) as caught:
        store.lookup("bt", "pairs", request, changed)
    assert "(settings.lr: 0.1 then, 0.2 now, settings.splits.eval: 0.4 then, 0.3 now)" in str(caught.value)
    with pytest.raises(RequestError, match=f"{made.path}: .*move its folder away"):
        store.open("bt", "pairs", request, card_hash="c", seed=0, recipe=changed)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_names_that_are_no_folder_names(store: RunStore, name: str) -> None:
    with pytest.raises(RequestError, match="method"):
        make(store, method=name)
    with pytest.raises(RequestError, match="task"):
        make(store, task=name)
    assert not store.results.exists()


def test_results_below_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    for results in (tmp_path / "plain", tmp_path / "plain" / "results"):
        with pytest.raises(RequestError, match=r"plain.*cannot write here.*--results DIR"):
            make(RunStore(results))
    with pytest.raises(RequestError, match="plain: not a folder"):
        RunStore(tmp_path / "plain").runs()


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "rename", "write"])
def test_results_that_cannot_be_written(store: RunStore, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    def refuse(*arguments: Any, **_: Any) -> None:
        raise OSError(code, os.strerror(code), str(arguments[0]))

    if call == "write":
        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RequestError) as caught:
        make(store)
    monkeypatch.undo()
    assert f"cannot write here: {os.strerror(code)}" in str(caught.value)
    assert str(store.results) in str(caught.value)
    assert not list(store.results.glob("runs/*/*/*"))


def test_a_folder_without_record_is_not_overwritten(store: RunStore) -> None:
    run = make(store)
    (run.path / "run.json").unlink()
    (run.path / "precious").write_text("x")
    with pytest.raises(RequestError, match=r"holds no run\.json"):
        make(store)
    assert (run.path / "precious").exists()


def test_another_process_that_makes_the_run_first(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = atomic._swap_in
    first: list[Run] = []

    def late(temporary: Path, target: Path, replace: bool) -> None:
        if not first:
            first.append(Run(target, RunRecord.model_validate_json((temporary / "run.json").read_text())))
            target.mkdir()
            first[0].record.seed = 99
            first[0].save_record()
        swap(temporary, target, replace)

    monkeypatch.setattr(atomic, "_swap_in", late)
    assert make(store).record.seed == 99
    assert not [path for path in first[0].path.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_processes_that_open_the_same_run_at_once(store: RunStore) -> None:
    code = """
import sys
from moalign.runs.store import RunStore
run = RunStore(sys.argv[1]).open("moc", "sandbox", {"seed": 0}, card_hash="c", seed=0)
print(run.run_id, run.record.created.isoformat())
"""
    command = [sys.executable, "-c", code, str(store.results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    outputs = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(outputs) == 1  # all see one record
    assert [path.name for path in (store.root / "sandbox" / "moc").iterdir()] == [outputs.pop().split()[0]]


@pytest.fixture
def filled(store: RunStore) -> RunStore:
    """Four runs with chosen identifiers, each a minute older than the one before."""
    for age, (task, method, run_id, status) in enumerate(
        [
            ("sandbox", "moc", "aaaa11112222", "running"),
            ("sandbox", "moc", "aaaa33334444", "done"),
            ("sandbox", "ric", "bbbb11112222", "done"),
            ("stories", "ric", "cccc11112222", "failed"),
        ]
    ):
        folder = store.root / task / method / run_id
        folder.mkdir(parents=True)
        created = records.now() - timedelta(minutes=age)
        finished = None if status == "running" else records.now() + timedelta(minutes=age)
        RunRecord(
            run_id=run_id,
            method=method,
            task=task,
            card_hash="c",
            seed=0,
            created=created,
            finished=finished,
            status=status,  # type: ignore[arg-type]
        ).write(folder)
    return store


def ids(runs: list[Run]) -> list[str]:
    return [run.run_id[:5] for run in runs]


def test_runs_newest_first_and_filtered(filled: RunStore) -> None:
    assert ids(filled.runs()) == ["aaaa1", "aaaa3", "bbbb1", "cccc1"]
    assert ids(filled.runs(task="sandbox")) == ["aaaa1", "aaaa3", "bbbb1"]
    assert ids(filled.runs(method="ric")) == ["bbbb1", "cccc1"]
    assert ids(filled.runs(task="sandbox", status="done")) == ["aaaa3", "bbbb1"]
    assert ids(filled.runs(status="running")) == []  # nobody holds its lock
    assert ids(filled.runs(status="interrupted")) == ["aaaa1"]
    with filled.find("aaaa1").lock():
        assert ids(filled.runs(status="running")) == ["aaaa1"]


def test_no_runs(store: RunStore) -> None:
    assert store.runs() == []
    with pytest.raises(RequestError, match=r"no finished run; train one: moalign train METHOD"):
        store.newest_finished()
    with pytest.raises(RequestError, match=r"unknown run 'abc': there are no runs in .*: moalign train METHOD, or"):
        store.find("abc")


def test_a_damaged_record_is_a_warning(filled: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    broken = filled.root / "sandbox" / "moc" / "aaaa11112222"
    (broken / "run.json").write_text("{")
    (filled.root / "sandbox" / "moc" / "dddd11112222").mkdir()
    (filled.root / "sandbox" / "moc" / ".tmp-being-written").mkdir()
    (filled.root / "sandbox" / "notes.txt").write_text("x")
    assert ids(filled.runs()) == ["aaaa3", "bbbb1", "cccc1"]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("warning: ") == 2
    assert f"{broken / 'run.json'}:1: not JSON" in output.err
    filled.runs()
    assert capsys.readouterr().err == ""  # once is enough
    with pytest.raises(RequestError, match=r"run\.json:1: not JSON"):
        filled.find("aaaa1")


@pytest.mark.parametrize(
    ("closed", "left"),
    [("sandbox/moc/aaaa11112222", ["aaaa3", "bbbb1", "cccc1"]), ("sandbox/moc", ["bbbb1", "cccc1"])],
)
def test_a_folder_that_cannot_be_read_is_a_warning(
    filled: RunStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, closed: str, left: list[str]
) -> None:
    """The system is replaced: root, who may run the tests, reads every folder."""
    real, shut = Path.stat, filled.root / closed

    def stat(path: Path, **more: Any) -> os.stat_result:
        if shut in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    assert ids(filled.runs()) == left
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 - len(left)
    path = filled.root / "sandbox" / "moc" / "aaaa11112222"
    message = f"{path / 'run.json'}: cannot be read: Permission denied; make the run's folder readable"
    assert f"warning: run left out: {message}" in lines
    for name in ("aaaa1", str(path), str(path / "run.json")):
        with pytest.raises(RequestError) as caught:
            filled.find(name)
        assert str(caught.value) == message


def test_newest_finished_goes_by_the_time_of_finishing(filled: RunStore) -> None:
    assert filled.newest_finished().run_id == "bbbb11112222"
    assert filled.newest_finished(method="moc").run_id == "aaaa33334444"
    with pytest.raises(RequestError, match=r"no finished run of task stories method ric.*moalign train ric"):
        filled.newest_finished("stories", "ric")


def test_find(filled: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled.root / "sandbox" / "ric" / "bbbb11112222"
    for name in (
        "bbbb11112222",
        "b",
        "ric/b",
        "sandbox/ric/bbbb",
        str(folder),
        f"{folder}/",
        str(folder / "run.json"),
    ):
        assert filled.find(name).path.resolve() == folder.resolve(), name
    assert filled.find("aaaa3").run_id == "aaaa33334444"
    monkeypatch.chdir(folder)
    assert RunStore(filled.results).find(".").run_id == "bbbb11112222"


def test_a_folder_named_like_a_prefix_does_not_hide_the_run(
    filled: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bbbb").mkdir()
    monkeypatch.chdir(tmp_path)
    assert filled.find("bbbb").run_id == "bbbb11112222"


def test_find_prefers_the_whole_identifier(filled: RunStore) -> None:
    folder = filled.root / "sandbox" / "ric"
    (folder / "bbbb11112222-copy").mkdir()
    (folder / "bbbb11112222-copy" / "run.json").write_bytes((folder / "bbbb11112222" / "run.json").read_bytes())
    assert filled.find("bbbb11112222").path == folder / "bbbb11112222"


@pytest.mark.parametrize("name", ["aaaa", "moc/aaaa", "sandbox/moc/a"])
def test_ambiguous(filled: RunStore, name: str) -> None:
    with pytest.raises(RequestError) as caught:
        filled.find(name)
    message = str(caught.value)
    assert message.startswith(f"run '{name}': 2 runs fit: ")
    assert "sandbox/moc/aaaa11112222" in message
    assert "sandbox/moc/aaaa33334444" in message
    assert "bbbb" not in message


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("bbbb11112223", "bbbb11112222"),
        ("sandbox/rik/bbbb", "sandbox/ric/bbbb11112222"),
        ("moc/bbbb", None),
        ("stories/moc/aaaa3", None),
        ("zzzz", None),
        ("", None),
        ("a/sandbox/ric/b", None),
    ],
)
def test_unknown(filled: RunStore, name: str, near: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        filled.find(name)
    message = str(caught.value)
    assert message.startswith(f"unknown run {name!r}; runs in {filled.root}: ")
    assert "sandbox/ric/bbbb11112222" in message
    if near:
        assert f"did you mean {near!r}?" in message


@pytest.mark.parametrize("name", ["a" * 300, f"{'a' * 300}/run.json"])
def test_a_name_too_long_for_a_folder_is_no_run(filled: RunStore, name: str) -> None:
    test_unknown(filled, name, None)


def test_unknown_with_many_runs_lists_a_few(store: RunStore) -> None:
    for seed in range(10):
        make(store, seed=seed)
    with pytest.raises(RequestError, match=r"and 2 more \(moalign ls runs\)"):
        store.find("zzzz")


def test_a_folder_that_is_no_run(filled: RunStore) -> None:
    with pytest.raises(RequestError, match=r"not a run: this folder holds no run\.json"):
        filled.find(str(filled.root))


def test_importing_the_package_is_light() -> None:
    code = """
import sys
from moalign.runs import atomic, checkpoint, environment, meter, record, run, store
store.RunStore("nowhere").runs()
environment.capture()
heavy = {"torch", "safetensors", "pandas", "pyarrow", "transformers", "datasets", "numpy"} & set(sys.modules)
print(sorted(heavy))
"""
    told = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=told)
    assert done.stdout.strip() == "[]"

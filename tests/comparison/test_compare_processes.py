"""``compare`` with other processes: what they are told, and what is left of those that fail."""

from __future__ import annotations

import contextlib
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.comparison import compare as workflow
from moalign.comparison import executors, jobs
from moalign.comparison.compare import CompareRequest, compare
from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.methods import registry
from moalign.runs.record import RunRecord
from tests.comparison.conftest import ask, by_label

pytestmark = pytest.mark.usefixtures("_toys")


# --- processes ------------------------------------------------------------------------------------------------------


def planned(card: str, results: Path, **more: Any) -> list[jobs.ComparedRun]:
    return workflow.plan_all(CompareRequest(**{"task": card, "results": results, **more}))[0]


def test_jobs_are_trained_in_processes(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is told to train exactly the planned run, and its run is taken over."""
    seen: list[list[str]] = []
    here = {work.folder: work for work in planned(card, results)}

    def run(self: Any, command: list[str], progress: Any) -> tuple[int, str]:
        seen.append(command)
        work = next(work for work in here.values() if work.command == command)
        assert work.plan is not None
        jobs.train.train(work.plan)
        return 0, ""

    monkeypatch.setattr(executors.Processes, "run", run)
    compared = ask(card, results, jobs=2)
    assert sorted(command[1] for command in seen) == ["bad", "good"]
    assert not compared.failed and compared.content["winner"] == "good"


@pytest.mark.parametrize(
    ("code", "messages", "error"),
    [
        (2, "step 3\nerror: the disk is full\n", "the disk is full"),
        (1, "Traceback\nValueError: burst", "ValueError: burst"),
        (-9, "", "its process ended without a word (killed by signal 9)"),
        (-9, "training ric on sandbox, seed 0", "its process ended without a word (killed by signal 9)"),
    ],
)
def test_a_process_that_fails_fails_its_run(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch, code: int, messages: str, error: str
) -> None:
    monkeypatch.setattr(executors.Processes, "run", lambda self, command, progress: (code, messages))
    compared = ask(card, results, jobs=2)
    assert [row["error"] for row in compared.content["rows"]] == [error, error]


def test_where_runs_are_trained_is_asked_of_the_executor(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here for one at a time, else by the executor; what stands against it is told with the other problems."""
    requested: list[tuple[str, int | None]] = []
    monkeypatch.setattr(jobs, "train_here", lambda runs, progress: requested.append(("here", 1)))
    monkeypatch.setattr(
        jobs, "train_apart", lambda runs, executor, count, progress: requested.append((executor, count))
    )
    for more in ({}, {"jobs": 1}, {"jobs": 3}, {"executor": "ray"}, {"executor": "ray", "jobs": 1}):
        monkeypatch.setattr(executors, "problems", lambda name: [])
        ask(card, results, **more)
    assert requested == [("here", 1), ("here", 1), ("local", 3), ("ray", None), ("ray", 1)]
    monkeypatch.undo()
    with pytest.raises(RequestError) as caught:
        compare(CompareRequest(task=card, results=results, methods=["goood"], executor="rya"))
    assert "did you mean 'ray'" in str(caught.value) and "'goood'" in str(caught.value)


def test_a_process_that_leaves_no_run(card: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors.Processes, "run", lambda self, command, progress: (0, "all fine"))
    rows = ask(card, results, jobs=2).content["rows"]
    assert all("left no finished run" in row["error"] for row in rows)


def test_a_run_in_progress_elsewhere_is_waited_for_by_the_user(card: str, results: Path) -> None:
    work = planned(card, results)[0]
    assert work.plan is not None
    run = work.plan.store.open(
        "good", "toy", work.plan.identity, card_hash=work.plan.task.hash, seed=0, recipe={}, as_given={}
    )
    with run.lock(), pytest.raises(RequestError, match="is training this run; wait for it"):
        ask(card, results)
    assert [path.parent for path in results.rglob("run.json")] == [run.path], "nothing else was trained meanwhile"


def test_the_record_of_cost_is_taken_over(card: str, results: Path) -> None:
    row = by_label(ask(card, results))["good"]
    record = RunRecord.model_validate_json((Path(row["runs"][0]["run"]) / "run.json").read_text())
    assert row["cost"]["tokens_trained"] == record.cost.tokens_trained == 1000
    assert row["cost"]["peak_memory_bytes"] == record.cost.peak_memory_bytes > 0
    assert row["cost"]["answering"]["tokens_generated"] == 6 * 3 * 40


@pytest.mark.parametrize("what", ["training", "evaluating"])
def test_a_run_s_task_is_gone_before_the_next_one_s_is_used(
    card: str, results: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A task holds the base and the reward models: two of 7B do not fit where one does."""
    used: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def note(task: Any) -> None:
        task._tokens_cut = lambda text: len(task.names)  # a cycle, as the task's own functions make
        alive.append(sum(ref() is not None for ref in used))
        used.append(weakref.ref(task))

    ask(card, results, methods=["good", "bad"])  # so that the scale is there, and nothing is prepared
    if what == "training":
        good, train = type(registry.get("good")), type(registry.get("good")).train
        monkeypatch.setattr(good, "train", lambda self, job: (note(job.task), train(self, job))[1])
    else:
        given = evaluate.respond
        monkeypatch.setattr(
            evaluate, "respond", lambda method, context, *rest: (note(context.task), given(method, context, *rest))[1]
        )
    ask(card, results, methods=["good"], seeds=3, overrides=["gain=0.05"])
    assert alive == [0, 0, 0]


def test_a_fresh_peak_of_memory() -> None:
    """What an earlier run held is not in the next one's peak (where the system can tell)."""
    from moalign.runs.meter import fresh_peak, process_peak_bytes

    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux lets a process begin a new peak")
    block = np.ones(40_000_000)
    high = process_peak_bytes()
    del block
    fresh_peak()
    assert process_peak_bytes() < high - 200_000_000


def test_a_file_of_the_current_folder_is_not_taken_for_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the command itself, which a script has started, nor by its children."""
    (tmp_path / "random.py").write_text("raise RuntimeError('a file of the user')")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(executors.Processes()) as processes:
        assert processes.run(["ls", "models"]) == (0, "")

"""Mirrors of metrics: the same numbers in real trackers' own files; a mirror that fails ends nothing."""

from __future__ import annotations

import importlib.util
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.runs import trackers
from moalign.runs.trackers import Mirrors

LINES: list[tuple[int, str, dict[str, Any]]] = [
    (1, "offline", {"loss": 0.5, "reward/helpfulness": 2, "note": "text", "nothing": None, "flag": True}),
    (2, "offline", {"loss": 0.25}),
    (1, "online", {"loss": 3.0}),
]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a tracker is told through the environment is taken away again."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "results" / "runs" / "toy" / "sft" / "0123456789ab"
    place.mkdir(parents=True)
    return place


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed here")


def tell(name: str, folder: Path, said: list[str]) -> Path:
    with Mirrors([name, name], folder, {"seed": 3}, said.append) as mirrors:
        for step, phase, metrics in LINES:
            mirrors.log(step, phase, metrics)
    assert said == []
    return folder.parents[3] / "trackers" / name


def scalars(place: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(place)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard(folder: Path) -> None:
    needs("tensorboard")
    place = tell("tensorboard", folder, [])
    assert scalars(place / "toy" / "sft" / folder.name) == {
        "offline/loss": [(1, 0.5), (2, 0.25)],
        "offline/reward/helpfulness": [(1, 2.0)],
        "online/loss": [(1, 3.0)],
    }


def test_trackio(folder: Path) -> None:
    needs("trackio")
    place = tell("trackio", folder, [])
    with sqlite3.connect(place / "moalign.db") as base:
        rows = base.execute("select step, metrics, run_name from metrics order by id").fetchall()
    import json

    assert [(step, json.loads(text)) for step, text, _ in rows] == [
        (1, {"offline/loss": 0.5, "offline/reward/helpfulness": 2}),
        (2, {"offline/loss": 0.25}),
        (1, {"online/loss": 3.0}),
    ]
    assert {name for *_, name in rows} == {f"toy/sft/{folder.name}"}


def test_mlflow(folder: Path) -> None:
    needs("mlflow")
    place = tell("mlflow", folder, [])
    with sqlite3.connect(place / "mlflow.db") as base:
        rows = base.execute("select key, step, value from metrics order by key, step").fetchall()
        names = base.execute("select name from runs").fetchall()
    assert ("offline/loss", 2, 0.25) in rows and ("online/loss", 1, 3.0) in rows and len(rows) == 4
    assert names == [(f"toy/sft/{folder.name}",)]


class Fake:
    """A tracker that keeps what it is told, and fails when asked to."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at, self.told, self.closed = fails_at, [], False

    def start(self) -> None:
        self._act("start")

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self._act("log")
        self.told.append((values, step))

    def finish(self) -> None:
        self._act("finish")
        self.closed = True

    def _act(self, what: str) -> None:
        if what == self.fails_at:
            raise ConnectionError("no\nnetwork")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    from accelerate import tracking

    def make(tracker: str, fails_at: str = "") -> Fake:
        made = Fake(fails_at)
        monkeypatch.setattr(tracking, tracker, lambda *_, **__: made)
        return made

    return make


def test_wandb_counts_by_itself_because_every_phase_begins_at_1(folder: Path, fake: Callable[..., Fake]) -> None:
    made = fake("WandBTracker")
    tell("wandb", folder, [])
    assert made.told[1:] == [
        ({"offline/loss": 0.25, "offline/step": 2}, None),
        ({"online/loss": 3.0, "online/step": 1}, None),
    ]
    assert made.closed


@pytest.mark.parametrize("fails_at", ["start", "log", "finish"])
def test_a_mirror_that_fails_is_named_once_and_left(folder: Path, fake: Callable[..., Fake], fails_at: str) -> None:
    said: list[str] = []
    good, bad = fake("TensorBoardTracker"), fake("WandBTracker", fails_at)
    with Mirrors(["wandb", "tensorboard"], folder, {}, said.append) as mirrors:
        for step, phase, metrics in LINES:
            mirrors.log(step, phase, metrics)
    assert said == ["wandb: ConnectionError: no network; it is told no more, metrics.jsonl goes on"]
    assert len(good.told) == 3 and good.closed and len(bad.told) == (3 if fails_at == "finish" else 0)


def test_a_mirror_neither_ends_a_run_nor_changes_its_random_numbers(
    folder: Path, fake: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(values: object, step: object) -> None:
        random.seed(1)
        raise SystemExit(0)

    said: list[str] = []
    before = random.getstate()
    monkeypatch.setattr(fake("TensorBoardTracker"), "log", leave)
    with Mirrors(["tensorboard"], folder, {}, said.append) as mirrors:
        mirrors.log(1, "offline", {"loss": 0.5})
    assert said == ["tensorboard: SystemExit: 0; it is told no more, metrics.jsonl goes on"]
    assert random.getstate() == before


def test_no_trackers_no_folder_no_library(folder: Path) -> None:
    with Mirrors([], folder, {}) as mirrors:
        mirrors.log(1, "train", {"loss": 1.0})
    assert not (folder.parents[3] / "trackers").exists()


def test_a_library_that_is_missing_is_named_before_training(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError) as caught:
        plan(TrainRequest("sft", overrides=(*small_task, "trackers=[tensorboard, mlflow]"), results=tmp_path))
    assert [problem.split(":")[1].strip() for problem in caught.value.problems] == ["tensorboard", "mlflow"]
    assert "pip install mlflow" in str(caught.value)
    with pytest.raises(RequestError, match="did you mean 'tensorboard'"):
        plan(TrainRequest("sft", overrides=(*small_task, "trackers=[tensorbord]"), results=tmp_path))


@pytest.mark.parametrize(
    "again", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["mirrored", "same numbers without"]
)
def test_a_run_is_the_same_run_with_and_without_trackers(
    small_task: tuple[str, ...], tmp_path: Path, again: bool
) -> None:
    needs("tensorboard")
    short = (*small_task, f"steps={3 if again else 2}", "batch=4", "max_tokens=48", "log_every=1")
    seen = plan(TrainRequest("sft", overrides=(*short, "trackers=[tensorboard]"), results=tmp_path / "a"))
    plain = plan(TrainRequest("sft", overrides=short, results=tmp_path / "b"))
    assert seen.folder.name == plain.folder.name
    run = train(seen)[0]
    mirrored = scalars(tmp_path / "a" / "trackers" / "tensorboard" / "sandbox" / "sft" / run.run_id)
    lines = run.metrics()
    assert mirrored["sft/loss"] == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    assert [line["step"] for line in lines] == ([1, 2, 3] if again else [1, 2])
    if again:
        without = train(plain)[0].metrics()
        assert [(line["step"], line["loss"]) for line in without] == [(line["step"], line["loss"]) for line in lines]
        assert not (tmp_path / "b" / "trackers").exists()

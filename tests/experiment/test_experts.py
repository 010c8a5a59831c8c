"""Experts are runs: trained once, found by everyone who asks for the same, counted by all of them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.experiment.train import Plan, TrainRequest, context_of, expert_plan, plan, train
from moalign.lm.generator import RESIDENT
from moalign.policies.policy import respond_all
from moalign.runs import record
from moalign.runs.run import Run

CORNERS = [(1.0, 0.0), (0.0, 1.0)]
GRID = [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]

pytestmark = pytest.mark.usefixtures("picky")


class Interrupted(Exception):
    """What the tests raise in the middle of training."""


@pytest.fixture
def ask(small_task: tuple[str, ...], tmp_path: Path) -> Any:
    """``ask(method, *overrides, where=..., **request)``: a plan on the small task."""

    def planned(method: str, *overrides: str, where: str | Path = "results", **request: Any) -> Plan:
        lora = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"
        return plan(
            TrainRequest(method, overrides=(*small_task, lora, *overrides), results=tmp_path / where, **request)
        )

    return planned


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder for the tests that only read the runs of others: each is trained once."""
    return tmp_path_factory.mktemp("experts") / "results"


def answers(run: Run, results: Path, *preferences: tuple[float, ...]) -> list[list[str]]:
    method, context = context_of(run, results)
    policies = [method.policy(context, preference) for preference in preferences]
    return respond_all(policies, context.task.eval_prompts, context.task.sampling(3)).responses


def runs_of(plan_: Plan) -> list[tuple[str, str]]:
    return sorted((run.record.method, run.status) for run in plan_.store.runs())


def test_experts_are_trained_once_and_counted_by_everyone(ask: Any) -> None:
    soup, found = train(ask("picky-soup"))
    assert not found
    assert runs_of(ask("picky-soup")) == [("picky", "done"), ("picky-soup", "done")]
    (expert,) = ask("picky").store.runs(method="picky")

    made: list[str] = []
    mixed, _ = train(ask("picky-soup", "by=logits"), lambda what, done, total: made.append(what))
    assert not [what for what in made if "preference" in what]  # nothing was trained for the second one
    assert len(ask("picky").store.runs(method="picky")) == 1

    assert expert.record.cost.tokens_trained > 0
    for run in (soup, mixed):
        assert run.record.cost.tokens_trained == expert.record.cost.tokens_trained
        assert run.record.seconds >= expert.record.seconds
        assert run.record.notes["experts"] == {"method": "picky", "run_id": expert.run_id}
        assert run.record.notes["diagnostics"] == {"first weight": 0.5}
    # Seconds of training count once, not on the experts' clock and on the soup's.
    assert soup.record.seconds < expert.record.seconds + 5 and mixed.record.seconds < expert.record.seconds + 5


def test_the_experts_run_is_the_one_a_user_would_ask_for(ask: Any, tmp_path: Path) -> None:
    asked = ask("picky", prefs=("1,0", "0,1"))
    made = expert_plan(ask("picky-soup"), "picky", {}, CORNERS)
    assert made.folder == asked.folder
    assert (
        expert_plan(ask("picky-soup", seed=3), "picky", {}, CORNERS).folder
        == ask("picky", prefs=("1,0", "0,1"), seed=3).folder
        != asked.folder
    )

    run, _ = train(asked)
    soup, _ = train(ask("picky-soup"))
    assert soup.record.notes["experts"]["run_id"] == run.run_id
    assert soup.record.cost.tokens_trained == run.record.cost.tokens_trained


def test_the_command_that_a_record_of_experts_tells_asks_for_them_again(ask: Any, tmp_path: Path) -> None:
    made = expert_plan(ask("picky-soup", "experts.steps=3"), "picky", {"steps": 3, "lr": 0.5}, CORNERS)
    told = record.again(made.as_given, made.seed, made.given, tmp_path / "results")
    assert told[:3] == ["train", "picky", "--task"]

    def values(option: str) -> tuple[str, ...]:
        return tuple(told[place + 1] for place, word in enumerate(told) if word == option)

    again = plan(
        TrainRequest(
            "picky",
            task=values("--task")[0],
            prefs=values("--prefs"),
            overrides=values("--set"),
            seed=int(values("--seed")[0]),
            results=Path(values("--results")[0]),
        )
    )
    assert again.folder == made.folder


@pytest.mark.slow
@pytest.mark.parametrize("by", ["weights", "logits"])
def test_corners_answer_as_the_experts_and_between_they_do_not(ask: Any, shared: Path, by: str) -> None:
    soup, _ = train(ask("picky-soup", f"by={by}", where=shared))
    (expert,) = ask("picky", where=shared).store.runs(method="picky")
    low, between, high = answers(soup, shared, *GRID)
    assert [high, low] == answers(expert, shared, *CORNERS)
    assert low != high and between not in (low, high)
    assert [low, between, high] == answers(soup, shared, *GRID)


def test_the_run_is_whole_without_its_experts(ask: Any, shared: Path, tmp_path: Path) -> None:
    soup, _ = train(ask("picky-soup", where=shared))
    before = answers(soup, shared, (0.5, 0.5))
    experts, aside = shared / "runs" / "sandbox" / "picky", tmp_path / "aside"
    experts.rename(aside)  # not a copy of the results: that has files where these may have links
    try:
        assert answers(Run.load(soup.path), shared, (0.5, 0.5)) == before
    finally:
        aside.rename(experts)


@pytest.mark.parametrize(("by", "resident"), [("weights", 1), ("logits", 2)])
def test_memory_does_not_grow_with_the_number_of_preferences(ask: Any, shared: Path, by: str, resident: int) -> None:
    soup, _ = train(ask("picky-soup", f"by={by}", where=shared))
    method, context = context_of(soup, shared)
    grid = [(step / 10, 1 - step / 10) for step in range(11)]
    result = evaluate.evaluate(method, context, grid)
    assert result.scores.shape == (8, 11, 2)
    assert len(context.task.language_model.model.peft_config) == resident
    assert (RESIDENT in context.cache) == (by == "weights")


@pytest.mark.slow
def test_an_interruption_among_the_experts_loses_nothing_that_was_saved(ask: Any, tmp_path: Path) -> None:
    def cut(what: str, done: int, total: int) -> None:
        if "preference 0,1 (2/2)" in what and done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(ask("picky-soup"), cut)
    assert runs_of(ask("picky-soup")) == [("picky", "failed"), ("picky-soup", "failed")]

    seen: list[tuple[str, int]] = []
    soup, _ = train(ask("picky-soup"), lambda what, done, total: seen.append((what, done)))
    trained = [(what, done) for what, done in seen if "preference" in what]
    assert trained == [("experts by picky: preference 0,1 (2/2)", done) for done in (3, 4)]

    whole, _ = train(ask("picky-soup", where="other"))
    for name in ("adapter-expert-0", "adapter-expert-1"):
        files = [run.path / name / "adapter_model.safetensors" for run in (soup, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert soup.record.cost.tokens_trained == whole.record.cost.tokens_trained


def test_experts_that_another_process_trains_are_waited_for(ask: Any) -> None:
    expert = expert_plan(ask("picky-soup"), "picky", {}, CORNERS)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with expert.open().lock():
            held.set()
            release.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    assert held.wait(10)
    said: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        said.append(what)
        if "waiting" in what:
            release.set()

    run, _ = train(ask("picky-soup"), progress)
    other.join()
    assert run.record.status == "done"
    assert any(what.startswith("experts by picky: waiting for") for what in said)
    assert any("preference" in what for what in said)  # the other process left it unfinished: trained here


def test_experts_that_lost_an_adapter_are_named(ask: Any, shared: Path, tmp_path: Path) -> None:
    train(ask("picky-soup", where=shared))
    shutil.copytree(shared, tmp_path / "results")
    shutil.rmtree(tmp_path / "results" / "runs" / "sandbox" / "picky-soup")
    (expert,) = ask("picky").store.runs(method="picky")
    shutil.rmtree(expert.path / "adapter-pref-1")
    with pytest.raises(
        RequestError, match=rf"{expert.run_id}: adapter-pref-1 is missing.*train it again: moalign train"
    ):
        train(ask("picky-soup", "by=logits"))


def test_wrong_settings_of_experts_are_refused_before_anything_is_written(ask: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"experts\.stpes.*did you mean '\S*steps'"):
        ask("picky-soup", "experts.stpes=3")
    assert not (tmp_path / "results").exists()

"""What ``bench`` makes of lines of metrics, of recipes and of processes; no model, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moalign.comparison import bench as workflow
from moalign.comparison import timed
from moalign.comparison.bench import BenchRequest, bench, measured, shortened
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.methods import registry
from moalign.training.settings import SftConfig


def line(run: str, phase: str, step: int, at: float, *cost: int | None) -> dict[str, Any]:
    told = dict(zip(("tokens_generated", "tokens_trained", "reward_calls"), cost, strict=True))
    return {"run": run, "phase": phase, "step": step, "at": at, **told}


# --- numbers --------------------------------------------------------------------------------------------------------


def test_times_and_rates_by_hand() -> None:
    """Three steps, five seconds of sampling, two steps; what lies before the first line counts nowhere."""
    stamps = [
        line("a", "offline", 1, 10.0, 700, 100, 80),
        line("a", "offline", 2, 11.0, 700, 200, 80),
        line("a", "offline", 3, 14.0, 700, 300, 80),
        line("a", "round-1", 1, 19.0, 1200, 400, 180),
        line("a", "round-1", 2, 21.0, 1200, 500, 180),
    ]
    told = measured(stamps, objectives=2)
    assert told["stages"] == {"offline": 2.0, "round": 2.0}  # medians of 1 and 3, and of 2
    assert told["seconds_per_step"] == 2.0 and told["steps_measured"] == 3
    assert told["tokens_trained_per_second"] == 300 / 6  # steps alone
    assert told["tokens_generated_per_second"] == 500 / 5  # the stretch in which there were any
    assert told["responses_scored_per_second"] == 100 / 5 / 2


def test_steps_of_different_runs_and_preferences_are_not_mixed() -> None:
    stamps = [
        line("a", "pref-0", 1, 0.0, 0, 10, 0),
        line("a", "pref-0", 2, 1.0, 0, 20, 0),
        line("a", "pref-1", 1, 50.0, 0, 30, 0),
        line("a", "pref-1", 2, 53.0, 0, 40, 0),
        line("b", "pref-1", 3, 99.0, 0, 9, 0),
    ]
    told = measured(stamps, 2)
    assert told["stages"] == {"pref": 2.0} and told["tokens_trained_per_second"] == 20 / 4
    assert told["tokens_generated_per_second"] is None and told["responses_scored_per_second"] is None


@pytest.mark.parametrize("stamps", [[], [line("a", "x", 1, 0.0, None, None, None)]])
def test_without_two_lines_nothing_is_known(stamps: list[dict[str, Any]]) -> None:
    told = measured(stamps, 2)
    assert told["seconds_per_step"] is None and told["steps_measured"] == 0 and told["stages"] == {}


def test_lines_without_cost_have_times_all_the_same() -> None:
    told = measured([line("a", "x", k, float(k), None, None, None) for k in (1, 2, 3)], 2)
    assert told["seconds_per_step"] == 1.0 and told["tokens_trained_per_second"] is None


# --- recipes --------------------------------------------------------------------------------------------------------


class Config(Strict):
    first: SftConfig = SftConfig(steps=400, batch=32, warmup=20)
    second: SftConfig = SftConfig(steps=0, log_every=1)
    online_prompts: int = 2000
    offline_part: int = 2000
    conditioned: bool = True


def test_only_what_says_how_long_is_cut() -> None:
    found = dict(shortened(Config(), {"steps": 8, "online_prompts": 1024}))
    assert found == {"first.steps": 8, "first.log_every": 1, "online_prompts": 1024}
    assert dict(shortened(Config(first=SftConfig(steps=3, log_every=1), online_prompts=4), {"steps": 8})) == {}


def asked(*methods: str, **more: Any) -> list[timed.TimingRequest]:
    """What the processes of a bench are asked, the first one (which prepares) included."""
    seen: list[timed.TimingRequest] = []

    def answer(ask: timed.TimingRequest, prepare: bool, title: str, progress: Any) -> dict[str, Any]:
        seen.append(ask)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_answer", answer)
        made = bench(BenchRequest(methods=methods, **more))
    assert made.content["failed"] == [] and made.exit_code == 0
    return seen


def test_a_recipe_keeps_its_batch_and_lengths() -> None:
    """Steps and samples are fewer, one preference stands for a grid; the user's own settings come last and win."""
    _, ric, modpo, moc = asked("ric", "modpo", "moc", overrides=["ric.offline.steps=5", "moc.batch=16"], steps=4)
    cuts = ["offline.log_every=1", "online.steps=4", "online.log_every=1", "online_prompts=1024"]
    assert list(ric.overrides) == [*[f"config.{cut}" for cut in cuts], "offline.steps=5"] and ric.prefs == []
    assert modpo.prefs == ["0.5,0.5"] and set(modpo.overrides) == {"config.steps=4", "config.log_every=1"}
    assert moc.overrides[-1] == "batch=16" and moc.prefs == []


def test_every_method_can_be_shortened() -> None:
    """With the recipes of the sandbox; what is cut is a setting that the method has."""
    asks = asked(*registry.names())[1:]
    assert [ask.method for ask in asks] == registry.names()
    for ask in asks:
        if registry.get(ask.method).capabilities.trains:
            assert any(text.rpartition(".")[2] == f"steps={workflow.STEPS}" for text in ask.overrides), ask


def test_without_methods_the_suite_is_measured_but_for_what_trains_nothing() -> None:
    found = [ask.method for ask in asked()[1:]]
    assert {"moc", "ric", "mod"} <= set(found) and {"prompting", "best-of-n"}.isdisjoint(found)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (BenchRequest(["rick", "mco"]), ["unknown method 'rick'", "did you mean 'ric'", "'mco'"]),
        (BenchRequest(["ric"], steps=1), ["--steps 1: allowed: 2 or more"]),
        (BenchRequest(["ric"], overrides=["bath=3"]), ["--set bath"]),
        (BenchRequest(["ric"], task="sandbx"), ["did you mean 'sandbox'"]),
    ],
)
def test_wrong_requests_start_nothing(
    request_: BenchRequest, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow, "_answer", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(RequestError) as caught:
        bench(request_)
    assert all(word in str(caught.value) for word in words)


# --- processes ------------------------------------------------------------------------------------------------------

ASK = timed.TimingRequest("ric", None, [], [], "nowhere", 0.0)


def speaking(monkeypatch: pytest.MonkeyPatch, code: str) -> list[subprocess.Popen[str]]:
    """Let a process run ``code`` instead of measuring."""
    real, started = subprocess.Popen, []

    def popen(command: list[str], **more: Any) -> Any:
        assert timed.TimingRequest(**json.loads(command[-1])).method == "ric"
        started.append(real([sys.executable, "-c", code], **more))
        return started[-1]

    monkeypatch.setattr(workflow.subprocess, "Popen", popen)
    return started


def answered(said: list[str] | None = None) -> dict[str, Any]:
    told = [] if said is None else said
    return workflow._answer(ASK, False, "ric", lambda what, done, total: told.append(f"{what} {done}/{total}"))


def test_a_process_tells_its_progress_and_then_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(
        monkeypatch,
        """print('{"progress": ["online", 1, 4]}'); print('half a li'); print('{"result": {"seconds": 2}}')""",
    )
    said: list[str] = []
    assert answered(said) == {"seconds": 2} and said == ["ric: online 1/4"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("""print('{"error": "no room", "trace": "t"}')""", "no room"),
        ("import sys; sys.exit('the disk is full')", "its process ended early (exit code 1): the disk is full"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended early (killed by signal 9)"),
    ],
)
def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, code: str, error: str) -> None:
    speaking(monkeypatch, code)
    assert answered()["error"] == error


def test_an_interruption_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """import time; print('{"progress": ["up", 0, 1]}', flush=True); time.sleep(60)"""
    (started,) = [speaking(monkeypatch, code)]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workflow._answer(ASK, False, "ric", interrupted)
    assert started[0].poll() is not None and time.monotonic() - before < 30


def test_one_that_fails_leaves_the_others_and_nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workflow.tempfile, "tempdir", str(tmp_path))
    found: list[bool] = []

    def answer(ask: timed.TimingRequest, prepare: bool, title: str, progress: Any) -> dict[str, Any]:
        runs = Path(ask.results) / "runs"
        found.append(runs.exists())
        runs.mkdir(parents=True)
        return {"error": "it broke", "trace": "where"} if ask.method == "ric" and not prepare else {"seconds": 1.0}

    def prepared(ask: timed.TimingRequest, prepare: bool, title: str, progress: Any) -> dict[str, Any]:
        return {} if prepare else answer(ask, prepare, title, progress)

    monkeypatch.setattr(workflow, "_answer", prepared)
    made = bench(BenchRequest(["ric", "sft", "moc"]))
    assert [row["status"] for row in made.content["rows"]] == ["failed", "done", "done"]
    assert made.content["failed"] == ["ric"] and made.exit_code == 1 and made.traces == ["where"]
    assert found == [False] * 3, "no method finds what another has trained"
    assert list(tmp_path.iterdir()) == []
    assert made.content["machine"]["cpus"] >= 1 and made.content["machine"]["torch"]

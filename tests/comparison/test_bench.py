"""What ``bench`` makes of lines of metrics, of recipes and of processes; no model, no torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moalign.comparison import bench as workflow
from moalign.comparison import executors
from moalign.comparison.bench import BenchRequest, bench, shortened
from moalign.comparison.timed import BenchRow, Stamp, Timing, TimingRequest, measured
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.methods import registry
from moalign.training.settings import SftConfig


def line(run: str, phase: str, step: int, at: float, *cost: int | None) -> Stamp:
    counts = dict(zip(("tokens_generated", "tokens_trained", "reward_calls"), cost, strict=True))
    return Stamp(run=run, phase=phase, step=step, at=at, **counts)


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
    rates = measured(stamps, objectives=2)
    assert rates["stages"] == {"offline": 2.0, "round": 2.0}  # medians of 1 and 3, and of 2
    assert rates["seconds_per_step"] == 2.0 and rates["steps_measured"] == 3
    assert rates["tokens_trained_per_second"] == 300 / 6  # steps alone
    assert rates["tokens_generated_per_second"] == 500 / 5  # the stretch in which there were any
    assert rates["responses_scored_per_second"] == 100 / 5 / 2


def test_steps_of_different_runs_and_preferences_are_not_mixed() -> None:
    stamps = [
        line("a", "pref-0", 1, 0.0, 0, 10, 0),
        line("a", "pref-0", 2, 1.0, 0, 20, 0),
        line("a", "pref-1", 1, 50.0, 0, 30, 0),
        line("a", "pref-1", 2, 53.0, 0, 40, 0),
        line("b", "pref-1", 3, 99.0, 0, 9, 0),
    ]
    rates = measured(stamps, 2)
    assert rates["stages"] == {"pref": 2.0} and rates["tokens_trained_per_second"] == 20 / 4
    assert rates["tokens_generated_per_second"] is None and rates["responses_scored_per_second"] is None


@pytest.mark.parametrize("stamps", [[], [line("a", "x", 1, 0.0, None, None, None)]])
def test_without_two_lines_nothing_is_known(stamps: list[Stamp]) -> None:
    rates = measured(stamps, 2)
    assert rates["seconds_per_step"] is None and rates["steps_measured"] == 0 and rates["stages"] == {}


def test_lines_without_cost_have_times_all_the_same() -> None:
    rates = measured([line("a", "x", k, float(k), None, None, None) for k in (1, 2, 3)], 2)
    assert rates["seconds_per_step"] == 1.0 and rates["tokens_trained_per_second"] is None


# --- recipes --------------------------------------------------------------------------------------------------------


class Config(Strict):
    first: SftConfig = SftConfig(steps=400, batch=32, warmup=20)
    second: SftConfig = SftConfig(steps=0, log_every=1)
    online_prompts: int = 2000
    offline_part: int = 2000
    conditioned: bool = True


def test_only_what_says_how_long_is_cut() -> None:
    settings = dict(shortened(Config(), {"steps": 8, "online_prompts": 1024}))
    assert settings == {"first.steps": 8, "first.log_every": 1, "online_prompts": 1024}
    assert dict(shortened(Config(first=SftConfig(steps=3, log_every=1), online_prompts=4), {"steps": 8})) == {}


def requests(*methods: str, **more: Any) -> list[TimingRequest]:
    """What the processes of a bench are asked, the first one (which prepares) included."""
    seen: list[TimingRequest] = []

    def answer(request: TimingRequest, title: str, progress: Any) -> Timing:
        seen.append(request)
        return Timing(row=request.row(status="done"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workflow, "_timed_apart", answer)
        assert bench(BenchRequest(methods=methods, **more)).failed == []
    assert [request.prepare for request in seen] == [True, *[False] * (len(seen) - 1)]
    return seen


def test_a_recipe_keeps_its_batch_and_lengths() -> None:
    """Steps and samples are fewer, one preference stands for a grid; the user's own settings come last and win."""
    _, ric, modpo, moc = requests("ric", "modpo", "moc", overrides=["ric.offline.steps=5", "moc.batch=16"], steps=4)
    cuts = ["offline.log_every=1", "online.steps=4", "online.log_every=1", "online_prompts=1024"]
    assert ric.overrides == [*[f"config.{cut}" for cut in cuts], "offline.steps=5"] and ric.prefs == []
    assert modpo.prefs == ["0.5,0.5"] and set(modpo.overrides) == {"config.steps=4", "config.log_every=1"}
    assert moc.overrides[-1] == "batch=16" and moc.prefs == []


def test_every_method_can_be_shortened() -> None:
    """With the recipes of the sandbox; what is cut is a setting that the method has."""
    timings = requests(*registry.names())[1:]
    assert [timing.method for timing in timings] == registry.names()
    for timing in timings:
        if registry.get(timing.method).capabilities.trains:
            assert any(text.rpartition(".")[2] == f"steps={workflow.STEPS}" for text in timing.overrides), timing


def test_without_methods_the_suite_is_measured_but_for_what_trains_nothing() -> None:
    measured_ = [timing.method for timing in requests()[1:]]
    assert {"moc", "ric", "mod"} <= set(measured_) and {"prompting", "best-of-n"}.isdisjoint(measured_)


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
    monkeypatch.setattr(workflow, "_timed_apart", lambda *_: pytest.fail("a process was started"))
    with pytest.raises(RequestError) as caught:
        bench(request_)
    assert all(word in str(caught.value) for word in words)


# --- processes ------------------------------------------------------------------------------------------------------

REQUEST = TimingRequest(method="ric", task=None, prefs=[], overrides=[], results="nowhere")


def speaking(monkeypatch: pytest.MonkeyPatch, code: str) -> list[subprocess.Popen[bytes]]:
    """Let a process run ``code``, once it was rates what to do, instead of measuring."""
    real, started = subprocess.Popen, []
    asked = "import json, sys; assert json.loads(sys.stdin.readline())['method'] == 'ric'\n"

    def popen(command: list[str], **more: Any) -> Any:
        assert command[-1] == "moalign.comparison.timed"
        started.append(real([sys.executable, "-c", asked + code], **more))
        return started[-1]

    monkeypatch.setattr(executors.subprocess, "Popen", popen)
    return started


def answered(reports: list[str] | None = None) -> BenchRow:
    shown = [] if reports is None else reports
    return workflow._timed_apart(REQUEST, "ric", lambda *report: shown.append("{} {}/{}".format(*report))).row


def test_a_process_tells_its_progress_and_then_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(row=REQUEST.row(status="done", seconds=2)).model_dump_json()
    speaking(monkeypatch, f"""print('["online", 1, 4]'); print({timing!r})""")
    reports: list[str] = []
    assert answered(reports).seconds == 2 and reports == ["ric: online 1/4"]


@pytest.mark.parametrize("end", ["", "; sys.exit('and what it said last')"])
def test_the_failure_that_a_process_reports_is_taken_with_its_trace(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    failed = Timing(row=REQUEST.row(status="failed", error="it broke"), trace="Traceback: in ric")
    speaking(monkeypatch, f"""print('["online", 1, 4]'); print({failed.model_dump_json()!r}){end}""")
    assert workflow._timed_apart(REQUEST, "ric", lambda *_: None) == failed


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("""print('["a", 1, 2]'); print('{"half a li', end="")""", "its process ended early (exit code 0)"),
        ("import sys; sys.exit('the disk is full')", "its process ended early (exit code 1): the disk is full"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended early (killed by signal 9)"),
    ],
)
def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, code: str, error: str) -> None:
    speaking(monkeypatch, code)
    assert answered().error == error


def test_an_interruption_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started = speaking(monkeypatch, """import time; print('["up", 0, 1]', flush=True); time.sleep(60)""")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        workflow._timed_apart(REQUEST, "ric", interrupted)
    assert started[0].poll() is not None and time.monotonic() - before < 30


def test_one_that_fails_leaves_the_others_and_nothing_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workflow.tempfile, "tempdir", str(tmp_path))
    left: list[bool] = []

    def answer(request: TimingRequest, title: str, progress: Any) -> Timing:
        if request.prepare:
            return Timing(row=request.row(status="done"))
        runs = Path(request.results) / "runs"
        left.append(runs.exists())
        runs.mkdir(parents=True)
        if request.method == "ric":
            return Timing(row=request.row(status="failed", error="it broke"), trace="where")
        return Timing(row=request.row(status="done", seconds=1.0))

    monkeypatch.setattr(workflow, "_timed_apart", answer)
    made = bench(BenchRequest(["ric", "sft", "moc"]))
    assert [row.status for row in made.rows] == ["failed", "done", "done"]
    assert made.failed == ["ric"] and made.traces == ["where"] and "traces" not in made.content
    assert left == [False] * 3, "no method finds what another has trained"
    assert list(tmp_path.iterdir()) == []
    assert made.machine["cpus"] >= 1 and made.machine["torch"]

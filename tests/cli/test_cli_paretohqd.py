"""ParetoHqD as a user types it: train, find again, evaluate, answer, compare, and every wrong request."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moalign.runs.store import RunStore

STAGE = "{steps: 2, batch: 4, max_tokens: 48, checkpoint_every: 1}"
SPLITS = "task.splits={train: 0.7, calibration: 0.1, eval: 0.2}"  # 505 training prompts, 8080 logged responses
SMALL = (
    SPLITS,
    "k=8",
    "min_pool=24",
    f"first={STAGE}",
    f"second={STAGE}",
    "augment_prompts=24",
    "policy.lora={r: 4, alpha: 8}",
)


def sets(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


@pytest.fixture
def command(small_task: tuple[str, ...]) -> list[str]:
    return ["train", "paretohqd", "--task", "sandbox", *sets(*small_task, *SMALL)]


@pytest.mark.slow
def test_train_eval_generate_compare(moalign: Any, command: list[str], small_task: tuple[str, ...]) -> None:
    ended = moalign(*command, "--json")
    assert ended.code == 0
    content = json.loads(ended.out)
    assert [point["prefs"] for point in content["evaluation"]["points"]] == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert set(content["notes"]["augment"]["1,0"]["causes"]) == {"short", "repetitive", "loop"}
    assert content["cost"]["tokens_generated"] > 0

    again = json.loads(moalign(*command, "--json").out)
    assert again["found"] is True
    assert again["evaluation"] == content["evaluation"]

    run = content["run"]
    volume = json.loads(moalign("eval", run, "--json").out)["hypervolume"]
    assert volume == content["evaluation"]["hypervolume"]
    part = moalign("eval", run, "--prefs", "0.5,0.5", "--json")
    assert part.code == 0
    middle = json.loads(part.out)["points"]
    assert [point["prefs"] for point in middle] == [[0.5, 0.5]]
    assert middle[0]["mean"] == content["evaluation"]["points"][1]["mean"]
    answers = moalign("generate", run, "how do i make soup today ?", "--prefs", "1,0")
    assert answers.code == 0
    assert answers.out.strip()

    anchor = moalign("train", "sft", "--task", "sandbox", *sets(*small_task, SPLITS, "steps=2", "batch=4"), "--json")
    compared = moalign("compare", run, json.loads(anchor.out)["run"], "--json")
    assert compared.code == 0
    assert {"paretohqd", "sft"} <= set(json.dumps(json.loads(compared.out)).replace('"', " ").split())

    for verb in (["eval", run, "--prefs", "0.3,0.7"], ["generate", run, "hello", "--prefs", "0.3,0.7"]):
        refused = moalign(*verb)
        assert refused.code == 2
        assert len(refused.errors) == 1
        assert "0.3,0.7" in refused.errors[0]
        assert "0,1; 0.5,0.5; 1,0" in refused.errors[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["k=1"], ["k", "found 1"]),
        (["k=many"], ["k", "many"]),
        (["min_pol=3"], ["min_pol", "did you mean", "min_pool"]),
        (["first.step=3"], ["step", "did you mean", "steps"]),
        (["first.lr=0"], ["first.lr", "0"]),
        (["temperature=-1"], ["temperature"]),
        (["top_p=1.5"], ["top_p"]),
        (["augment_prompts=0"], ["augment_prompts"]),
        (["second.batch=6", "second.accumulate=4"], ["batch must be a multiple of accumulate"]),
    ],
)
def test_wrong_settings_end_with_exit_code_2_and_leave_nothing(
    moalign: Any, command: list[str], settings: list[str], words: list[str]
) -> None:
    ended = moalign(*command, *sets(*settings))
    assert ended.code == 2
    for word in words:
        assert word in ended.err
    assert "Traceback" not in ended.err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["k=506", "augment_prompts=600"], ["k = 506", "505 prompts", "allowed: k <= 505"]),
        (["min_pool=8081"], ["min_pool = 8081", "8080 scored responses"]),
        (["k=60", "augment_prompts=20"], ["stage 2", "30 different prompts", "k <= 41"]),
    ],
)
def test_what_the_data_cannot_give_is_refused_before_any_step(
    moalign: Any, command: list[str], settings: list[str], words: list[str]
) -> None:
    ended = moalign(*command, *sets(*settings))
    assert ended.code == 2
    assert len(ended.errors) == 1
    for word in words:
        assert word in ended.errors[0]
    assert RunStore("results").runs() == []


@pytest.mark.slow
def test_a_grid_of_one_and_preferences_of_ones_own(moalign: Any, command: list[str]) -> None:
    content = json.loads(moalign(*command, "--prefs", "0.9,0.1", "--json").out)
    assert [point["prefs"] for point in content["evaluation"]["points"]] == [[0.9, 0.1]]
    assert list(content["notes"]["augment"]) == ["0.9,0.1"]
    ended = moalign(*command, "--prefs", "0.9,0.2")
    assert ended.code == 2
    assert "sum to 1.1" in ended.errors[0]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_it_never_was(
    moalign: Any, command: list[str], small_task: tuple[str, ...], tmp_path: Path
) -> None:
    """kill -9 wherever it happens to be, five times; then the same command, and the same bytes."""
    longer = sets(*(f"{stage}={STAGE.replace('steps: 2', 'steps: 12')}" for stage in ("first", "second")))
    typed = [*command, *longer, "--no-eval", "--json"]
    whole = Path(json.loads(moalign(*typed, "--results", "whole").out)["run"])
    environment = {**os.environ, "MOALIGN_THREADS": "1"}
    killed = 0
    for wait in (0.5, 1.0, 1.5, 2.5, 3.5):
        process = subprocess.Popen(
            [sys.executable, "-m", "moalign", *typed, "--results", "killed"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        folder = tmp_path / "killed"
        while process.poll() is None and not list(folder.glob("runs/*/*/*/run.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        before = _stamp(folder)
        while process.poll() is None and _stamp(folder) == before:  # until it works on the run, then a while longer
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    run = Path(json.loads(moalign(*typed, "--results", "killed").out)["run"])
    names = sorted(path.relative_to(whole) for path in whole.glob("adapter*/*"))
    assert len(names) == 6
    assert sorted(path.relative_to(run) for path in run.glob("adapter*/*")) == names
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    records = [json.loads((path / "run.json").read_text(encoding="utf-8")) for path in (run, whole)]
    assert records[0]["notes"] == records[1]["notes"]
    for counter in ("tokens_generated", "tokens_trained", "reward_calls"):
        assert records[0]["cost"][counter] == records[1]["cost"][counter]


def _stamp(folder: Path) -> float:
    result = [path.stat().st_mtime for path in folder.glob("runs/*/*/*/*")]
    return max(result, default=0.0)

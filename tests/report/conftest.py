"""A comparison as ``compare`` records it, made from score matrices."""

from __future__ import annotations

import base64
import copy
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign.comparison.ranking import EntryRuns, SeedResult, ranking
from moalign.comparison.result import RunSummary
from moalign.config.card import EvaluationSpec
from moalign.core import preferences
from moalign.evaluation.evaluate import Evaluation, judge
from moalign.evaluation.result import AnsweringCost, EvalResult, Quality
from moalign.report import verdict

NAMES = ["helpfulness", "harmlessness", "humor", "brevity"]


def _entry(label: str, gain: float, grid: Any, on: Any, seeds: int, rate: float) -> EntryRuns:
    m = len(on.names)
    runs, finished = [], []
    for seed in range(seeds):
        noise = np.random.default_rng([seed, m]).normal(0, 0.2, (50, len(grid), m))
        noise -= noise.mean(axis=0)
        table = np.sqrt(np.array(grid)) * (0.6 + gain) + 0.1 + 0.01 * seed + noise
        result = EvalResult(
            **dict(judge(on, grid, table)),
            run=f"results/{label}",
            run_id=label,
            method=label,
            task="toy",
            card_hash="0123456789abcdef",
            seed=seed,
            objectives=tuple(on.names),
            samples=1,
            quality=Quality(rate=rate, causes={"short": rate}, mean_length=21.0, distinct_3=0.99),
            cost=AnsweringCost(tokens_generated=32071, reward_calls=2816, seconds=1.3),
        )
        cost = {
            "tokens_generated": 45283,
            "tokens_trained": 1358367,
            "reward_calls": 4000,
            "seconds": 60.7,
            "peak_memory_bytes": 735465472,
        }
        finished.append(SeedResult(seed, Evaluation(result, table), cost))
        command = f"moalign train {label} --task toy --seed {seed}"
        runs.append(RunSummary(run=f"results/{label}", run_id=label, seed=seed, status="done", command=command))
    return EntryRuns(label, label, runs, finished)


@pytest.fixture(scope="session")
def compared() -> Callable[..., dict[str, Any]]:
    """``compared({"a": 0.1, "b": 0.0}, objectives=2, seeds=1, optimum=True, dead=["c"], rates={"a": 0.1})``."""
    built: dict[str, dict[str, Any]] = {}

    def build(
        gains: dict[str, float],
        objectives: int = 2,
        seeds: int = 1,
        optimum: bool = True,
        dead: tuple[str, ...] = (),
        rates: dict[str, float] | None = None,
    ) -> dict[str, Any]:
        key = repr((gains, objectives, seeds, optimum, dead, rates))
        if key not in built:
            built[key] = _record(gains, objectives, seeds, optimum, dead, rates or {})
        return copy.deepcopy(built[key])

    return build


def _record(
    gains: dict[str, float], objectives: int, seeds: int, optimum: bool, dead: tuple[str, ...], rates: dict[str, float]
) -> dict[str, Any]:
    grid = preferences.grid(objectives, 10 if objectives == 2 else 4)
    names = NAMES[:objectives]
    best = np.sqrt(np.array(grid)) + 0.1 if optimum else None
    on: Any = SimpleNamespace(
        card=SimpleNamespace(
            evaluation=EvaluationSpec(bootstrap=100, seed=3),
            reference_point=[0.0] * objectives,
            sensitivity_point=[-0.1] * objectives,
        ),
        names=names,
        judge_normaliser=SimpleNamespace(lo=[0.0] * objectives, hi=[1.0] * objectives, unit=np.asarray),
        eval_prompts=[],
        optimum=lambda requested, prompts: best,
    )
    rows = [_entry(label, gain, grid, on, seeds, rates.get(label, 0.0)) for label, gain in gains.items()]
    for label in dead:
        command = f"moalign train {label} --task toy --seed 0"
        error = "WorkError: out of | memory"
        run = RunSummary(run=label, run_id=label, seed=0, status="failed", error=error, command=command)
        rows.append(EntryRuns(label, label, [run]))
    record: dict[str, Any] = {
        "task": "toy",
        "description": "made up",
        "card_hash": "0123456789abcdef",
        "objectives": names,
        "ref": [0.0] * objectives,
        "grid": [list(w) for w in grid],
        "prompts": 50,
        "samples": 1,
        "draws": 100,
        "level": 0.95,
        "bounds": {"lo": [-5.0] * objectives, "hi": [5.0] * objectives},
        **ranking(rows, grid, 100, 3).content,
        "failed": list(dead),
        "command": "moalign compare --task toy",
        "environment": {"python": "3.11.7", "packages": {"torch": "2.13"}, "commit": "abcdef0123456789", "dirty": True},
        "reported": [],
        "figures": {},
        "html": None,
        "figure": "results/compare/toy-1/fronts.png",
        "markdown": "results/compare/toy-1/compare.md",
        "json": "results/compare/toy-1/compare.json",
    }
    record["verdict"] = verdict.sentences(record)
    return record


class Browser:
    """A headless Chromium, spoken to over its debugging pipe; nothing but the standard library is needed."""

    def __init__(self, program: str, profile: Path) -> None:
        commands, self._out = os.pipe()
        self._in, replies = os.pipe()
        # Out of the way of 3 and 4, which the browser reads and writes.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, replies)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --no-first-run"
        self._process = subprocess.Popen(
            [program, *flags.split(), "--window-size=1280,1600", f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=place,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, replies, *ends):
            os.close(end)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, command: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": command, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._number:
                self.events.append(answer)
                continue
            assert "error" not in answer, answer["error"]
            result: dict[str, Any] = answer["result"]
            return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            more = os.read(self._in, 1 << 16) if ready else b""
            assert more, "the browser has gone, or says nothing for a minute"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        result: dict[str, Any] = json.loads(message)
        return result

    def open(self, path: Path, fragment: str = "") -> None:
        """Open a file and wait until its answers are there."""
        self.events.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=path.as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'answers'")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def key(self, name: str) -> None:
        """Press a key where the focus is."""
        codes = {"ArrowRight": 39, "ArrowLeft": 37, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])

    def pointer(self, selector: str, click: bool = False) -> None:
        """Move the pointer to the middle of an element, and click it if asked to."""
        box = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{box}.scrollIntoView({{block: 'center'}})")
        middle = "({x, y, width, height}) => [x + width / 2, y + height / 2]"
        x, y = self.run(f"({middle})({box}.getBoundingClientRect())")
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, selector: str | None = None, dark: bool = False) -> bytes:
        """Return a PNG of the whole page, or of one element."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        more: dict[str, Any] = {"captureBeyondViewport": True}
        if selector is not None:
            box = self.run(
                f"(({{x, y, width, height}}) => ({{x: x + scrollX, y: y + scrollY, width, height, scale: 1}}))"
                f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
            )
            more["clip"] = box
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", **more)["data"])

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; tests that need it are skipped where there is none."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here (on Debian: apt-get install chromium)")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()

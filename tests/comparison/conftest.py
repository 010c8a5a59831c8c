"""Toy methods whose scores are known, a card for them, and a comparison of them; no model, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest

from moalign.comparison import jobs
from moalign.comparison.compare import CompareRequest, compare
from moalign.comparison.result import CompareResult
from moalign.config.strict import Strict
from moalign.core.errors import WorkError
from moalign.core.preferences import label
from moalign.evaluation import evaluate
from moalign.evaluation.answers import Answered
from moalign.evaluation.divergence import KlToBase
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.report import figures
from moalign.tasks.task import Task
from moalign.training.job import Job, RunContext

CARD = """
name: toy
kind: sandbox
description: scores made up by the tests
objectives:
  - {name: helpfulness, kind: sandbox}
  - {name: harmlessness, kind: sandbox}
sandbox: {base: warm}
normaliser:
  helpfulness: {mean: 0, sd: 1, lo: 0, hi: 1}
  harmlessness: {mean: 0, sd: 1, lo: 0, hi: 1}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
grid: 3
evaluation: {prompts: 40, samples: 1, seed: 5, bootstrap: 100}
suite: [good, bad]
"""


class Tuning(Strict):
    rounds: int = 4


class Config(Strict):
    gain: float = 0.0
    base: str = "/models/one-and-the-same-folder/small"
    tuning: Tuning = Tuning()
    fail: bool = False
    fail_seed: int | None = None


def toy(method: str, base: float = 0.0, config: type[Strict] = Config, **able: Any) -> Any:
    """A method whose mean scores are known: ``w + base + gain``, with noise that all methods share per prompt."""

    class Toy:
        name: ClassVar[str] = method
        summary: ClassVar[str] = "a toy"
        capabilities: ClassVar[Capabilities] = Capabilities(**able)
        Config: ClassVar[type[Strict]] = config

        def train(self, job: Job) -> None:
            if getattr(job.config, "fail", False) or getattr(job.config, "fail_seed", None) == job.seed:
                raise WorkError("the optimiser walked off")
            job.meter.add_tokens_trained(1000)

        def policy(self, context: RunContext, preference: Any) -> Any:
            raise AssertionError("the tests answer for it")

        def level(self, context: RunContext) -> float:
            return base + getattr(context.config, "gain", 0.0)

    return Toy()


class Settled(Strict):
    """A config without ``gain``."""


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    toys = {
        "good": toy("good", 0.3),
        "bad": toy("bad", 0.0),
        "fixed": toy("fixed", 0.1, Settled, trains=False),
        "own-only": toy("own-only", 0.2, steerable=False),
    }
    monkeypatch.setattr(registry, "names", lambda: sorted(toys))
    monkeypatch.setattr(registry, "get", toys.__getitem__)
    monkeypatch.setattr(jobs, "HEAVY", ())
    monkeypatch.setattr(evaluate, "respond", respond)
    # Without these no tokenizer is loaded, which takes longer than all the rest.
    monkeypatch.setattr(Task, "overlong", lambda self: {})
    monkeypatch.setattr(Task, "short_below", 6)
    monkeypatch.setattr(Task, "tokens", lambda self, texts: [text.split() for text in texts])
    monkeypatch.setattr(figures, "ALL", {"fronts": lambda record, suffix: FIGURES[suffix]})
    yield


FIGURES = {".png": b"\x89PNG a figure", ".svg": b"<?xml a figure"}
"""Stand in for drawings, which take seconds; one test below draws them all."""


def respond(method: Any, context: RunContext, requested: Any, samples: int, *_: Any) -> Answered:
    prompts = context.task.eval_prompts
    noise = np.random.default_rng(3).normal(0, 0.3, (len(prompts), 2)) + 0.01 * context.run.record.seed
    rows = [
        {
            "prompt": prompt,
            "preference": label(w),
            "response": "one two three four five six",
            "helpfulness": w[0] + method.level(context) + noise[i, 0],
            "harmlessness": w[1] + method.level(context) + noise[i, 1],
        }
        for w in requested
        for i, prompt in enumerate(prompts)
        for _ in range(samples)
    ]
    unknown = [KlToBase(None)] * len(requested)
    return Answered(pd.DataFrame(rows), unknown, 6 * len(rows), 2 * len(rows), seconds=1.0, peak_memory_bytes=2**20)


@pytest.fixture
def card(tmp_path: Path) -> str:
    path = tmp_path / "toy" / "task.yaml"
    path.parent.mkdir()
    path.write_text(CARD, encoding="utf-8")
    return str(path)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def ask(card: str, results: Path, **more: Any) -> CompareResult:
    return compare(CompareRequest(**{"task": card, "results": results, **more}))


def by_label(compared: CompareResult) -> dict[str, dict[str, Any]]:
    return {row["label"]: row for row in compared.content["rows"]}


PUBLISHED = sorted((Path(__file__).parents[2] / "results" / "published").glob("*/compare.json"))
"""The records of the comparisons that are kept in this checkout."""


def older(path: Path) -> dict[str, Any]:
    """A comparison without what the first version that wrote records did not hold."""
    content: dict[str, Any] = json.loads(path.read_text())
    for key in ("samples", "bounds", "figures", "reported", "html"):
        del content[key]
    for row in content["rows"]:
        for key in ("curves", "gap", "generalisation", "diagnostics"):
            del row[key]
        del row["quality"]["kl"], row["quality"]["kl_bound"]
        for run in row["runs"]:
            del run["made"]
    for pair in content["pairs"]:
        del pair["inner_product"]
    return content

"""The command line as a user types it, in this process, with a tiny method that trains in no time."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from moalign.cli import main as cli
from moalign.config.strict import Strict
from moalign.core.errors import RequestError, WorkError
from moalign.core.preferences import Preference, label
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.rewards.normaliser import Normaliser
from moalign.tasks.task import Task
from moalign.training.job import Job, RunContext


class ToyConfig(Strict):
    """Settings of the toy method."""

    steps: int = 3
    """Steps that do nothing."""
    fail: str = ""
    """How training ends: work, request, bug, interrupt, terminate, remove or move; empty: well."""


class Speaker:
    """Says one of two well-formed sandbox responses, by the first weight written before the prompt."""

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: object) -> tuple[list[str], int]:
        from moalign.tasks.sandbox import world

        last = [len(slot) - 1 for slot in world.SLOTS]
        picks = [tuple(0 if float(text.split(",")[0]) > 0.5 else slot for slot in last) for text in texts]
        return [world.response_text(pick) for pick in picks], 7 * len(texts)


class Toy:
    """A method without a model."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "does nothing, quickly"
    capabilities: ClassVar[Capabilities] = Capabilities()
    Config: ClassVar[type[ToyConfig]] = ToyConfig

    def train(self, job: Job) -> None:
        """Count to ``steps``."""
        for step in range(job.config.steps):
            job.progress("training", step + 1, job.config.steps)
        print("a library that prints")
        if job.config.fail == "interrupt":
            raise KeyboardInterrupt
        if job.config.fail == "terminate":
            job.run.save_checkpoint("train", 1, {}, {})
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        if job.config.fail == "remove":
            shutil.rmtree(job.run.path)
            return
        if job.config.fail == "move":
            job.run.path.rename(job.run.path.with_name("moved"))
            job.run.log(1, loss=0.5)
        if job.config.fail:
            kind = {"work": WorkError, "request": RequestError, "bug": ZeroDivisionError}[job.config.fail]
            raise kind("it broke\nhere" if kind is ZeroDivisionError else "it broke")
        job.meter.add_tokens_trained(11)
        job.notes["dropped"] = 2

    def policy(self, context: RunContext, preference: Preference) -> object:
        """Answer by the first weight."""
        from moalign.policies.policy import Policy

        speaker = context.cache.setdefault("speaker", Speaker())
        return Policy(speaker, lambda prompt: f"{label(preference)} {prompt}")


class FixedToy(Toy):
    """The same with one policy per preference."""

    name: ClassVar[str] = "fixed-toy"
    capabilities: ClassVar[Capabilities] = Capabilities(one_policy=False, steerable=False)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the toy methods known, and give the sandbox a normaliser and tokens without its base."""
    names, get = registry.names, registry.get
    made = {"toy": Toy, "fixed-toy": FixedToy}
    monkeypatch.setattr(registry, "names", lambda: sorted([*names(), *made]))
    monkeypatch.setattr(registry, "get", lambda name: made[name]() if name in made else get(name))
    monkeypatch.setattr(Task, "_fit_normaliser", _normaliser)
    monkeypatch.setattr(Task, "tokens", lambda self, texts: [text.split() for text in texts])
    monkeypatch.setattr(Task, "short_below", 5)


def _normaliser(task: Task, *panel: object) -> Normaliser:
    m = len(task.names)
    return Normaliser(tuple(task.names), (0.0,) * m, (2.0,) * m, (-8.0,) * m, (8.0,) * m, ((-8.0, 8.0),) * m)


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that are errors."""
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


Moalign = Callable[..., Ended]


@pytest.fixture
def moalign(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Moalign]:
    """``moalign("train", "toy")`` in an empty folder; what it leaves in the environment is taken away again."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Ended:
        capsys.readouterr()
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    yield run
    os.environ.clear()
    os.environ.update(before)

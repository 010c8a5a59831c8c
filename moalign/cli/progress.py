"""Progress of long work on stderr: a bar with rate and time left on a terminal, else one line every few seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from moalign.cli import output
from moalign.core.text import visible
from moalign.report.units import duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

EVERY = 3.0
"""Seconds between two lines where there is no terminal."""
SHOWN = 12
"""Bars on a terminal; finished ones make room for new ones."""


def progress_display(
    stream: TextIO, terminal: bool | None = None, clock: Callable[[], float] = time.monotonic
) -> Lines | Bars:
    """Return what to call as ``progress(what, done, total)``, a context manager; ``terminal`` None asks the stream."""
    return Bars(stream) if (stream.isatty() if terminal is None else terminal) else Lines(stream, clock)


@dataclass
class _Stage:
    """What lines remember of a stage."""

    started: float
    first: int
    """Steps that were done when it was first heard of: a resumed stage begins in the middle, which took no time."""
    shown: bool = False
    finished: bool = False


class Lines(contextlib.AbstractContextManager["Lines"]):
    """One line every few seconds, and one at the end of a stage that had lines; stages may go on side by side."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self.stream = stream
        self.clock = clock
        self.last = clock()
        self.stages: dict[str, _Stage] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are done."""
        now, done = self.clock(), min(done, total)
        stage = self.stages.get(what)
        if stage is None or (stage.finished and done < total):
            stage = self.stages[what] = _Stage(now, done)
        ends = done >= total and not stage.finished
        stage.finished = done >= total
        if now - self.last >= EVERY or (ends and stage.shown):
            self.last, stage.shown = now, True
            try:
                print(visible(self._line(what, stage, done, total, now)), file=self.stream, flush=True)
            except OSError:  # whoever read it has gone, or the disk of a log is full: the work goes on
                output.discard(self.stream)

    def _line(self, what: str, stage: _Stage, done: int, total: int, now: float) -> str:
        text = f"{what} {done}/{total}"
        seconds, steps = now - stage.started, done - stage.first
        if seconds <= 0 or steps <= 0:
            return text
        rate = steps / seconds
        if done >= total:
            return f"{text}, {_rate(rate)}, {duration(seconds)}"
        return f"{text}, {_rate(rate)}, {duration((total - done) / rate)} left"

    def __exit__(self, *_: object) -> None:
        """Lines need no end."""


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate < 10 else f"{rate:.0f}/s"


class Bars(contextlib.AbstractContextManager["Bars"]):
    """A bar per stage with count, rate and time left; the last finished stages stay visible while work goes on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bars: RichProgress | None = None
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are done."""
        bars, done = self.bars or self._start(), min(done, total)
        if what not in self.tasks:
            self._make_room(bars)
            self.tasks[what] = bars.add_task(visible(what), total=total, completed=done, rate="")
        task = self.tasks[what]
        state = next(bar for bar in bars.tasks if bar.id == task)
        if state.finished and done < total:
            bars.reset(task)  # the same stage once more, as in a second round
        bars.update(task, completed=done, total=total)
        speed = state.finished_speed or state.speed
        bars.update(task, rate=_rate(speed) if speed else "")

    def _make_room(self, bars: RichProgress) -> None:
        """Take the oldest finished stages away: a grid has more of them than a terminal has lines."""
        done = {bar.id for bar in bars.tasks if bar.finished}
        finished = [what for what, task in self.tasks.items() if task in done]
        for what in finished[: max(0, len(self.tasks) + 1 - SHOWN)]:
            bars.remove_task(self.tasks.pop(what))

    def _start(self) -> RichProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        ]
        self.bars = Progress(*columns, console=Console(file=self.stream), redirect_stdout=False, redirect_stderr=True)
        self.bars.start()
        return self.bars

    def __exit__(self, *_: object) -> None:
        """Put the bars away, also when the work failed."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

"""Snapshots: the adapters as they were along training, for curves of what a method gains and what of it is true.

A run with ``snapshots: K`` keeps the adapter in training at K steps of each of its stages as
``<run>/snapshots/<part>-<step>/<adapter>``. ``<adapter>`` is the folder's name under which the finished run keeps the
same adapter, ``<part>`` the stage's name without the vector's number: so all vectors of a method with an adapter for
each share a folder, and a policy that finds its adapters there answers as it would have at that step.

Steps are spaced quadratically, ``ceil(steps (k / K)^2)``: most of the way from the base is covered early.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moalign.core.errors import RequestError
from moalign.runs.run import SNAPSHOTS

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.runs.run import Run
    from moalign.training.job import Job


@dataclass(frozen=True)
class Trained:
    """Which adapter a job trains now."""

    adapter: str = "adapter"
    """The folder in which the finished run keeps it."""
    stage: str = ""
    """What names of phases begin with; empty: the adapter is the run's only one."""
    walk: str = ""
    """What stands in its place in the names of parts."""
    before: int = 0
    """Steps of the part that earlier phases did, where several make one."""
    total: int = 0
    """Steps of such a part; 0: those of the phase."""


@dataclass(frozen=True)
class Snapshot:
    """A point of a run's training."""

    part: str
    step: int
    share: float
    """Of the run's steps that were done, 0 to 1."""
    folder: str
    """Inside the run; empty: of the finished run itself, whose adapters are those of the last snapshot."""


def steps_of(steps: int, count: int) -> list[int]:
    """Return the steps of a stage at which ``count`` snapshots are taken, fewer where some coincide.

    >>> steps_of(100, 4), steps_of(3, 4), steps_of(100, 0)
    ([7, 25, 57, 100], [1, 2, 3], [])
    """
    return sorted({-(-steps * k * k // count**2) for k in range(1, count + 1)} - {0})


def keep(job: Job, lm: LanguageModel, phase: str, step: int, steps: int) -> None:
    """Save the adapter in training where one is due after ``step`` of a phase's ``steps``; draws no random number."""
    if not job.snapshots:
        return
    now = job.trained
    part = now.walk + phase.removeprefix(now.stage)
    step, steps = now.before + step, now.total or steps
    job.notes.setdefault(SNAPSHOTS, {})[part] = steps
    if step in steps_of(steps, job.snapshots):
        from moalign.lm import adapters

        adapters.save(lm, job.run.folder(f"{SNAPSHOTS}/{part}-{step}/{now.adapter}"))


def kept(run: Run) -> list[Snapshot]:
    """Return the snapshots of a finished run in the order of training; the last is the finished run itself.

    Raises RequestError when it has none, or when one is missing or lacks an adapter that others have.
    """
    parts, count = run.record.notes.get(SNAPSHOTS), run.record.recipe.get(SNAPSHOTS)
    if not (isinstance(parts, Mapping) and parts and isinstance(count, int)):
        raise RequestError(
            f"run {run.path}: it has no snapshots; train it with some: moalign train {run.record.method} --snapshots 8"
        )
    points, before, total = [], 0, sum(parts.values())
    for part, steps in parts.items():
        for step in steps_of(steps, count):
            points.append(Snapshot(part, step, (before + step) / total, f"{SNAPSHOTS}/{part}-{step}"))
        before += steps
    adapters = {point.folder: _adapters(run, point) for point in points}
    every = set().union(*adapters.values())
    for folder, own in adapters.items():
        if lost := sorted(every - own) or ([] if own else ["every adapter"]):
            raise RequestError(f"{run.path / folder}: {lost[0]} is missing; put it back, or train the run again")
    last = points[-1]
    return [*points[:-1], Snapshot(last.part, last.step, last.share, "")]


def _adapters(run: Run, point: Snapshot) -> set[str]:
    return {str(path.parent.name) for path in (run.path / point.folder).glob("adapter*/adapter_config.json")}

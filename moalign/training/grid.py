"""The adapters of a run: one that reads its preference from the prompt, or one for every preference of a grid.

In a grid every vector is a stage of its own with its own adapter, record and checkpoints, so that a crash loses at
most what the vector in flight did since its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from moalign.core.preferences import Preference, label
from moalign.core.progress import Progress
from moalign.training.snapshots import Trained

if TYPE_CHECKING:
    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

PER_PREFERENCE = "per_preference"
"""Key of ``job.notes`` under which the notes of each vector stand."""

LAST = "pref"
"""Name of the walk over the grid whose adapters answer; a method may walk it before under other names."""


def stage_of(index: int, walk: str = LAST) -> str:
    """Return the name of the stage that trains vector ``index`` of the run's preferences."""
    return f"{walk}-{index}"


def adapter_of(index: int, walk: str = LAST) -> str:
    """Return the folder (inside the run) of the adapter that answers for vector ``index``."""
    return f"adapter-{stage_of(index, walk)}"


@contextmanager
def one_adapter(job: Job) -> Iterator[LanguageModel]:
    """Give the base with a fresh trainable adapter; what it has become is saved as the run's ``adapter``."""
    from moalign.lm import adapters

    lm = job.task.language_model
    adapters.attach(lm, job.policy_spec.lora, job.seed)
    yield lm
    adapters.save(lm, job.run.path / "adapter")
    adapters.drop(lm)


def each_preference(job: Job, walk: str = LAST) -> Iterator[tuple[LanguageModel, Preference, str]]:
    """Yield ``(lm, preference, stage)`` for each vector of ``job.preferences``; resumes at the vector in flight.

    The base has a fresh adapter for each, whose first weights depend on ``job.seed`` alone; what the loop's body has
    made of it is saved. The body's phases (checkpoints, metrics, seeds) are named ``stage`` or ``stage-<part>``;
    progress names the vector instead. What it puts into ``job.notes["diagnostics"]`` (floats) is kept by vector under
    ``job.notes["per_preference"]`` and averaged at the end.

    A method that walks the grid several times (stage 1 of every vector before stage 2 of any) names each ``walk``; its
    stages and adapters are ``<walk>-<index>``. Policies answer with those of the walk ``pref``.
    """
    from moalign.lm import adapters

    lm, total, progress = job.task.language_model, len(job.preferences), job.progress
    for index, preference in enumerate(job.preferences):
        stage = stage_of(index, walk)
        if job.stage_done(stage):
            continue
        adapters.attach(lm, job.policy_spec.lora, job.seed)
        job.notes.pop("diagnostics", None)
        title = f"{'' if walk == LAST else f'{walk}: '}preference {label(preference)} ({index + 1}/{total})"
        job.progress = partial(_named, progress, title, stage)
        job.trained = Trained(adapter_of(index), stage, walk)
        try:
            yield lm, preference, stage
        finally:
            job.progress, job.trained = progress, Trained()
        diagnostics = job.notes.pop("diagnostics", None)
        if diagnostics:
            of_vectors = job.notes.get(PER_PREFERENCE, {})
            of_vector = {**of_vectors.get(label(preference), {}), **diagnostics}
            job.notes[PER_PREFERENCE] = {**of_vectors, label(preference): of_vector}
        adapters.save(lm, job.run.path / adapter_of(index, walk))
        job.finish_stage(stage)
        job.run.drop_checkpoints(stage)
    adapters.drop(lm)
    values_of: dict[str, list[float]] = {}
    for row in job.notes.get(PER_PREFERENCE, {}).values():
        for name, value in row.items():
            values_of.setdefault(name, []).append(value)
    if values_of:
        job.notes["diagnostics"] = {name: sum(values) / len(values) for name, values in values_of.items()}


def _named(progress: Progress, title: str, stage: str, phase: str, done: int, total: int) -> None:
    part = phase.removeprefix(stage).lstrip("-")
    progress(f"{title} {part}".rstrip(), done, total)

"""The arguments of a method: a job (a run being trained), and the context of a finished run.

This module stands above everything that a job holds and below everything that reads one, so that all is typed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from moalign.core import processes
from moalign.core.arrays import Matrix
from moalign.core.errors import RequestError, WorkError
from moalign.core.preferences import Preference, corner
from moalign.core.progress import Progress, silent
from moalign.runs.run import STAGES
from moalign.training import snapshots
from moalign.training.grid import adapter_of
from moalign.training.snapshots import Trained

if TYPE_CHECKING:
    from pathlib import Path

    from moalign.config.recipe import PolicySpec
    from moalign.lm.language_model import LanguageModel
    from moalign.rewards.panel import RewardPanel
    from moalign.runs.meter import Meter
    from moalign.runs.run import Run
    from moalign.tasks.responses import Scored
    from moalign.tasks.task import Task


@dataclass
class RunContext:
    """A finished run with its task: all that a policy needs to answer."""

    task: Task
    config: Any
    run: Run
    preferences: Sequence[Preference]
    """The vectors trained on (or the task's grid)."""
    policy_spec: PolicySpec
    panel: RewardPanel
    """The task's scorers with its normaliser."""
    cache: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """What policies of one run share (a loaded adapter)."""
    snapshot: str = field(default="", kw_only=True)
    """Folder inside the run in which policies find their adapters; empty: the run's own, as training left them."""

    @classmethod
    def of(cls, task: Task, run: Run, *, meter: Meter | None = None, **parts: Any) -> Self:
        """Return a context (or job) whose panel is the task's with its normaliser, counting into ``meter``."""
        panel = task.panel.with_normaliser(task.normaliser)
        if meter is not None:
            panel, parts["meter"] = panel.with_meter(meter), meter
        return cls(task=task, run=run, panel=panel, **parts)

    def adapter_folder(self, name: str) -> Path:
        """Return where an adapter lies; what no step trained (an expert's, taken over) has no snapshots."""
        folder = self.run.path / self.snapshot / name
        return folder if folder.is_dir() else self.run.path / name


Experts = Callable[[str, dict[str, Any], Sequence[Preference]], "Run"]


def _no_experts(method: str, settings: dict[str, Any], preferences: Sequence[Preference]) -> Run:
    raise WorkError(f"experts by {method} are needed, but this job was given no way to get them")


@dataclass
class Job(RunContext):
    """A run being trained."""

    seed: int
    meter: Meter
    given_preferences: Sequence[Preference] | None = None
    """``--prefs``: for conditioned methods the vectors to train on instead of the task's distribution."""
    progress: Progress = silent
    """Progress: ``progress(phase, done, total)``."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Small results of training (counts of dropped ties, filter shares); saved in the record."""
    snapshots: int = 0
    """How many are kept of each stage: :mod:`moalign.training.snapshots`."""
    trained: Trained = field(default_factory=Trained)
    finished_here: set[str] = field(default_factory=set)
    """Stages whose cost the meter already holds."""
    experts: Experts = _no_experts
    """``experts(method, settings, preferences)``: the finished run of a per-preference method on this task, base and
    seed, found or trained now. It is trained once, whoever asks; its whole cost counts as this job's even when it was
    found, as needing experts must not be cheaper for coming second."""

    def scored(self, per_prompt: int | None = None) -> Scored:
        """Return the training split's scored responses (the first ``per_prompt`` of each prompt); counts their cost.

        Scores, and tokens where the base was sampled for them, count for every method that learns from them, also
        when another run has had them made: a comparison would otherwise depend on who came first.
        """
        scored = self.task.scored()
        return self._counted(scored if per_prompt is None else scored.first(per_prompt))

    def calibration(self) -> Scored:
        """Return the calibration split's scored responses, for a method that learns from them; counts their cost."""
        return self._counted(self.task.calibration())

    def _counted(self, scored: Scored) -> Scored:
        self.meter.add_tokens_generated(scored.sampled)
        self.meter.add_reward_calls(scored.raw.size)
        return scored

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Matrix:
        """Return raw scores ``[rows, objectives]``; each process of a training scores its share of the rows.

        Raises what :meth:`~moalign.rewards.panel.RewardPanel.score` does.
        """
        own = self.panel.score(processes.share(prompts), processes.share(responses))
        if processes.count() == 1:
            return own
        raw = np.concatenate(processes.gather(own))
        self.meter.add_reward_calls(raw.size - own.size)
        return raw

    def find_experts(
        self, method: str, settings: dict[str, Any], vectors: Sequence[Preference] | None = None
    ) -> tuple[Run, list[Path]]:
        """Return the run of the experts (see ``experts``), and the folder of each objective's adapter in it.

        They are trained at ``vectors``, one for each objective; None: the corners of the simplex. Raises RequestError
        when a finished run of experts has lost an adapter.
        """
        count = len(self.task.names)
        run = self.experts(method, settings, vectors or [corner(count, index) for index in range(count)])
        folders = [run.path / adapter_of(index) for index in range(count)]
        for folder in folders:
            if not folder.is_dir():
                raise RequestError(f"run {run.path}: {folder.name} is missing; move the run away to train it again")
        self.notes["experts"] = {"method": method, "run_id": run.record.run_id}
        return run, folders

    def advance(self, lm: LanguageModel, phase: str, step: int, steps: int) -> None:
        """Go on after a step of a phase: keep a snapshot of the active adapter where one is due, report progress."""
        snapshots.keep(self, lm, phase, step, steps)
        self.progress(phase, step, steps)

    def warn(self, texts: Sequence[str]) -> None:
        """Add warnings to the notes; evaluations and comparisons show them."""
        if texts:
            self.notes["warnings"] = [*self.notes.get("warnings", []), *texts]

    def stage_done(self, name: str, lm: LanguageModel | None = None) -> bool:
        """Whether a stage was finished, here or before an interruption.

        If so the meter continues from it, and the adapter of ``lm`` (when given) gets the weights that the stage
        ended with.
        """
        if not self.run.phase_done(name):
            return False
        order = {stage: place for place, stage in enumerate(self.run.record.phases)}  # as they were finished
        if order[name] > max((order.get(other, -1) for other in self.finished_here), default=-1):
            stage = self.run.phase_info(name)
            self.meter.load(stage["meter"])
            self.notes.update(stage["notes"])
        self.finished_here.add(name)  # only once, and forward only: later stages have counted on from it
        if lm is not None:
            from moalign.lm import adapters

            adapters.set_tensors(lm, self.run.load_tensors(f"{STAGES}/{name}"))
        return True

    def finish_stage(self, name: str, lm: LanguageModel | None = None) -> None:
        """Record that a stage is done, with the cost so far and (``lm`` given) the adapter's weights."""
        if lm is not None:
            from moalign.lm import adapters

            self.run.save_tensors(f"{STAGES}/{name}", adapters.tensors(lm))
        self.finished_here.add(name)
        self.run.finish_phase(name, meter=self.meter.state(), notes=self.notes)

"""One expert per objective, for methods that combine them without training of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.training.grid import adapter_of
from moalign.training.settings import ConditionedPpoConfig, PpoConfig

if TYPE_CHECKING:
    from moalign.training.job import Job

STAGE = "experts"

STAGES = (STAGE, "rl_experts", "dpo_experts")
"""Names of a method's settings of how each expert is trained."""


def expert_folder(index: int) -> str:
    """Return the folder (inside a run) of the adapter of the expert for objective ``index``."""
    return f"adapter-expert-{index}"


def rl_settings(experts: PpoConfig) -> dict[str, Any]:
    """Return the settings of ``morlhf`` for experts that are trained by RL."""
    # Of no effect on a policy for one preference, but it may not exceed the batch.
    groups = min(ConditionedPpoConfig.model_fields["groups"].default, experts.batch)
    return {**experts.model_dump(mode="json"), "groups": groups}


def bring_experts(job: Job, method: str, settings: dict[str, Any], vectors: Sequence[Preference] | None = None) -> None:
    """Copy the adapter of each objective's expert into the job's run; experts that do not exist are trained.

    The experts are one run of the per-preference ``method`` at ``vectors``, one for each objective (None: the corners
    of the simplex), shared by all runs with the same ``settings``. The job's run gets copies, so that it stays complete
    when the experts' run is deleted.

    Raises RequestError when a finished run of experts has lost an adapter.
    """
    from moalign.runs import atomic

    if job.stage_done(STAGE):
        return
    count = len(job.task.names)
    if vectors is None:
        vectors = [preferences.corner(count, index) for index in range(count)]
    run = job.experts(method, settings, vectors)
    for index in range(count):
        source = run.path / adapter_of(index)
        if not source.is_dir():
            raise RequestError(f"run {run.path}: {source.name} is missing; move the run away to train it again")
        with atomic.directory(job.run.path / expert_folder(index)) as place:
            shutil.copytree(source, place, dirs_exist_ok=True)
    job.notes["experts"] = {"method": method, "run_id": run.record.run_id}
    if "diagnostics" in run.record.notes:
        job.notes["diagnostics"] = run.record.notes["diagnostics"]
    job.warn([f"experts by {method}: {text}" for text in run.record.notes.get("warnings", ())])
    job.finish_stage(STAGE)

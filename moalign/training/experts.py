"""One expert per objective, for methods that combine them without training of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moalign.core.preferences import Preference
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
    """Copy the adapters of :meth:`Job.find_experts` into the job's run, which stays complete when theirs is deleted."""
    from moalign.runs import atomic

    if job.stage_done(STAGE):
        return
    run, folders = job.find_experts(method, settings, vectors)
    for index, folder in enumerate(folders):
        with atomic.directory(job.run.path / expert_folder(index)) as place:
            shutil.copytree(folder, place, dirs_exist_ok=True)
    if "diagnostics" in run.record.notes:
        job.notes["diagnostics"] = run.record.notes["diagnostics"]
    job.warn([f"experts by {method}: {text}" for text in run.record.notes.get("warnings", ())])
    job.finish_stage(STAGE)

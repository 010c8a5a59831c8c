"""Tasks: prompts, scored responses, objectives, normaliser and base model behind one task card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moalign.rewards.scorer import BUILDERS, Scorer

if TYPE_CHECKING:
    from moalign.config.objectives import SandboxObjective


def _sandbox(spec: SandboxObjective, base_dir: Path) -> Scorer:
    from moalign.tasks.sandbox.scorer import SandboxScorer

    return SandboxScorer(spec)


BUILDERS["sandbox"] = _sandbox  # so that the scoring layer need not import the task

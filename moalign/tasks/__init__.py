"""Tasks: prompts, scored responses, objectives, normaliser and base model behind one task card.

Objectives that only the sandbox can score are registered with the scoring layer here, so that it need not import the
task.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moalign.rewards.scorer import BUILDERS, Scorer

if TYPE_CHECKING:
    from moalign.config.objectives import SandboxObjective


def _sandbox(spec: SandboxObjective, base_dir: Path) -> Scorer:
    from moalign.tasks.sandbox.scorer import scorer_of

    return scorer_of(spec)


BUILDERS["sandbox"] = _sandbox

"""Tasks: prompts, scored responses, objectives, normaliser and base model behind one task card.

The objectives that only a task of ours can score are made known to the scoring layer here, so that it need not know
the task.
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

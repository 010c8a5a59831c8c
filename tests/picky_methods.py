"""Two methods for tests of machinery: they train in a second, and it shows."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np

from moalign.config.strict import Strict
from moalign.core.preferences import Preference
from moalign.methods.base import Capabilities
from moalign.policies.policy import Policy
from moalign.training.job import Job, RunContext
from moalign.training.settings import SftConfig


class PickyConfig(SftConfig):
    """Few steps, large enough to see."""

    steps: int = 4
    batch: int = 4
    lr: float = 0.02
    max_tokens: int = 48
    checkpoint_every: int = 1


class Picky:
    """Fine-tunes one adapter per preference on the responses that are best by w.r."""

    name: ClassVar[str] = "picky"
    summary: ClassVar[str] = "fine-tunes on the best responses of each preference"
    capabilities: ClassVar[Capabilities] = Capabilities(one_policy=False, steerable=False)
    Config: ClassVar[type[Strict]] = PickyConfig
    quick: ClassVar[dict[str, Any]] = {}

    def train(self, job: Job) -> None:
        from moalign.training.grid import each_preference
        from moalign.training.sft import train_sft

        lm, scored = job.task.language_model, job.task.scored()
        z = job.panel.z(scored.raw)
        for _, preference, stage in each_preference(job):
            best = np.argsort(-(z @ np.array(preference)), kind="stable")[:12].tolist()
            texts = [job.task.renderer.plain(scored.prompts[i]) for i in best]
            train_sft(job, lm, texts, [scored.responses[i] for i in best], job.config, stage)
            job.notes["diagnostics"] = {"first weight": preference[0]}

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        from moalign.policies.per_preference import trained_for

        return trained_for(context, preference)


class SoupConfig(Strict):
    """Settings of the soup."""

    experts: PickyConfig = PickyConfig()
    by: Literal["weights", "logits"] = "weights"


class PickySoup:
    """Combines picky's policies at the corners."""

    name: ClassVar[str] = "picky-soup"
    summary: ClassVar[str] = "combines policies of picky at the corners"
    capabilities: ClassVar[Capabilities] = Capabilities()
    Config: ClassVar[type[Strict]] = SoupConfig
    quick: ClassVar[dict[str, Any]] = {}

    def train(self, job: Job) -> None:
        from moalign.training.experts import bring_experts

        bring_experts(job, "picky", job.config.experts.model_dump(mode="json"))

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        from moalign.policies.mixed import interpolated, mixed

        return (interpolated if context.config.by == "weights" else mixed)(context, preference)

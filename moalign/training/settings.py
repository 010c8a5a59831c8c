"""Settings of the engines, typed; importing them imports no engine (and no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moalign.config.strict import Strict
from moalign.training.schedule import ScheduleName


class SftConfig(Strict):
    """Settings of one supervised stage."""

    steps: int = Field(ge=0)
    batch: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    """Each step of ``batch`` rows is read in this many parts."""
    lr: float = Field(default=1.4e-4, gt=0)
    schedule: ScheduleName = "linear"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    max_tokens: int = Field(default=512, ge=8)
    """Longest row; the prompt is cut on its left, so that the response stays."""
    checkpoint_every: int = Field(default=100, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _even_parts(self) -> SftConfig:
        if self.batch % self.accumulate:
            raise ValueError(f"batch must be a multiple of accumulate; found {self.batch} and {self.accumulate}")
        return self


class OnlineConfig(Strict):
    """Settings of the engine, shared by every online method."""

    steps: int = Field(default=300, ge=0)
    batch: int = Field(default=64, ge=1)
    """Prompts per rollout."""
    samples: int = Field(default=2, ge=1)
    """Responses per prompt."""
    temperature: float = Field(default=1.0, gt=0)
    lr: float = Field(default=1e-4, gt=0)
    schedule: ScheduleName = "constant"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    micro_batch: int = Field(default=256, ge=1)
    """Most rows in one forward and backward pass; a step's gradient does not depend on it."""
    epochs: int = Field(default=1, ge=1)
    """Updates on each rollout."""
    reference: Literal["base", "start"] = "base"
    """What the KL term compares with: the base (adapter off), or the policy as it was at the start."""
    ref_sync_steps: int | None = Field(default=None, ge=1)
    """Copy the policy into the reference every so many steps; None keeps it fixed."""
    checkpoint_every: int = Field(default=50, ge=1)
    log_every: int = Field(default=5, ge=1)

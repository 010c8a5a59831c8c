"""The recipe: one run of one method on one task, pinned to one GPU."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moalign.config.strict import Strict
from moalign.core.errors import did_you_mean


class LoraSpec(Strict):
    """Low-rank adapters on the frozen base."""

    r: int = Field(default=64, ge=1, le=2**16)
    alpha: float = Field(default=128, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    targets: list[str] | str = "all-linear"
    """Names of layers, or a regular expression over their whole names."""
    layers: int | None = Field(default=None, ge=1)
    """Adapters in the last so many of the model's layers alone: the backward pass ends there. None: in all."""

    @field_validator("targets")
    @classmethod
    def _an_expression(cls, value: list[str] | str) -> list[str] | str:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"found {value!r}; allowed: names of layers, or a regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _named(self) -> LoraSpec:
        if self.layers is not None and isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                f"layers needs targets: all-linear, or a list of names; found the expression {self.targets!r}, which "
                "itself says in which layers"
            )
        return self


ATTENTION = ("eager", "sdpa", "flash_attention_2")
"""Kinds of attention; another is a kernel of the hub, ``owner/name``."""


class PolicySpec(Strict):
    """What is trained: adapters on the task's base model; and how that is held in memory."""

    lora: LoraSpec = LoraSpec()
    gradient_checkpointing: bool | None = None
    """Layers keep nothing for the backward pass but compute it again: much less memory, about a third more time, the
    same gradient. Null: where trl's trainers run on a GPU."""
    attention: str | None = None
    """One of :data:`ATTENTION`, or a kernel of the hub; null: what transformers chooses for the model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """In place of the card's, and a part of the task as that is: another precision is another base."""
    load_in_4bit: bool = False
    """The base's linear layers in 4 bits, as the card's ``load_in_4bit`` has it, and a part of the task as that is."""

    @field_validator("attention")
    @classmethod
    def _a_kind(cls, value: str | None) -> str | None:
        if value is None or value in ATTENTION or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", value):
            return value
        listed = ", ".join(ATTENTION)
        near = did_you_mean(value, list(ATTENTION))
        raise ValueError(f"found {value!r}; allowed: {listed}, or a kernel of the hub (owner/name){near}")


class RewardsSpec(Strict):
    """How reward models are held in memory."""

    offload: bool = False
    """Reward models leave the GPU whenever they have scored: memory for the larger of policy and reward model, and a
    few seconds a step. The scores are the same."""


class RolloutSpec(Strict):
    """What samples responses: the rollouts of online training, and the answers of the run's evaluation."""

    engine: Literal["hf", "vllm"] = "hf"
    """vllm: :mod:`moalign.lm.vllm_engine`. Its random numbers are its own, so that it makes another run."""
    correction: float | None = Field(default=2.0, ge=1)
    """Of vllm: what PPO's loss of a token is multiplied by, the probability that the trainer gives it over vLLM's, is
    at most this (truncated importance sampling); null: no such weights."""
    gpu_memory: float = Field(default=0.4, gt=0, lt=1)
    """Of vllm: the share of a GPU's memory that it takes for weights and cache, beside the trainer's base."""

    @model_validator(mode="after")
    def _of_vllm(self) -> RolloutSpec:
        stray = sorted(self.model_fields_set - {"engine"})
        if self.engine == "hf" and any(getattr(self, name) != RolloutSpec.model_fields[name].default for name in stray):
            raise ValueError(f"needs engine: vllm; found {', '.join(stray)} with engine: hf")
        return self


class NeedsSpec(Strict):
    """What a run takes; shown by ``show`` and compared with the estimate by ``check``."""

    gpu: str = "none"
    """``none`` (CPU is enough) or a GPU's name such as ``A6000 48GB``."""
    gpu_memory_gib: float | None = None
    minutes: float | None = None
    peak_gib: float | None = None
    measured: str = "not measured on a GPU yet"
    """What was measured of the recipe as it is, and where that stands; or that nothing was."""


class ReportedSpec(Strict):
    """One number that a paper reports; it was not measured here and is never mixed with what was."""

    method: str = Field(min_length=1)
    """As the paper calls it."""
    metric: str = Field(min_length=1)
    """What the number is, with its unit or direction: ``win rate against the base, %``."""
    value: float = Field(allow_inf_nan=False)
    source: str = Field(min_length=1)
    """Paper and place: ``arXiv 2402.10207, table 2``."""
    setting: str = ""
    """Model and data where they differ from the recipe's."""


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Recipe(Strict):
    """A recipe file. ``config`` is typed by the method's own ``Config`` (validated with this file's lines)."""

    method: str
    task: str
    description: str = ""
    seed: int = Field(default=0, ge=0)
    prefs: list[list[float]] | None = None
    holdout: list[list[float]] | None = None
    """Preferences that training must not see; evaluation reports them beside those that it saw."""
    snapshots: int = Field(default=0, ge=0, le=1000)
    """How many times along each stage the adapter in training is kept, for ``moalign eval --snapshots``."""
    policy: PolicySpec = PolicySpec()
    rewards: RewardsSpec = RewardsSpec()
    rollout: RolloutSpec = RolloutSpec()
    config: dict[str, Any] = Field(default_factory=dict)
    budget: Literal["full", "quick"] = "full"
    """quick: ``config`` with the settings of ``quick`` in it; another run, but on the same task."""
    quick: dict[str, Any] | None = None
    """The settings of ``config`` that a first look has otherwise: less of the same training."""
    needs: NeedsSpec = NeedsSpec()
    reported: list[ReportedSpec] = Field(default_factory=list)
    """Numbers that papers report for this setting; shown apart from measured ones."""
    trackers: list[Tracker] = Field(default_factory=list)
    """Where the run's metrics are mirrored while it trains; ``metrics.jsonl`` holds them all in any case."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Where each number of ``config`` and ``policy`` comes from."""

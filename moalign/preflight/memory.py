"""An estimate of peak GPU memory, phase by phase, from sizes alone: nothing is loaded.

All in bytes; w = 2 (bfloat16) or 4 (float32), H = hidden, I = inner width, L = layers, KV = width of a token's keys.

    base            parameters x w
    adapters        parameters x 16 while training (float32 weight, gradient, Adam's two moments), x 4 while answering
    value heads     objectives x (H + 1) x 16
    KV cache        rows x tokens x 2 x L x KV x w
    one layer       tokens x [ norms 8 H + LoRA inputs + attention 4 w H + feed-forward 3 w I + LoRA between 28 r ]
                    LoRA inputs: a float32 copy for each layer, 24 H + 4 I; in float32 without dropout they are shared,
                    8 H + 4 I; under autocast (trl's trainers) w (6 H + I) and 14 r; dropout masks 6 H + I more
    activations     L x one layer; with checkpointing tokens x L x H x w + one layer
    logits          rows x new tokens x vocabulary x (w + 12) in the online engine (float32, log-softmax, entropy);
                    trl's fused head works in tiles: 4096 x vocabulary x w + tokens x H x 4
    reward models   parameters x w of each, all resident, + the largest one's activations while scoring:
                    batch_tokens x (6 H + 2 I) x w
    rest            2 GiB for the CUDA context and fragmentation (assumed)

The coefficients of one layer agree with what autograd keeps of real modules (tests/preflight/test_memory.py); those of
models that are not of the Llama kind are rougher.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.objectives import ModelObjective
from moalign.config.recipe import LoraSpec
from moalign.config.strict import Strict
from moalign.lm import architecture, builtin
from moalign.lm.architecture import Architecture
from moalign.methods.base import Capabilities
from moalign.training.settings import CostHints, DpoStage, OnlineConfig, PpoConfig, SftConfig

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED = 16
REST = 2 * GIB
TILE = 4096
"""Tokens of one tile of trl's fused output layer."""


@dataclass(frozen=True)
class Phase:
    """What is in memory at the peak of one phase; bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Return all parts together."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the phase in GiB, for ``--json``."""
        parts = {name: size / GIB for name, size in self.parts.items()}
        return {"phase": self.name, "total_gib": self.total / GIB, "parts_gib": parts}


@dataclass(frozen=True)
class Estimate:
    """Memory of one recipe on one GPU."""

    policy: Architecture
    adapted: int
    """Parameters of the adapters."""
    dtype: str
    phases: list[Phase]
    unknown: list[str]
    """Reward models whose sizes are not known."""

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for ``--json``; adapters are counted with gradients and optimiser state."""
        return {
            "parameters": self.policy.parameters,
            "adapter_parameters": self.adapted,
            "weights_gib": self.policy.parameters * WIDTH[self.dtype] / GIB,
            "adapters_gib": self.adapted * TRAINED / GIB,
            "total_gib": self.peak.total / GIB,
            "peak_phase": self.peak.name,
            "phases": [phase.as_dict() for phase in self.phases],
            "unknown": self.unknown,
        }

    def sentence(self) -> str:
        """Return the estimate in words."""
        gib = self.as_dict()
        return (
            f"peak {gib['total_gib']:.1f} GiB ({self.peak.name}): weights {gib['weights_gib']:.2f} "
            f"({self.policy.parameters / 1e6:.1f} M parameters in {self.dtype}), adapters with gradients and optimiser "
            f"{gib['adapters_gib']:.2f} ({self.adapted / 1e6:.1f} M parameters)"
        )


def estimate(resolved: ResolvedRequest, policy: Architecture, capabilities: Capabilities) -> Estimate:
    """Estimate a recipe's memory, phase by phase.

    ``policy`` are the sizes of the task's base, ``capabilities`` those of the recipe's method.
    """
    card, lora, trains = resolved.card, resolved.recipe.policy.lora, capabilities.trains
    adapted = architecture.adapted(policy.shapes, lora.r, lora.targets) if trains else 0
    models, unknown = reward_models(card)
    phases_of = _Phases(card, policy, lora, adapted, models)
    readers = len(card.objectives) if capabilities.mixes else 1
    phases = [phases_of.sampling("sampling the base", adapters=0)]
    for name, config in stages(resolved.config) if trains else ():
        if isinstance(config, OnlineConfig):
            phases += phases_of.online(name, config, readers if name == "training" else 1)  # an expert has none
        else:
            phases += phases_of.sft(name, config)
    phases.append(phases_of.sampling("answering", adapters=adapted * 4 * readers, readers=readers))
    return Estimate(policy, adapted, card.dtype, phases, unknown)


def reward_models(card: TaskCard) -> tuple[list[tuple[ModelObjective, Architecture]], list[str]]:
    """Return the card's reward models with their sizes, and the names of those whose sizes are not known.

    Objectives that share a model are loaded once.
    """
    models, unknown, seen = [], [], set()
    for spec in card.objectives:
        if not isinstance(spec, ModelObjective) or spec.reading in seen:
            continue
        seen.add(spec.reading)
        sizes = sizes_of(spec.model)
        if sizes is None:
            unknown.append(spec.model)
        else:
            models.append((spec, sizes))
    return models, unknown


def sizes_of(model: str) -> Architecture | None:
    """Return the sizes of a model folder or known hub model, None when they are not known."""
    folder = builtin.converted(model) or Path(os.path.expanduser(model))
    return architecture.of_folder(folder) if os.path.isdir(folder) else architecture.KNOWN.get(model)


def stages(config: Strict, name: str = "") -> Iterator[tuple[str, SftConfig | OnlineConfig]]:
    """Yield every stage of training in a method's settings, with its dotted name; stages of no steps are left out."""
    if isinstance(config, SftConfig | OnlineConfig) and config.steps:
        yield name or "training", config
    for key in type(config).model_fields:
        value = getattr(config, key)
        if isinstance(config, CostHints) and key in config.switched_off:
            continue
        if isinstance(value, Strict):
            yield from stages(value, f"{name}.{key}" if name else key)


def layer_bytes(sizes: Architecture, width: int, lora: LoraSpec, adapters: int, autocast: bool, mask: int = 1) -> float:
    """Return what autograd keeps of one token in one layer.

    Args:
        width: bytes of a number of the base.
        adapters: parameters that are trained; 0: nothing is kept.
        autocast: whether adapters compute in half precision.
        mask: bytes of one entry of a dropout mask: 1 on CUDA, 4 on CPU.
    """
    if not adapters:
        return 0.0
    hidden, inner = sizes.hidden, sizes.inner
    rows = 6 * hidden + inner
    if autocast:
        inputs = width * rows
    elif lora.dropout or width != 4:
        inputs = 4 * rows
    else:
        inputs = 8 * hidden + 4 * inner
    masks = mask * rows if lora.dropout else 0
    between = (14 if autocast else 28) * lora.r
    return 8 * hidden + inputs + masks + 4 * width * hidden + 3 * width * inner + between


class _Phases:
    """The phases of one recipe."""

    def __init__(
        self,
        card: TaskCard,
        policy: Architecture,
        lora: LoraSpec,
        adapted: int,
        models: Sequence[tuple[ModelObjective, Architecture]],
    ) -> None:
        self.policy, self.lora, self.adapted = policy, lora, adapted
        self.objectives, self.limits, self.width = len(card.objectives), card.generation, WIDTH[card.dtype]
        self.tokens = self.limits.max_prompt_tokens + self.limits.max_new_tokens
        weights = sum(sizes.parameters * WIDTH[spec.dtype] for spec, sizes in models)
        self.resident = {"base": policy.parameters * self.width, "reward models": weights}
        activations = (
            spec.batch_tokens * (6 * size.hidden + 2 * size.inner) * WIDTH[spec.dtype] for spec, size in models
        )
        self.scoring = max(activations, default=0)

    def sampling(self, name: str, adapters: int, rows: int | None = None, readers: int = 1) -> Phase:
        """Return a phase in which texts are sampled and scored; ``adapters`` in bytes, ``readers`` read each row."""
        rows = readers * (self.limits.batch_size if rows is None else rows)
        cache = rows * self.tokens * 2 * self.policy.layers * self.policy.key_value * self.width
        logits = rows * self.policy.vocabulary * (self.width + 8)
        # One after the other: what takes more counts.
        busy = {"KV cache": cache, "logits": logits} if cache + logits > self.scoring else {"scoring": self.scoring}
        return Phase(name, {**self.resident, "adapters": adapters, **busy, "rest": REST})

    def online(self, name: str, config: OnlineConfig, readers: int = 1) -> list[Phase]:
        """Return the phases of a stage in the online engine, which micro-batches instead of checkpointing layers."""
        reference = self.adapted * 4 if config.reference == "start" or config.ref_sync_steps else 0
        experts = self.adapted * 4 * readers if readers > 1 else 0
        adapters = self.adapted * TRAINED + reference + experts
        rows = min(config.micro_batch, config.batch * config.samples)
        tokens = rows * self.tokens
        heads, kept = 0, int(tokens * self.policy.layers * self._layer(autocast=False))
        if isinstance(config, PpoConfig):
            heads = self.objectives * (self.policy.hidden + 1) * TRAINED
            kept += tokens * (self.policy.layers + 1) * self.policy.hidden * self.width
        logits = rows * (self.limits.max_new_tokens + 1) * self.policy.vocabulary * (self.width + 12)
        parts = {**self.resident, "adapters": adapters, "value heads": heads, "activations": kept, "logits": logits}
        return [
            self.sampling(f"{name}: rollout", adapters + heads, config.batch * config.samples, readers),
            Phase(f"{name}: update", {**parts, "rest": REST}),
        ]

    def sft(self, name: str, config: SftConfig) -> list[Phase]:
        """Return the phase of a stage on fixed rows or pairs, by trl's trainers."""
        rows = config.batch // config.accumulate * (2 if isinstance(config, DpoStage) else 1)
        tokens = rows * config.max_tokens
        checkpoints = self.policy.layers * self.policy.hidden * self.width
        parts = {
            "adapters": self.adapted * TRAINED,
            "activations": int(tokens * (checkpoints + self._layer(autocast=self.width == 2))),
            "logits": min(TILE, tokens) * self.policy.vocabulary * self.width + tokens * self.policy.hidden * 4,
        }
        return [Phase(f"{name}: update", {**self.resident, **parts, "rest": REST})]

    def _layer(self, autocast: bool) -> float:
        return layer_bytes(self.policy, self.width, self.lora, self.adapted, autocast)

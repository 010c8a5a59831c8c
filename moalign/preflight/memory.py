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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moalign.config.card import TaskCard
from moalign.config.load import ResolvedRequest
from moalign.config.objectives import ModelObjective
from moalign.config.recipe import LoraSpec
from moalign.config.strict import Strict
from moalign.lm import architecture, builtin
from moalign.lm.architecture import Architecture
from moalign.training.settings import DpoStage, OnlineConfig, PpoConfig, SftConfig

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
    dtype: str
    phases: list[Phase] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """Reward models whose sizes are not known."""

    @property
    def weights(self) -> int:
        """Bytes of the frozen base."""
        return self.policy.parameters * WIDTH[self.dtype]

    @property
    def adapters(self) -> int:
        """Bytes of adapters with gradients and optimiser state."""
        return self.adapted * TRAINED

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for ``--json``."""
        return {
            "parameters": self.policy.parameters,
            "adapter_parameters": self.adapted,
            "weights_gib": self.weights / GIB,
            "adapters_gib": self.adapters / GIB,
            "total_gib": self.peak.total / GIB,
            "peak_phase": self.peak.name,
            "phases": [phase.as_dict() for phase in self.phases],
            "unknown": self.unknown,
        }

    def sentence(self) -> str:
        """Return the estimate in words."""
        return (
            f"peak {self.peak.total / GIB:.1f} GiB ({self.peak.name}): weights {self.weights / GIB:.2f} "
            f"({self.policy.parameters / 1e6:.1f} M parameters in {self.dtype}), adapters with gradients and optimiser "
            f"{self.adapters / GIB:.2f} ({self.adapted / 1e6:.1f} M parameters)"
        )


def estimate(resolved: ResolvedRequest, policy: Architecture, trains: bool = True) -> Estimate:
    """Estimate a recipe's memory, phase by phase.

    Args:
        policy: the sizes of the task's base.
        trains: False for methods that train nothing.
    """
    card, lora = resolved.card, resolved.recipe.policy.lora
    count = architecture.adapted(policy.shapes, lora.r, lora.targets) if trains else 0
    models, unknown = reward_models(card)
    sizes = _Sizes(card, policy, lora, count, models)
    phases = [sizes.sampling("sampling the base", 0)]
    for name, config in stages(resolved.config) if trains else ():
        phases += sizes.stage(name, config)
    phases.append(sizes.sampling("answering", count))
    return Estimate(policy, count, card.dtype, phases, unknown)


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
    folder = builtin.converted(model) or Path(model).expanduser()
    return architecture.of_folder(folder) if folder.is_dir() else architecture.KNOWN.get(model)


def stages(config: Strict, name: str = "") -> Iterator[tuple[str, SftConfig | OnlineConfig]]:
    """Yield every stage of training in a method's settings, with its dotted name; stages of no steps are left out."""
    if isinstance(config, SftConfig | OnlineConfig) and config.steps:
        yield name or "training", config
    for key in type(config).model_fields:
        value = getattr(config, key)
        if key == "distil" and getattr(config, "warm_start", "") == "none":
            continue  # settings of a stage that is switched off
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


class _Sizes:
    """The parts of one recipe's memory."""

    def __init__(
        self,
        card: TaskCard,
        policy: Architecture,
        lora: LoraSpec,
        adapters: int,
        models: Sequence[tuple[ModelObjective, Architecture]],
    ) -> None:
        self.card, self.policy, self.lora, self.adapters = card, policy, lora, adapters
        self.width = WIDTH[card.dtype]
        weights = sum(sizes.parameters * WIDTH[spec.dtype] for spec, sizes in models)
        scoring = [
            spec.batch_tokens * (6 * sizes.hidden + 2 * sizes.inner) * WIDTH[spec.dtype] for spec, sizes in models
        ]
        self.resident = {"base": policy.parameters * self.width, "reward models": weights}
        self.scoring = max(scoring, default=0)

    def sampling(self, name: str, adapters: int, rows: int | None = None, extra: int = 0) -> Phase:
        """Return a phase in which texts are sampled and scored."""
        limits = self.card.generation
        rows = limits.batch_size if rows is None else rows
        cache = self._cache(rows)
        logits = rows * self.policy.vocabulary * (self.width + 8)
        busy = max(cache + logits, self.scoring)  # one after the other
        parts = {**self.resident, "adapters": adapters * 4 + extra}
        if busy > self.scoring:
            parts |= {"KV cache": cache, "logits": logits}
        else:
            parts |= {"scoring": self.scoring}
        return Phase(name, {**parts, "rest": REST})

    def stage(self, name: str, config: SftConfig | OnlineConfig) -> list[Phase]:
        """Return the phases of one stage of training."""
        return self._online(name, config) if isinstance(config, OnlineConfig) else [self._supervised(name, config)]

    def _online(self, name: str, config: OnlineConfig) -> list[Phase]:
        state = self.adapters * (TRAINED - 4)
        reference = self.adapters * 4 if config.reference == "start" or config.ref_sync_steps else 0
        heads = len(self.card.objectives) * (self.policy.hidden + 1) * TRAINED if isinstance(config, PpoConfig) else 0
        rows = min(config.micro_batch, config.batch * config.samples)
        limits = self.card.generation
        tokens = rows * (limits.max_prompt_tokens + limits.max_new_tokens)
        # The engine keeps every layer's activations: it works in micro-batches instead of checkpointing.
        activations = self._activations(tokens, checkpointing=False, autocast=False)
        if heads:
            activations += tokens * (self.policy.layers + 1) * self.policy.hidden * self.width
        parts = {
            **self.resident,
            "adapters": self.adapters * TRAINED + reference,
            "value heads": heads,
            "activations": activations,
            "logits": rows * (limits.max_new_tokens + 1) * self.policy.vocabulary * (self.width + 12),
            "rest": REST,
        }
        rollout = self.sampling(
            f"{name}: rollout", self.adapters, config.batch * config.samples, state + reference + heads
        )
        return [rollout, Phase(f"{name}: update", parts)]

    def _supervised(self, name: str, config: SftConfig) -> Phase:
        rows = config.batch // config.accumulate * (2 if isinstance(config, DpoStage) else 1)
        tokens = rows * config.max_tokens
        tiles = min(TILE, tokens) * self.policy.vocabulary * self.width + tokens * self.policy.hidden * 4
        parts = {
            **self.resident,
            "adapters": self.adapters * TRAINED,
            "activations": self._activations(tokens, checkpointing=True, autocast=True),
            "logits": tiles,
            "rest": REST,
        }
        return Phase(f"{name}: update", parts)

    def _activations(self, tokens: int, checkpointing: bool, autocast: bool) -> int:
        layer = layer_bytes(self.policy, self.width, self.lora, self.adapters, autocast and self.width == 2)
        if checkpointing:
            return int(tokens * (self.policy.layers * self.policy.hidden * self.width + layer))
        return int(tokens * self.policy.layers * layer)

    def _cache(self, rows: int) -> int:
        limits = self.card.generation
        tokens = limits.max_prompt_tokens + limits.max_new_tokens
        return rows * tokens * 2 * self.policy.layers * self.policy.key_value * self.width

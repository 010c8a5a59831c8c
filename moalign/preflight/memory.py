"""An estimate of peak memory, phase by phase, from sizes alone: nothing is loaded. Of a GPU, or without one of the CPU.

All in bytes; w = 2 (bfloat16) or 4 (float32), H = hidden, I = inner width, L = layers, KV = width of a token's keys.

    base            parameters x w; in 4 bits its linear layers x .516 (NF4 and the constants of its blocks of 64, which
                    are quantised again in blocks of 256), the others x w, and one layer's weight at a time x w
    adapters        parameters x 16 while training (float32 weight, gradient, Adam's two moments), x 4 while answering
    value heads     objectives x (H + 1) x 16
    KV cache        rows x tokens x 2 x L x KV x w
    one layer       tokens x [ norms 8 H + LoRA inputs + attention 4 w H + feed-forward 3 w I + LoRA between 28 r ]
                    LoRA inputs: a float32 copy for each layer, 24 H + 4 I; in float32 without dropout they are shared,
                    8 H + 4 I; under autocast (trl's trainers) w (6 H + I) and 14 r; dropout masks 6 H + I more
    activations     L x one layer; with gradient checkpointing tokens x L x H x w + one layer; L is
                    ``policy.lora.layers`` where it is set. With ``share_prompts``, which has no checkpointing, a prompt
                    counts once for its responses, and 2 w H in each layer for each of them. Of a float32 base trl's
                    trainers keep, without checkpointing on a GPU, autocast's copies of the linear layers, 2 a weight
    logits          in the online engine (w + 12) a number (float32, log-softmax, entropy), at most 2**23 at a time;
                    trl's fused head works in tiles: 4096 x 32768 x w + tokens x H x 4; on the CPU it is used for at
                    most 2**23 logits, of which eight or nine copies are made
    folded          while a model below 20 M parameters samples, a copy of the layers that adapters change
    control         what PCM trains in place of adapters: parameters x 16 and its own activations
    reward models   parameters x w of each, all resident, + the largest one's activations while scoring:
                    batch_tokens x (6 H + 2 I) x w; with rewards.offload on a GPU one at a time, and only then
    rest            2 GiB for the CUDA context and fragmentation (assumed); on the CPU the interpreter and its libraries

On the CPU the system's allocator keeps up to half as much again of what was freed; results/bench/memory.md compares
measurements with these estimates.

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
from moalign.config.objectives import ClassifierObjective, ModelObjective
from moalign.config.recipe import LoraSpec
from moalign.config.strict import Strict
from moalign.lm import architecture, builtin
from moalign.lm.architecture import Architecture
from moalign.methods.base import Capabilities
from moalign.policies.control_spec import ControlSpec
from moalign.rewards.ensemble import member_folders
from moalign.training.settings import CostHints, DpoStage, OnlineConfig, PpoConfig, SftConfig

GIB = 2**30
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a 4-bit number: a block of 64 has a constant of a byte, 256 of these one of four bytes."""
TRAINED = 16
REST = 2 * GIB
LIBRARIES, BUFFERS = int(0.5 * GIB), 96 * 2**20
"""What the interpreter with its libraries holds, in place of :data:`REST` on the CPU, and adds while they work at most
(measured)."""
KEPT = 1.5
"""How many times what is in use the CPU's allocator holds at most (measured)."""
TILE, COLUMNS, COPIES = 4096, 32768, 8.5
"""Tokens and words of one tile of trl's fused output layer, and how many such are held at once on a CPU (measured)."""
AT_ONCE = 2**23
"""Logits held at a time in the online engine, where the head is a linear map (:mod:`moalign.lm.log_probs`)."""
FOLDS_BELOW = 20_000_000
"""Smaller models sample with adapters folded into a copy (:data:`moalign.lm.adapters.MERGE_BELOW`)."""


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
    on_cpu: bool = False
    in_4bit: bool = False

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def most(self) -> int:
        """The most bytes that the peak phase may take; on the CPU with what the allocator keeps."""
        return upper(self.peak) if self.on_cpu else self.peak.total

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate for ``--json``; adapters are counted with gradients and optimiser state."""
        return {
            "parameters": self.policy.parameters,
            "adapter_parameters": self.adapted,
            "weights_gib": self.phases[0].parts["base"] / GIB,
            "adapters_gib": self.adapted * TRAINED / GIB,
            "device": "cpu" if self.on_cpu else "gpu",
            "total_gib": self.peak.total / GIB,
            "most_gib": self.most / GIB,
            "peak_phase": self.peak.name,
            "phases": [phase.as_dict() for phase in self.phases],
            "unknown": self.unknown,
        }

    def sentence(self) -> str:
        """Return the estimate in words."""
        gib = self.as_dict()
        where = f"{gib['total_gib']:.1f} GiB"
        if self.on_cpu:
            where = f"{gib['total_gib']:.2f} to {gib['most_gib']:.2f} GiB on the CPU"
        return (
            f"peak {where} ({self.peak.name}): weights {gib['weights_gib']:.2f} "
            f"({self.policy.parameters / 1e6:.1f} M parameters in {'4 bits' if self.in_4bit else self.dtype}), "
            "adapters with gradients and optimiser "
            f"{gib['adapters_gib']:.2f} ({self.adapted / 1e6:.1f} M parameters)"
        )


def upper(phase: Phase) -> int:
    """Return the most bytes that a phase may take on the CPU, of which :attr:`Phase.total` is the least."""
    return int(phase.parts["rest"] + (phase.total - phase.parts["rest"]) * KEPT + BUFFERS)


def estimate(resolved: ResolvedRequest, policy: Architecture, capabilities: Capabilities) -> Estimate:
    """Estimate a recipe's memory, phase by phase.

    ``policy`` are the sizes of the task's base, ``capabilities`` those of the recipe's method.
    """
    card, lora, trains = resolved.card, resolved.recipe.policy.lora, capabilities.trains
    first = architecture.first_adapted(lora, policy.layers)
    adapted = architecture.adapted(policy.shapes, lora.r, lora.targets, first) if trains else 0
    models, _ = reward_models(card)
    needs = resolved.recipe.needs
    on_cpu = needs.gpu == "none" and needs.gpu_memory_gib is None
    phases_of = _Phases(resolved, policy, adapted, models, on_cpu)
    readers = len(card.objectives) if capabilities.mixes else 1
    phases = [phases_of.sampling("sampling the base", adapters=0)]
    for name, config in stages(resolved.config) if trains else ():
        control = getattr(config, "control", None)
        if isinstance(control, ControlSpec) and isinstance(config, OnlineConfig):
            phases += phases_of.mixture(name, config, control, readers)
        elif isinstance(config, OnlineConfig):
            phases += phases_of.online(name, config)
        else:
            phases += phases_of.sft(name, config)
    judging, unknown = reward_models(card, judging=True)
    answering = _Phases(resolved, policy, adapted, judging, on_cpu)
    # Interpolated experts are one adapter, whose rank is the sum of theirs.
    placed = len(card.objectives) if capabilities.interpolates else readers
    phases.append(answering.sampling("answering", adapters=adapted * 4 * placed, readers=readers))
    return Estimate(policy, adapted, card.dtype, phases, unknown, on_cpu, card.load_in_4bit)


def reward_models(card: TaskCard, judging: bool = False) -> tuple[list[tuple[ModelObjective, Architecture]], list[str]]:
    """Return the card's reward models with their sizes, and the names of those whose sizes are not known.

    Objectives that share a model are loaded once. With ``judging`` those that only the judge uses count, too.
    """
    models, unknown, seen = [], [], set()
    for spec in [*card.objectives, *(card.gold_objectives or () if judging else ())]:
        if not isinstance(spec, ModelObjective) or spec.reading in seen:
            continue
        seen.add(spec.reading)
        sizes = sizes_of(spec.model)
        if sizes is None:
            unknown.append(spec.model)
        else:
            several = isinstance(spec, ClassifierObjective) and spec.members is not None
            models += [(spec, sizes)] * (len(member_folders(Path(os.path.expanduser(spec.model)))) if several else 1)
    return models, unknown


def sizes_of(model: str, where: str = "model") -> Architecture | None:
    """Return the sizes of a model folder or known hub model, None when they are not known."""
    folder = builtin.converted(model) or Path(os.path.expanduser(model))
    return architecture.of_folder(folder, where) if os.path.isdir(folder) else architecture.KNOWN.get(model)


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


def _base(sizes: Architecture, card: TaskCard) -> int:
    width = WIDTH[card.dtype]
    if not card.load_in_4bit:
        return sizes.parameters * width
    linear = architecture.linear(sizes.shapes)
    return int(sum(linear) * NF4) + (sizes.parameters - sum(linear)) * width + max(linear, default=0) * width


def _scorer(spec: ModelObjective, sizes: Architecture) -> int:
    """Return the bytes of a scoring model's weights."""
    width = WIDTH[spec.dtype]
    if spec.bits is None:
        return sizes.parameters * width
    # Of models that are known by their sizes alone: all but the embeddings are taken for linear layers.
    linear = sum(architecture.linear(sizes.shapes)) or max(0, sizes.parameters - sizes.vocabulary * sizes.hidden)
    return int(linear * (NF4 if spec.bits == 4 else 1)) + (sizes.parameters - linear) * width


class _Phases:
    """The phases of one recipe."""

    def __init__(
        self,
        resolved: ResolvedRequest,
        policy: Architecture,
        adapted: int,
        models: Sequence[tuple[ModelObjective, Architecture]],
        on_cpu: bool = False,
    ) -> None:
        card, self.how = resolved.card, resolved.recipe.policy
        self.on_cpu, self.rest = on_cpu, LIBRARIES if on_cpu else REST
        self.policy, self.lora, self.adapted = policy, self.how.lora, adapted
        self.objectives, self.limits, self.width = len(card.objectives), card.generation, WIDTH[card.dtype]
        self.tokens = self.limits.max_tokens
        self.layers = policy.layers - architecture.first_adapted(self.lora, policy.layers)
        """Through which the backward pass goes."""
        weights = [_scorer(spec, sizes) for spec, sizes in models]
        self.resident = {"base": _base(policy, card), "reward models": sum(weights)}
        activations = (
            spec.batch_tokens * (6 * size.hidden + 2 * size.inner) * WIDTH[spec.dtype] for spec, size in models
        )
        self.scoring = {"scoring": max(activations, default=0)}
        if resolved.recipe.rewards.offload and not on_cpu:
            self.scoring["reward models"] = max(weights, default=0)
            del self.resident["reward models"]
        inside = max(0, policy.parameters - policy.vocabulary * policy.hidden)  # embeddings have no adapters
        folds = policy.parameters <= FOLDS_BELOW and not card.load_in_4bit
        self.folded = inside * self.width if adapted and folds else 0

    def sampling(self, name: str, adapters: int, rows: int | None = None, readers: int = 1) -> Phase:
        """Return a phase in which texts are sampled and scored; ``adapters`` in bytes, ``readers`` read each row."""
        rows = readers * (self.limits.batch_size if rows is None else rows)
        cache = rows * self.tokens * 2 * self.policy.layers * self.policy.key_value * self.width
        drawing = 33 if self.limits.top_p < 1 else 12  # a nucleus is sorted
        logits = rows * self.policy.vocabulary * (self.width + drawing)
        # One after the other: what takes more counts.
        busy = {"KV cache": cache, "logits": logits} if cache + logits > sum(self.scoring.values()) else self.scoring
        folded = {"folded": self.folded * readers} if self.folded and adapters else {}
        return Phase(name, {**self.resident, "adapters": adapters, **folded, **busy, "rest": self.rest})

    def online(self, name: str, config: OnlineConfig) -> list[Phase]:
        """Return the phases of a stage in the online engine."""
        reference = self.adapted * 4 if config.own_reference else 0
        adapters = self.adapted * TRAINED + reference
        rows = min(config.micro_batch, config.rows)
        tokens = rows * self.tokens
        again = bool(self.how.gradient_checkpointing)
        read, repeated = self._shared(rows, config) if config.share_prompts else (tokens, 0)
        heads, kept = 0, self._kept(read, again, autocast=False, dropout=False) + repeated
        if isinstance(config, PpoConfig):
            heads = self.objectives * (self.policy.hidden + 1) * TRAINED
            # Every layer's state, of which a checkpointed layer's input is one.
            kept += tokens * (1 if again else self.policy.layers + 1) * self.policy.hidden * self.width
        count = rows * (self.limits.max_new_tokens + 1) * self.policy.vocabulary
        logits = (count if self._whole_head() else min(count, max(AT_ONCE, self.policy.vocabulary))) * (self.width + 12)
        parts = {**self.resident, "adapters": adapters, "value heads": heads, "activations": kept, "logits": logits}
        return [
            self.sampling(f"{name}: rollout", adapters + heads, config.rows_at_once),
            Phase(f"{name}: update", {**parts, "rest": self.rest}),
        ]

    def _whole_head(self) -> bool:
        """Whether all logits of a part are held: only those of a frozen linear map are made in chunks."""
        return self.policy.softened or architecture.adapted({architecture.HEAD: [1, 1]}, 1, self.lora.targets) > 0

    def _shared(self, rows: int, config: OnlineConfig) -> tuple[int, int]:
        """Return the tokens read where rows share their prompts, and the bytes of the keys repeated for them."""
        prompts, limits = -(-rows // config.rows_per_prompt), self.limits
        keys = 2 * self.policy.hidden * self.policy.layers * self.width  # as wide as queries: attention expands them
        read = prompts * limits.max_prompt_tokens + rows * limits.max_new_tokens
        return read, rows * limits.max_prompt_tokens * keys

    def mixture(self, name: str, config: OnlineConfig, control: ControlSpec, readers: int) -> list[Phase]:
        """Return the phases in which frozen experts are mixed, and the small model that weighs them is trained."""
        tokens = min(config.micro_batch, config.rows) * self.tokens
        body = sizes_of(control.model) if control.model is not None else None
        if control.form == "adapter":
            first = architecture.first_adapted(control.lora, self.policy.layers, "control.lora")
            count = architecture.adapted(self.policy.shapes, control.lora.r, control.lora.targets, first)
            kept = self._kept(1, bool(self.how.gradient_checkpointing), False, False, self.policy.layers - first)
        else:
            w, layers = control.width, control.layers
            body = body or Architecture(w * (16 * w * layers + self.policy.hidden), w, 4 * w, layers, w, 0)
            count = body.parameters
            kept = int(body.layers * layer_bytes(body, 4, LoraSpec(r=1, dropout=0.0), 1, autocast=False))
        # Each expert's adapter, and the stack of all that one pass reads.
        experts = self.adapted * 4 * readers * (1 if self.folded else 2)
        rollout = self.sampling(f"{name}: rollout", experts, config.rows_at_once, readers)
        parts = {part: size for part, size in rollout.parts.items() if part in {*self.resident, "adapters", "folded"}}
        parts |= {"control": count * TRAINED, "activations": tokens * kept, "rest": self.rest}
        if getattr(config, "space", None) == "logit":  # the experts' logits and log-probabilities, and their mixture
            places = min(config.micro_batch, config.rows) * (self.limits.max_new_tokens + 1)
            parts["logits"] = places * self.policy.vocabulary * (readers * (self.width + 4) + 8)
        return [
            Phase(rollout.name, {**rollout.parts, "control": count * TRAINED}),
            Phase(f"{name}: update", parts),
        ]

    def sft(self, name: str, config: SftConfig) -> list[Phase]:
        """Return the phase of a stage on fixed rows or pairs, by trl's trainers."""
        rows = config.batch // config.accumulate * (config.rows_per_pair if isinstance(config, DpoStage) else 1)
        tokens = rows * config.max_tokens
        dropout, logits = not isinstance(config, DpoStage), tokens * self.policy.vocabulary
        checkpointing = self.how.gradient_checkpointing
        shares = isinstance(config, DpoStage) and config.share_prompts
        again = not (self.on_cpu or shares) if checkpointing is None else checkpointing
        kept = self._kept(tokens, again, autocast=self.width == 2 and not self.on_cpu, dropout=dropout)
        if self.width == 4 and not self.on_cpu and not again:  # autocast's copies of the weights, of every pass
            linear = sum(architecture.linear(self.policy.shapes)) * self.layers // self.policy.layers
            kept += 2 * linear * (2 if shares else 1)
        if not self.on_cpu:
            logits = min(TILE, tokens) * COLUMNS * self.width
        elif logits > AT_ONCE and not self._whole_head():  # not trl's, see moalign.lm.marked
            logits = AT_ONCE * 16
        else:
            logits = int(logits * 4 * COPIES)
        beside = 4 * config.gradients_kept(self.objectives) if isinstance(config, DpoStage) else 0
        parts = {
            "adapters": self.adapted * (TRAINED + beside),
            "activations": kept,
            "logits": logits + tokens * self.policy.hidden * 4,
        }
        return [Phase(f"{name}: update", {**self.resident, **parts, "rest": self.rest})]

    def _kept(self, tokens: int, checkpointing: bool, autocast: bool, dropout: bool, layers: int | None = None) -> int:
        """Return what autograd keeps of ``layers`` (None: all that are trained through).

        With checkpointing that is their inputs, and one layer while it is read.
        """
        one, layers = self._layer(autocast, dropout), self.layers if layers is None else layers
        return int(tokens * (layers * self.policy.hidden * self.width + one if checkpointing else layers * one))

    def _layer(self, autocast: bool, dropout: bool) -> float:
        """Return :func:`layer_bytes` of the policy; ``dropout`` False where training switches it off."""
        lora = self.lora if dropout else self.lora.model_copy(update={"dropout": 0.0})
        return layer_bytes(self.policy, self.width, lora, self.adapted, autocast, mask=4 if self.on_cpu else 1)

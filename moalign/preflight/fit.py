"""Which settings make a recipe fit a card, by the memory model; or why none does.

Tried in this order, each kept while more is needed, and the largest that fits is taken:

1. ``sample_batch`` of each online stage (and ``task.generation.batch_size``, where the base or the trained policy
   answers), halved;
2. ``micro_batch`` of each online stage, halved, ``accumulate`` of each supervised one, raised;
3. ``policy.gradient_checkpointing``, in place of ``share_prompts`` where that is on;
4. ``rewards.offload``;
5. ``policy.load_in_4bit``.

Nothing but the last changes what is learned. It and ``task.generation.batch_size`` are of the task: runs are compared
with runs that have the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moalign.config.load import ResolvedRequest
from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.lm.architecture import Architecture
from moalign.methods.base import Capabilities
from moalign.preflight import memory
from moalign.preflight.memory import GIB, Phase
from moalign.training.settings import PpoConfig, SftConfig

CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)
"""GiB of cards that there are."""
SHOWN = (24, 48, 80)
"""Of these a recipe is told of, where no card is named."""
USABLE = 0.98
"""Share of a card's memory that a process gets: 23.6 GiB of an RTX 4090's 24 (assumed for all)."""
SWITCHES = ("policy.gradient_checkpointing", "rewards.offload", "policy.load_in_4bit")

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Fit:
    """How a recipe fits one card."""

    card_gib: float
    settings: Settings | None
    """Dotted names as ``--set`` takes them; empty: the recipe as it is; None: no settings make it fit."""
    peak: Phase
    """With these settings; where none fit, with the smallest."""
    smallest_gib: int | None = None
    """The smallest card of :data:`CARDS` that it could be made to fit; None where it fits, and where there is none."""

    @property
    def texts(self) -> list[str]:
        """The settings as ``--set`` texts."""
        return [f"{name}={str(value).lower()}" for name, value in (self.settings or {}).items()]


def gib_of(text: str) -> float:
    """Return the GiB of a card's memory such as ``24GB``; RequestError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:gb|gib)?\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise RequestError(f"--gpu: found {text!r}; allowed: the memory of a card, such as 24GB")
    return float(found[1])


def fit(resolved: ResolvedRequest, policy: Architecture, able: Capabilities, gib: float) -> Fit:
    """Return how the recipe of a policy of these sizes fits a card of ``gib``."""
    search = _Search(resolved, policy, able)
    settings, peak = search.settings(gib)
    if settings is not None:
        return Fit(gib, settings, peak)
    larger = (card for card in CARDS if card > gib and search.settings(card)[0] is not None)
    return Fit(gib, None, peak, next(larger, None))


def changed(resolved: ResolvedRequest, settings: Settings) -> ResolvedRequest:
    """Return a request with settings changed, dotted names as ``--set`` takes them."""
    parts: dict[str, Strict] = {"task": resolved.card, "config": resolved.config, "recipe": resolved.recipe}
    for name, value in settings.items():
        first, *rest = keys = name.split(".")
        part, keys = (first, rest) if first in ("task", "config") else ("recipe", keys)
        parts[part] = _put(parts[part], keys, value)
        if name == "policy.load_in_4bit":
            parts["task"] = _put(parts["task"], ["load_in_4bit"], value)
    made: Any = {"card": parts["task"], "config": parts["config"], "recipe": parts["recipe"]}
    return replace(resolved, **made)


def _put(model: Strict, keys: list[str], value: Any) -> Strict:
    inner = value if len(keys) == 1 else _put(getattr(model, keys[0]), keys[1:], value)
    return model.model_copy(update={keys[0]: inner})


class _Search:
    """Tries settings in order."""

    def __init__(self, resolved: ResolvedRequest, policy: Architecture, able: Capabilities) -> None:
        # Any card: what is not stated would be taken for the CPU.
        self.resolved = changed(resolved, {"needs.gpu_memory_gib": 1.0})
        self.policy, self.able = policy, able
        rollout = resolved.recipe.rollout
        self.usable = GIB * (USABLE - (rollout.gpu_memory if rollout.engine == "vllm" else 0.0))
        self.stages = dict(memory.stages(resolved.config)) if able.trains else {}

    def phases(self, settings: Settings) -> dict[str, Phase]:
        """Return the phases of the recipe with these settings, by name."""
        found = memory.estimate(changed(self.resolved, settings), self.policy, self.able)
        return {phase.name: phase for phase in found.phases}

    def settings(self, gib: float) -> tuple[Settings | None, Phase]:
        """Return the first settings that fit (None: none do) and their peak, or that of the smallest."""
        switches: dict[str, bool] = {}
        for name in (None, *self._useful()):
            switches |= {} if name is None else {name: True}
            if name == "policy.gradient_checkpointing":
                sharing = (stage for stage, config in self.stages.items() if getattr(config, "share_prompts", False))
                switches |= {f"{_where(stage)}.share_prompts": False for stage in sharing}
            found, peak = self._sizes(dict(switches), gib)
            if found is not None:
                return self._without_idle(found, gib), peak
        return None, peak

    def _useful(self) -> Iterator[str]:
        policy, models = self.resolved.recipe.policy, memory.reward_models(self.resolved.card, judging=True)[0]
        useful = (
            bool(self.stages) and not policy.gradient_checkpointing,
            bool(models) and not self.resolved.recipe.rewards.offload,
            not self.resolved.card.load_in_4bit and self.resolved.recipe.rollout.engine == "hf",
        )
        return (name for name, use in zip(SWITCHES, useful, strict=True) if use)

    def _sizes(self, settings: dict[str, Any], gib: float) -> tuple[dict[str, Any] | None, Phase]:
        """Make batches small until each phase fits; None where one does not at its smallest, with the peak then."""
        limit, phases = gib * self.usable, self.phases(settings)
        for phase in list(phases):
            for name, value in self._smaller(phase):
                if phases[phase].total <= limit:
                    break
                settings[name] = value
                phases = self.phases(settings)
        worst = max(phases.values(), key=lambda phase: phase.total)
        return (settings if worst.total <= limit else None), worst

    def _without_idle(self, settings: dict[str, Any], gib: float) -> Settings:
        """Leave out switches without which the same sizes fit."""
        for name in SWITCHES:
            fewer = {key: value for key, value in settings.items() if key != name}
            if name in settings and all(phase.total <= gib * self.usable for phase in self.phases(fewer).values()):
                settings = fewer
        return settings

    def _smaller(self, phase: str) -> Iterator[tuple[str, int]]:
        """Yield the settings that make a phase smaller, one after another."""
        stage, _, what = phase.rpartition(": ")
        config = self.stages.get(stage)
        where = _where(stage)
        if config is None:
            yield from _halves("task.generation.batch_size", self.resolved.card.generation.batch_size, 1)
        elif isinstance(config, SftConfig):
            larger = (n for n in range(config.accumulate + 1, config.batch + 1) if config.batch % n == 0)
            yield from ((f"{where}.accumulate", n) for n in larger)
        elif what == "rollout":
            yield from _halves(f"{where}.sample_batch", config.rows_at_once, 1)
        else:  # pairs are learned from together
            least = 1 if isinstance(config, PpoConfig) else 2
            yield from _halves(f"{where}.micro_batch", min(config.rows, config.micro_batch), least)


def _where(stage: str) -> str:
    return "config" if stage == "training" else f"config.{stage}"


def _halves(name: str, number: int, least: int) -> Iterator[tuple[str, int]]:
    while number > least:
        number = max(least, number // 2)
        yield name, number

"""What a recipe costs at most, before it runs: tokens and scores as the meter counts them, rough hours on its GPU."""

from __future__ import annotations

from dataclasses import dataclass

from moalign.config.load import ResolvedRequest
from moalign.core import preferences
from moalign.lm.architecture import Architecture
from moalign.methods.base import Capabilities
from moalign.preflight.memory import WIDTH, stages
from moalign.training import experts
from moalign.training.settings import CostHints, DpoStage, OnlineConfig

GPUS = {
    # name: (dense bfloat16 TFLOP/s, GB/s), from the makers' data sheets
    "A6000": (155.0, 768.0),
    "A100": (312.0, 2039.0),
    "H100": (989.0, 3350.0),
    "H200": (989.0, 4800.0),
    "RTX 4090": (165.0, 1008.0),
    "RTX 3090": (71.0, 936.0),
}
TRAINING_SHARE = 0.35
"""Share of a GPU's peak that training reaches (assumed)."""
DECODING_SHARE = 0.5
"""Share of a GPU's memory bandwidth that decoding reaches (assumed)."""


@dataclass(frozen=True)
class CostBounds:
    """Upper bounds; every response as long as it may be, every row as long as it may be."""

    policies: int
    """Separate training runs inside the recipe."""
    tokens_generated: int
    tokens_trained: int
    reward_calls: int
    gpu: str | None
    hours: float | None
    """None when the GPU is not one of :data:`GPUS` or the base's size is not known."""


def estimate(resolved: ResolvedRequest, capabilities: Capabilities, policy: Architecture | None) -> CostBounds:
    """Return the training cost of a recipe; answering and judging come on top.

    ``policy`` None: the base's size is not known, and neither are the hours.
    """
    config, objectives, limits = resolved.config, len(resolved.card.objectives), resolved.card.generation
    policies = _policies(resolved, capabilities)
    trained = 0
    sampled = config.responses_sampled() if isinstance(config, CostHints) else 0
    waits = -(-sampled // limits.batch_size)  # responses sampled one after the other: what decoding waits for
    for name, stage in stages(config) if capabilities.trains else ():
        times = objectives if name.split(".")[0] in experts.STAGES else policies
        if isinstance(stage, OnlineConfig):
            rows = times * stage.steps * stage.batch * stage.samples
            sampled += rows
            trained += rows * stage.epochs * (limits.max_prompt_tokens + limits.max_new_tokens)
            waits += times * stage.steps
        else:
            per_row = 2 if isinstance(stage, DpoStage) else 1
            trained += times * stage.steps * stage.batch * per_row * stage.max_tokens
    gpu, hours = _hours(resolved, policy, trained, waits * limits.max_new_tokens)
    return CostBounds(policies, sampled * limits.max_new_tokens, trained, sampled * objectives, gpu, hours)


def _policies(resolved: ResolvedRequest, capabilities: Capabilities) -> int:
    """Return how many policies are trained one after the other."""
    if not capabilities.trains:
        return 0
    if capabilities.one_policy or (isinstance(resolved.config, CostHints) and resolved.config.one_policy):
        return 1
    if resolved.recipe.prefs is not None:
        return len(resolved.recipe.prefs)
    return len(preferences.grid_of(len(resolved.card.objectives), resolved.card.grid))


def _hours(
    resolved: ResolvedRequest, policy: Architecture | None, trained: int, passes: int
) -> tuple[str | None, float | None]:
    """Return the GPU, where it is known, and the hours of training and of ``passes`` forward passes of one token."""
    name = next((gpu for gpu in GPUS if gpu in resolved.recipe.needs.gpu), None)
    if name is None or policy is None or not policy.parameters:
        return name, None
    flops, bandwidth = GPUS[name]
    # Frozen base with adapters: forward 2, backward to the activations 2, recomputed forward 2 operations a parameter.
    training = trained * 6 * policy.parameters / (flops * 1e12 * TRAINING_SHARE)
    decoding = passes * policy.parameters * WIDTH[resolved.card.dtype] / (bandwidth * 1e9 * DECODING_SHARE)
    return name, (training + decoding) / 3600

"""Memory and cost of a request in words, and whether it fits the GPU that the recipe states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moalign.config.load import ResolvedRequest
from moalign.core.preferences import Preference
from moalign.methods import registry
from moalign.preflight import cost, memory
from moalign.preflight.memory import GIB
from moalign.preflight.report import Preflight
from moalign.tasks.task import WHERE, Task

_SMALLER_MICRO_BATCH = "a smaller micro_batch (supervised: a larger accumulate)"
_REMEDIES = {
    "base": "a smaller model, dtype bfloat16",
    "reward models": "dtype bfloat16 for the objectives",
    "KV cache": "a smaller task.generation.batch_size (in training: batch or samples)",
    "logits": _SMALLER_MICRO_BATCH,
    "activations": _SMALLER_MICRO_BATCH,
    "scoring": "smaller batch_tokens for the objectives",
    "adapters": "a smaller policy.lora.r",
}
"""What makes a part of memory smaller."""


def check_sizes(
    report: Preflight,
    resolved: ResolvedRequest,
    model: Path | None = None,
    task: Task | None = None,
    given: Sequence[Preference] | None = None,
) -> None:
    """Estimate cost, and memory phase by phase, and compare the memory with the GPU that the recipe states.

    ``model`` is the policy's folder where it is a hub model in the local cache; ``task`` and ``given`` as
    :func:`moalign.preflight.cost.estimate` has them.
    """
    card, able = resolved.card, registry.get(resolved.recipe.method).capabilities
    report.memory = {"stated_gib": resolved.recipe.needs.gpu_memory_gib, "total_gib": None, "phases": []}
    if card.built_in_base:
        report.add("memory", "no GPU needed; the built-in base is a few hundred KiB")
    policy = None
    with report.collecting():
        policy = memory.sizes_of(str(model or card.model), WHERE) if card.model is not None else None
    with report.collecting():
        _add_cost(report, cost.estimate(resolved, able, policy, task, given))
    if card.built_in_base:
        return
    if policy is None or not policy.shapes:
        report.notes.append("memory: not known, because the model's sizes are not (no folder, and no model known here)")
        return
    estimate = None
    with report.collecting():
        estimate = memory.estimate(resolved, policy, able)
    if estimate is None:
        return
    report.memory |= estimate.as_dict()
    report.add("memory", estimate.sentence())
    for phase in estimate.phases:
        parts = [f"{name} {size / GIB:.1f}" for name, size in phase.parts.items() if size >= 0.05 * GIB]
        report.add("", f"{phase.total / GIB:6.1f} GiB  {phase.name}: {', '.join(parts) or 'little'}")
    for name in estimate.unknown:
        report.notes.append(f"memory: the size of the reward model {name} is not known; it comes on top")
    _check_fit(report, resolved, estimate)


def _check_fit(report: Preflight, resolved: ResolvedRequest, estimate: memory.Estimate) -> None:
    needs, worst = resolved.recipe.needs, estimate.peak
    if estimate.on_cpu:
        return
    if needs.gpu_memory_gib is None:
        report.notes.append("memory: the recipe does not state a GPU's memory (needs.gpu_memory_gib)")
        return
    over = [phase.name for phase in estimate.phases if phase.total > needs.gpu_memory_gib * GIB]
    if not over:
        share = worst.total / GIB / needs.gpu_memory_gib
        report.add("", f"fits {needs.gpu} ({needs.gpu_memory_gib:g} GiB): {share:.0%} at the peak")
        return
    largest = max(worst.parts, key=lambda name: worst.parts[name])
    report.problems.append(
        f"{report.recipe}: needs.gpu_memory_gib: {', '.join(over)} take up to {worst.total / GIB:.1f} GiB (most: "
        f"{largest}, {worst.parts[largest] / GIB:.1f}), but {needs.gpu_memory_gib:g} GiB are stated; take "
        f"{_REMEDIES.get(largest, 'a smaller model')} or a larger GPU"
    )


def _cost_in_words(bounds: cost.CostBounds) -> str:
    if not bounds.policies:
        return "nothing is trained; answering samples and scores"
    parts = [f"{bounds.policies} polic{'y' if bounds.policies == 1 else 'ies'}"]
    parts += [f"{bounds.experts} experts in runs of their own"] if bounds.experts else []
    counts = {"generated": bounds.tokens_generated, "trained on": bounds.tokens_trained}
    parts += [f"{number / 1e6:.1f} M tokens {what}" for what, number in counts.items() if number]
    parts += [f"{bounds.reward_calls:,} scores"] if bounds.reward_calls else []
    if bounds.hours is not None:
        parts.append(f"about {bounds.hours:.1f} h on {bounds.gpu} by its data sheet")
    return ("" if bounds.unknown else "at most ") + ", ".join(parts)


def _add_cost(report: Preflight, bounds: cost.CostBounds) -> None:
    report.cost = asdict(bounds)
    report.add("cost", _cost_in_words(bounds))
    first = bounds.first_use
    counts = {"responses of the base": first.responses_sampled, "scores": first.reward_calls}
    parts = [f"{number:,} {what}" for what, number in counts.items() if number]
    if parts:
        report.add("", f"once for all runs of the task, counted by none: at most {' and '.join(parts)}")
    for what in bounds.unknown:
        report.notes.append(f"cost: {what}: not counted, it comes on top")

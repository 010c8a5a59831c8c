"""Memory and cost of a request in words, and whether it fits the GPU that the recipe states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from moalign.config.load import ResolvedRequest
from moalign.core.preferences import Preference
from moalign.lm.architecture import Architecture
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.preflight import cost, fit, memory
from moalign.preflight.memory import GIB
from moalign.preflight.report import Preflight
from moalign.tasks.task import WHERE, Task

UNMEASURED = "not measured on a GPU yet"
_SMALLER_MICRO_BATCH = "a smaller micro_batch (supervised: a larger accumulate)"
_REMEDIES = {
    "base": "a smaller model, policy.dtype: bfloat16, policy.load_in_4bit",
    "reward models": "dtype bfloat16 or load_in_4bit for the objectives, rewards.offload",
    "KV cache": "a smaller task.generation.batch_size (in training: sample_batch)",
    "logits": _SMALLER_MICRO_BATCH,
    "activations": f"{_SMALLER_MICRO_BATCH}, policy.gradient_checkpointing",
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
    cards: Sequence[float] = (),
    required: bool = False,
) -> None:
    """Estimate cost, and memory phase by phase, and compare the memory with the GPU that the recipe states.

    ``model`` is the policy's folder where it is a hub model in the local cache; ``task`` and ``given`` as
    :func:`moalign.preflight.cost.estimate` has them. For each of ``cards``, in GiB, settings that fit are looked for;
    that there are none is a problem if they are ``required``.
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
        if required:
            report.problems.append(f"--gpu: the task {card.name} needs none: its built-in base is a few hundred KiB")
        return
    if policy is None or not policy.shapes:
        text = "memory: not known, because the model's sizes are not (no folder, and no model known here)"
        (report.problems if required else report.notes).append(text)
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
    if resolved.recipe.rollout.engine == "vllm":
        share = f"{resolved.recipe.rollout.gpu_memory:g} of a GPU (rollout.gpu_memory)"
        report.notes.append(f"memory: vLLM takes {share} on top of this; {UNMEASURED}")
    _check_fit(report, resolved, estimate)
    for gib in cards:
        hours = partial(_hours, resolved, able, policy, task, given)
        fitted = fit.fit(resolved, policy, able, gib)
        _add_card(report, fitted, hours, _measured(resolved, fitted), required)


def _hours(
    resolved: ResolvedRequest,
    able: Capabilities,
    policy: Architecture,
    task: Task | None,
    given: Sequence[Preference] | None,
    fitted: fit.Fit,
) -> dict[str, float]:
    """Return the hours of training on each card of this memory whose data sheet is known."""
    hours = {}
    for gpu in (name for name, gib in cost.CARDS.items() if gib == fitted.card_gib):
        request = fit.changed(resolved, {**(fitted.settings or {}), "needs.gpu": gpu})
        bounds = cost.estimate(request, able, policy, task, given)
        if bounds.hours is not None:
            hours[gpu] = bounds.hours
    return hours


def _measured(resolved: ResolvedRequest, fitted: fit.Fit) -> str:
    """Return what was measured, which is of the recipe as it is."""
    other = [text for text in resolved.as_given["set"] if not str(text).startswith("needs.")]
    return UNMEASURED if other or fitted.settings != {} else resolved.recipe.needs.measured


def _add_card(
    report: Preflight, fitted: fit.Fit, hours_of: Callable[[fit.Fit], dict[str, float]], measured: str, required: bool
) -> None:
    """Report the settings with which a card is large enough."""
    name, peak = f"{fitted.card_gib:g} GB", f"{fitted.peak.total / GIB:.1f} GiB ({fitted.peak.name})"
    hours = {} if fitted.settings is None else hours_of(fitted)
    report.cards.append(
        {
            "card_gib": fitted.card_gib,
            "fits": fitted.settings is not None,
            "settings": None if fitted.settings is None else dict(fitted.settings),
            "peak_gib": fitted.peak.total / GIB,
            "peak_phase": fitted.peak.name,
            "smallest_gib": fitted.card_gib if fitted.settings is not None else fitted.smallest_gib,
            "hours": hours,
            "measured": measured,
        }
    )
    if fitted.settings is None:
        larger = f"no card of up to {fit.CARDS[-1]} GB is large enough"
        if fitted.smallest_gib is not None:
            larger = f"the smallest card that would do has {fitted.smallest_gib} GB"
        largest = max(fitted.peak.parts, key=lambda part: fitted.peak.parts[part])
        text = (
            f"no settings fit: with all that save memory {peak}, most of it {largest} "
            f"({fitted.peak.parts[largest] / GIB:.1f}); {larger}"
        )
        report.add(name, text)
        if required:
            report.problems.append(f"--gpu {fitted.card_gib:g}GB: {text}")
        return
    settings = " ".join(f"--set {text}" for text in fitted.texts) or "as it is"
    parts = [f"{settings}: {peak}"]
    parts += ["about " + " or ".join(f"{number:.1f} h on {gpu}" for gpu, number in hours.items())] if hours else []
    report.add(name, f"{', '.join(parts)}; {'' if measured == UNMEASURED else 'measured: '}{measured}")
    of_task = [key for key in ("task.generation.batch_size", "policy.load_in_4bit") if key in fitted.settings]
    if of_task:
        only = "runs are compared with runs that have the same"
        report.notes.append(f"{name}: {' and '.join(of_task)} make another task of it: {only}")


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

"""What settings need of the machine, found out without importing it: packages for attention, few bits and vLLM."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

from moalign.config.card import TaskCard
from moalign.config.objectives import ClassifierObjective, LmObjective
from moalign.config.recipe import ATTENTION, PolicySpec, RolloutSpec

RANKS = (1, 8, 16, 32, 64)
"""Ranks of adapters that vLLM reserves room for; one between two of them takes the larger one. It knows larger ones,
too, with kernels that are not tried here."""


def problems(policy: PolicySpec, card: TaskCard) -> list[str]:
    """Return what keeps a policy from being loaded as it is set, a message each."""
    return [*_of_few_bits(card), *_of_attention(policy.attention, card.dtype)]


def _of_few_bits(card: TaskCard) -> list[str]:
    if find_spec("bitsandbytes") is not None:
        return []
    lacking = "but the package bitsandbytes is not installed; install it (pip install 'moalign[gpu]'), or"
    problems = [
        f"objective {spec.name!r}: load_in_{spec.bits}bit: found true, {lacking} leave the setting away (dtype: "
        f"bfloat16 takes {16 // spec.bits} times as much)"
        for spec in (*card.objectives, *(card.gold_objectives or ()))
        if isinstance(spec, ClassifierObjective | LmObjective) and spec.bits is not None
    ]
    if card.load_in_4bit:
        problems.append(
            f"policy.load_in_4bit: found true, {lacking} leave the setting away (policy.dtype: bfloat16 takes four "
            "times as much)"
        )
    return problems


def _of_attention(attention: str | None, dtype: str) -> list[str]:
    if attention is None or attention in ("eager", "sdpa"):
        return []
    package, module = ("flash-attn", "flash_attn") if attention in ATTENTION else ("kernels", "kernels")
    found = f"policy.attention: found {attention!r}, but"
    if find_spec(module) is None:
        return [f"{found} the package {package} is not installed; install it, or take sdpa, which needs none"]
    if attention in ATTENTION and dtype == "float32":
        return [f"{found} it computes in half precision only and dtype is float32; set policy.dtype: bfloat16"]
    return []


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return find_spec("vllm") is not None


def vllm_answers(card: TaskCard) -> bool:
    """Whether vLLM, which sampled in training, can sample for a finished run here, too."""
    return has_vllm() and not _too_precise(card)


def engine_problems(rollout: RolloutSpec, card: TaskCard, rank: int, experts: int, mixes: bool) -> list[str]:
    """Return why vLLM cannot sample for a run, a message each; none where it does not have to.

    Args:
        rank: of the run's adapters.
        experts: how many of them are put together into the one that answers.
        mixes: whether several adapters sample every token together.
    """
    if rollout.engine == "hf":
        return []
    found = "rollout.engine: found 'vllm', but"
    wrong = {
        "vLLM is not installed; pip install 'moalign[vllm]' into an environment of its own": not has_vllm(),
        "the method mixes the next-token distributions of experts, and vLLM samples from one model": mixes,
        "the task's base is the sandbox's built-in one, too small for vLLM's kernels": card.built_in_base,
        "the task's base is in 4 bits, where it is not the base that vLLM would sample from": card.load_in_4bit,
        _too_large(rank, experts): rank * experts > RANKS[-1],
        "on a GPU it serves adapters in half precision only and dtype is float32; set task.dtype=bfloat16": (
            _too_precise(card)
        ),
    }
    return [f"{found} {why}; or take hf" for why, applies in wrong.items() if applies]


def _too_precise(card: TaskCard) -> bool:
    """Whether vLLM's LoRA kernels, of which only the CPU's take float32, cannot serve the task here."""
    return card.dtype == "float32" and _on_gpu()


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _too_large(rank: int, experts: int) -> str:
    each = f", which makes {rank * experts} of {experts} experts interpolated" if experts > 1 else ""
    return f"it serves adapters up to rank {RANKS[-1]}; found policy.lora.r = {rank}{each}"


def options(dtype: str, attention: str | None, in_4bit: bool, device: Any) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a base; with ``in_4bit`` it is loaded onto ``device``."""
    import torch

    kind: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        kind["attn_implementation"] = attention
    return kind | (few_bits(4, dtype, device) if in_4bit else {})


def four_bits(dtype: str) -> dict[str, Any]:
    """Return the settings of a ``BitsAndBytesConfig`` for linear layers in 4 bits (NF4, double quantisation)."""
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }


def few_bits(bits: Literal[4, 8], dtype: str, device: Any, whole: list[str] | None = None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for linear layers of few bits, loaded onto ``device``.

    ``whole`` are the last parts of names of layers that stay as they are; None: the output layer.
    """
    import logging

    from transformers import BitsAndBytesConfig

    # It warns at every layer of every pass that 8-bit layers compute in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    how = four_bits(dtype) if bits == 4 else {"load_in_8bit": True}
    return {
        "quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=whole),
        "device_map": {"": str(device)},
    }

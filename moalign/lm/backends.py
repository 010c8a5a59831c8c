"""What settings need of the machine, found out without importing it: packages for attention and for 4-bit weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from moalign.config.card import TaskCard
from moalign.config.recipe import ATTENTION, PolicySpec


def problems(policy: PolicySpec, card: TaskCard) -> list[str]:
    """Return what keeps a policy from being loaded as it is set, a message each."""
    return [*_of_4bit(card), *_of_attention(policy.attention, card.dtype)]


def _of_4bit(card: TaskCard) -> list[str]:
    if not card.load_in_4bit or find_spec("bitsandbytes") is not None:
        return []
    return [
        "policy.load_in_4bit: found true, but the package bitsandbytes is not installed; install it "
        "(pip install 'moalign[gpu]'), or leave the setting away (policy.dtype: bfloat16 takes four times as much)"
    ]


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


def options(dtype: str, attention: str | None, in_4bit: bool, device: Any) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a base; with ``in_4bit`` it is loaded onto ``device``."""
    import torch

    kind: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if attention is not None:
        kind["attn_implementation"] = attention
    if in_4bit:
        from transformers import BitsAndBytesConfig

        kind["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=kind["dtype"],
        )
        kind["device_map"] = {"": str(device)}
    return kind

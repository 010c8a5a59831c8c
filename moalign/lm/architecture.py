"""A model's sizes without loading it: from a folder's config and safetensors headers, or, for the models that recipes
name, from a table, before they are downloaded."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moalign.lm import model_folder

Shapes = dict[str, list[int]]

_LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_GPT2_LARGE = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1280, "n_layer": 36, "n_positions": 1024}

KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _LLAMA_2_7B,
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Ray2333/gpt2-large-harmless-reward_model": _GPT2_LARGE,
    "Ray2333/gpt2-large-helpful-reward_model": _GPT2_LARGE,
    "Tristan/gpt2_reward_summarization": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_positions": 1024,
    },
    "PKU-Alignment/beaver-7b-v1.0-reward": {**_LLAMA_2_7B, "vocab_size": 32001},
    "PKU-Alignment/beaver-7b-v1.0-cost": {**_LLAMA_2_7B, "vocab_size": 32001},
    # Encoders: (parameters, width, inner width, layers) are all that scoring needs.
    "mohameddhiab/humor-no-humor": {"parameters": 66_955_010, "dim": 768, "hidden_dim": 3072, "n_layers": 6},
    "CogComp/bart-faithful-summary-detector": {
        "parameters": 140_012_000,
        "d_model": 768,
        "encoder_ffn_dim": 3072,
        "encoder_layers": 12,
    },
    "OpenAssistant/reward-model-deberta-v3-large-v2": {
        "parameters": 435_063_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
    },
}
"""Configs of the models that recipes name, from their hub pages; parameter counts of encoders to three digits."""


@dataclass(frozen=True)
class Architecture:
    """The sizes that memory depends on."""

    parameters: int
    hidden: int
    inner: int
    """Width inside the feed-forward layer."""
    layers: int
    key_value: int
    """Width of the keys of one token in one layer (fewer heads with grouped queries)."""
    vocabulary: int
    shapes: Shapes
    """Weights by name; empty where only the count is known."""


def of_folder(folder: Path) -> Architecture | None:
    """Read a checked model folder; None when its config gives no sizes."""
    shapes = folder_shapes(folder)
    config = model_folder.read_config(folder, "model")
    return of_config(config, shapes)


def known(model: str) -> Architecture | None:
    """Return the sizes of a hub model in :data:`KNOWN`, before it is downloaded; None for another."""
    config = KNOWN.get(model)
    return None if config is None else of_config(config)


def of_config(config: dict[str, Any], shapes: Shapes | None = None) -> Architecture | None:
    """Return the sizes that a config.json gives; weights come from ``shapes`` or are derived for known kinds.

    None when the config does not name width and depth.
    """
    config = {**config, **(config.get("text_config") or {})}
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _first(config, "num_hidden_layers", "n_layer", "encoder_layers", "n_layers")
    if hidden is None or layers is None:
        return None
    heads = _first(config, "num_attention_heads", "n_head", "encoder_attention_heads", "n_heads") or 1
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    inner = _first(config, "intermediate_size", "n_inner", "encoder_ffn_dim", "hidden_dim") or 4 * hidden
    weights = shapes if shapes is not None else _shapes(config, hidden, inner, layers, groups * head)
    counted = sum(prod(shape) for shape in weights.values()) or int(config.get("parameters") or 0)
    vocabulary = int(config.get("vocab_size") or 0)
    return Architecture(counted, hidden, inner, layers, groups * head, vocabulary, weights)


def folder_shapes(folder: Path) -> Shapes:
    """Return the shape of every weight of a model folder, from the headers of its files."""
    files = model_folder.weight_files(folder, "model")
    return {name: shape for file in files for name, shape in _header(file).items()}


def _header(file: Path) -> Shapes:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _first(config: dict[str, Any], *names: str) -> int | None:
    value = next((config[name] for name in names if isinstance(config.get(name), int)), None)
    return None if value is None else int(value)


def _shapes(config: dict[str, Any], hidden: int, inner: int, layers: int, key_value: int) -> Shapes:
    """Return the weights of a Llama-like or GPT-2 language model; empty for other kinds."""
    kind = config.get("model_type")
    if kind == "gpt2":
        return _gpt2(config, hidden, inner, layers)
    if kind not in ("llama", "qwen2", "mistral"):
        return {}
    vocabulary = int(config["vocab_size"])
    shapes: Shapes = {"model.embed_tokens.weight": [vocabulary, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows in (("q_proj", hidden), ("k_proj", key_value), ("v_proj", key_value)):
            shapes[f"{at}.self_attn.{name}.weight"] = [rows, hidden]
            if kind == "qwen2":
                shapes[f"{at}.self_attn.{name}.bias"] = [rows]
        shapes[f"{at}.self_attn.o_proj.weight"] = [hidden, hidden]
        shapes[f"{at}.mlp.gate_proj.weight"] = [inner, hidden]
        shapes[f"{at}.mlp.up_proj.weight"] = [inner, hidden]
        shapes[f"{at}.mlp.down_proj.weight"] = [hidden, inner]
        shapes[f"{at}.input_layernorm.weight"] = [hidden]
        shapes[f"{at}.post_attention_layernorm.weight"] = [hidden]
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [vocabulary, hidden]
    return shapes


def _gpt2(config: dict[str, Any], hidden: int, inner: int, layers: int) -> Shapes:
    shapes: Shapes = {
        "transformer.wte.weight": [int(config["vocab_size"]), hidden],
        "transformer.wpe.weight": [int(config["n_positions"]), hidden],
        "transformer.ln_f.weight": [hidden],
        "transformer.ln_f.bias": [hidden],
    }
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        for name in ("ln_1", "ln_2"):
            shapes[f"{at}.{name}.weight"] = [hidden]
            shapes[f"{at}.{name}.bias"] = [hidden]
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            shapes[f"{at}.{name}.weight"] = [rows, columns]
            shapes[f"{at}.{name}.bias"] = [columns]
    return shapes


_NOT_ADAPTED = re.compile(r"(embed|wte|wpe|lm_head|score|norm|ln_)", re.IGNORECASE)
"""peft's ``all-linear`` leaves out the output layer; embeddings and norms are not linear layers."""


def adapted(shapes: Shapes, rank: int, targets: list[str] | str) -> int:
    """Return the parameters of LoRA adapters: two matrices ``[r, in]`` and ``[out, r]`` beside each ``[out, in]``."""
    return sum(rank * sum(shape) for name, shape in shapes.items() if _is_adapted(name, shape, targets))


def _is_adapted(name: str, shape: list[int], targets: list[str] | str) -> bool:
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    module = name.removesuffix(".weight")
    if targets == "all-linear":
        return _NOT_ADAPTED.search(module) is None
    if isinstance(targets, str):  # peft reads a text as a regular expression over the whole name
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)

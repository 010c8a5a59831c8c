"""A model's sizes without loading it: from a folder's config and safetensors headers, or, for the models that recipes
name, from a table, before they are downloaded. And whether a folder's weights and LoRA targets are those of its model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import model_folder

Shapes = dict[str, list[int]]


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
    shapes: Shapes = field(default_factory=dict)
    """Weights by name: all of a folder's; of a policy in :data:`KNOWN` those that adapters may change; else none. The
    output layer's are there also where they are the embeddings': adapters know it by its own name."""
    softened: bool = False
    """Whether a softcap or a scale follows the output layer."""


HEAD = "lm_head.weight"
_SOFTENED = ("final_logit_softcapping", "logit_scale", "logits_scaling")


# Built here and not as a model on the meta device: a dry run must not take the five seconds that importing it does.
def _llama(parameters: int, hidden: int, inner: int, layers: int, key_value: int, vocabulary: int) -> Architecture:
    """Return the sizes of a policy of the Llama kind."""
    matrices = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [key_value, hidden],
        "self_attn.v_proj": [key_value, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }
    shapes = {f"model.layers.{at}.{name}.weight": shape for at in range(layers) for name, shape in matrices.items()}
    return Architecture(
        parameters, hidden, inner, layers, key_value, vocabulary, {**shapes, HEAD: [vocabulary, hidden]}
    )


_GPT2_LARGE = Architecture(774_031_360, 1280, 5120, 36, 1280, 50257)

KNOWN = {
    "meta-llama/Llama-2-7b-hf": _llama(6_738_415_616, 4096, 11008, 32, 4096, 32000),
    "meta-llama/Llama-3.2-1B": _llama(1_235_814_400, 2048, 8192, 16, 512, 128256),
    "Qwen/Qwen2.5-0.5B": _llama(494_032_768, 896, 4864, 24, 128, 151936),
    "Qwen/Qwen2.5-0.5B-Instruct": _llama(494_032_768, 896, 4864, 24, 128, 151936),
    "Qwen/Qwen2.5-1.5B-Instruct": _llama(1_543_714_304, 1536, 8960, 28, 256, 151936),
    "smollm2-135m-instruct": _llama(134_515_008, 576, 1536, 30, 192, 49152),
    "Ray2333/gpt2-large-harmless-reward_model": _GPT2_LARGE,
    "Ray2333/gpt2-large-helpful-reward_model": _GPT2_LARGE,
    "Tristan/gpt2_reward_summarization": Architecture(124_440_576, 768, 3072, 12, 768, 50257),
    "PKU-Alignment/beaver-7b-v1.0-reward": Architecture(6_607_351_808, 4096, 11008, 32, 4096, 32001),
    "PKU-Alignment/beaver-7b-v1.0-cost": Architecture(6_607_351_808, 4096, 11008, 32, 4096, 32001),
    "mohameddhiab/humor-no-humor": Architecture(66_955_010, 768, 3072, 6, 768, 0),
    "CogComp/bart-faithful-summary-detector": Architecture(140_012_546, 768, 3072, 12, 768, 0),
    "OpenAssistant/reward-model-deberta-v3-large-v2": Architecture(435_062_785, 1024, 4096, 24, 1024, 0),
}
"""Sizes of the models that recipes name, as transformers builds them; of reward models with the head that scores."""


def of_folder(folder: Path, where: str = "model") -> Architecture | None:
    """Read a model folder; None when its config does not name width and depth, RequestError when it is damaged."""
    shapes = model_folder.shapes(folder, where)
    config = model_folder.read_config(folder, where)
    config |= own if isinstance(own := config.get("text_config"), dict) else {}
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _first(config, "num_hidden_layers", "n_layer", "encoder_layers", "n_layers")
    if hidden is None or layers is None:
        return None
    heads = _first(config, "num_attention_heads", "n_head", "encoder_attention_heads", "n_heads") or 1
    groups = _first(config, "num_key_value_heads") or heads
    head = _first(config, "head_dim") or hidden // heads
    inner = _first(config, "intermediate_size", "n_inner", "encoder_ffn_dim", "hidden_dim") or 4 * hidden
    parameters = sum(prod(shape) for shape in shapes.values())
    vocabulary, softened = _first(config, "vocab_size") or 0, any(config.get(name) for name in _SOFTENED)
    if not any(name.endswith(HEAD) for name in shapes):  # one tensor with the embeddings
        shapes = {**shapes, HEAD: [vocabulary, hidden]}
    return Architecture(parameters, hidden, inner, layers, groups * head, vocabulary, shapes, softened)


def _first(config: dict[str, Any], *names: str) -> int | None:
    """Return the first of the numbers above 0 that a config has under these names."""
    return next((int(config[name]) for name in names if isinstance(config.get(name), int) and config[name] > 0), None)


_ALL_LINEAR = r"(?!.*(?i:embed|wte|wpe|lm_head|score|norm|ln_)).*"
"""peft's ``all-linear`` leaves out the output layer; embeddings and norms are not linear layers."""


def first_adapted(lora: LoraSpec, layers: int, where: str = "policy.lora") -> int:
    """Return the first of a model's ``layers``, from 0, that ``lora`` puts adapters into; RequestError for too many."""
    if lora.layers is None:
        return 0
    if lora.layers > layers:
        raise RequestError(f"{where}.layers: found {lora.layers}; allowed: 1 to {layers}, the layers of the model")
    return layers - lora.layers


def adapted(shapes: Shapes, rank: int, targets: list[str] | str, first: int = 0) -> int:
    """Return the parameters of LoRA adapters: two matrices ``[r, in]`` and ``[out, r]`` beside each ``[out, in]``.

    Those in layers from ``first`` on.
    """
    if isinstance(targets, str):  # peft reads a text as a regular expression over the whole name
        pattern = re.compile(_ALL_LINEAR if targets == "all-linear" else targets)
    else:
        pattern = re.compile(rf"(.*\.)?({'|'.join(map(re.escape, targets))})")
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    chosen = [name for name in matrices if pattern.fullmatch(name.removesuffix(".weight"))]
    if first:
        places = {name: re.search(r"\.(\d+)\.", name) for name in chosen}
        chosen = [name for name, place in places.items() if place and int(place[1]) >= first]
    return sum(rank * sum(matrices[name]) for name in chosen)


def linear(shapes: Shapes) -> list[int]:
    """Return the parameters of each linear layer, the output layer left out: what 4-bit loading quantises."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and name.endswith(".weight")}
    return [prod(shape) for name, shape in matrices.items() if re.fullmatch(_ALL_LINEAR, name.removesuffix(".weight"))]


def examine(folder: Path, where: str, lora: LoraSpec | None, setting: str = "policy.lora") -> str:
    """Build a folder's language model on the meta device, where it takes no memory, and put LoRA (``setting``) on it.

    Returns what was seen. Raises RequestError for weights that are missing, of another model or of another shape, for a
    model that takes no cache, and for LoRA targets that name no layer.
    """
    from transformers import AutoModelForCausalLM

    from moalign.lm import loading, step_by_step

    with loading.explained(where, folder):
        model = loading.from_folder(AutoModelForCausalLM, folder, where, device_map="meta")
    step_by_step.require(model, where)
    return with_lora(model, lora, setting)


def with_lora(model: Any, lora: LoraSpec | None, setting: str = "policy.lora") -> str:
    """Put LoRA on a model and return both in words; RequestError for LoRA targets that name no layer."""
    from moalign.lm import adapters

    seen = f"{type(model).__name__}, {model.num_parameters():,} parameters"
    if lora is None:
        return seen
    trained, _ = adapters.with_adapter(model, lora, where=setting).get_nb_trainable_parameters()
    return f"{seen}, {trained:,} in LoRA adapters"

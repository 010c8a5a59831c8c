"""LoRA adapters on a frozen base: attach, save, load. The base is never copied."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moalign.config.recipe import LoraSpec
from moalign.errors import RequestError
from moalign.model_folder import check_safetensors
from moalign.policies.language_model import TINY, LanguageModel, reference_mode

if TYPE_CHECKING:
    from torch import Tensor

MERGE_BELOW = TINY
"""Models below this many parameters sample with the adapter folded into a copy of the weights."""

ADAPTER = "policy"
"""Name of the trained adapter. (A name that is part of ``lora_`` would collide inside peft.)"""


def attach(lm: LanguageModel, spec: LoraSpec, seed: int, name: str = ADAPTER) -> None:
    """Add a fresh trainable adapter to ``lm`` and make it the active one; an older one of that name goes.

    Its first weights depend on ``seed`` alone; B starts at zero, so the policy starts as the base. Raises
    RequestError when the targets name no layer of the model.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = spec.targets
    config = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    drop(lm, name)
    torch.manual_seed(seed)
    try:
        if hasattr(lm.model, "peft_config"):
            lm.model.add_adapter(name, config)
        else:
            lm.model = get_peft_model(lm.model, config, adapter_name=name)
    except ValueError as error:
        raise RequestError(f"policy.lora.targets {spec.targets!r}: {str(error).splitlines()[0]}") from None
    lm.model.set_adapter(name)


def drop(lm: LanguageModel, name: str = ADAPTER) -> None:
    """Remove an adapter from ``lm``, if it is there."""
    if name in getattr(lm.model, "peft_config", {}):
        lm.model.delete_adapter(name)


@contextlib.contextmanager
def merged(lm: LanguageModel) -> Iterator[None]:
    """Within the block the active adapter is folded into the weights of a small model: sampling is then as fast as
    the base's.

    The base's own tensors are set aside and put back untouched, so nothing drifts. Large models are left as they
    are: a second copy of their weights would not fit.
    """
    from peft.tuners.lora import LoraLayer

    layers = [m for m in lm.model.modules() if isinstance(m, LoraLayer)] if hasattr(lm.model, "peft_config") else []
    if not layers or lm.model.num_parameters() > MERGE_BELOW:
        yield
        return
    kept = []
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            kept.append((weight, weight.data))
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    weight.data = weight.data + layer.get_delta_weight(name)
        with reference_mode(lm):
            yield
    finally:
        for weight, data in kept:
            weight.data = data


def tensors(lm: LanguageModel, name: str = ADAPTER) -> dict[str, Tensor]:
    """Return the adapter's weights under peft's own names (contiguous, on the CPU)."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(lm.model, adapter_name=name)
    return {key: value.detach().cpu().clone().contiguous() for key, value in sorted(state.items())}


def set_tensors(lm: LanguageModel, weights: dict[str, Tensor], name: str = ADAPTER) -> None:
    """Put saved weights into an attached adapter; raises RequestError when they do not fit."""
    from peft import set_peft_model_state_dict

    expected = tensors(lm, name)
    wrong = sorted(set(expected) ^ set(weights)) or [
        key for key in expected if expected[key].shape != weights[key].shape
    ]
    if wrong:
        raise RequestError(
            f"adapter {name!r} does not fit the base {lm.source}: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    set_peft_model_state_dict(lm.model, weights, adapter_name=name)


def save(lm: LanguageModel, folder: Path, name: str = ADAPTER) -> None:
    """Write the adapter as peft reads it (adapter_config.json, adapter_model.safetensors); whole or not at all."""
    from safetensors.torch import save_file

    from moalign.runs import atomic

    config = lm.model.peft_config[name].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config["base_model_name_or_path"] = lm.source
    config["inference_mode"] = True
    with atomic.directory(folder) as place:
        save_file(tensors(lm, name), place / "adapter_model.safetensors", metadata={"base_fingerprint": lm.fingerprint})
        atomic.write_text(
            place / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        )


def load(lm: LanguageModel, folder: Path, name: str = ADAPTER) -> None:
    """Attach a saved adapter to the base, frozen.

    Raises RequestError when files are missing or damaged, or when the adapter was trained on other base weights.
    """
    from safetensors import safe_open

    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise RequestError(f"adapter folder {folder}: {path.name} is missing")
    check_safetensors(weights_path, f"adapter folder {folder}")
    with safe_open(weights_path, framework="pt") as file:
        told = (file.metadata() or {}).get("base_fingerprint")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping: it cannot be iterated)
    if told is not None and told != lm.fingerprint:
        raise RequestError(
            f"adapter folder {folder}: trained on a base with fingerprint {told}, but {lm.source} has {lm.fingerprint}"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        spec = LoraSpec(
            r=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"], targets=config["target_modules"]
        )
    except (ValueError, KeyError, TypeError) as error:
        told = f"{config_path.name} is damaged ({type(error).__name__})"
        raise RequestError(f"adapter folder {folder}: {told}") from error
    attach(lm, spec, seed=0, name=name)
    set_tensors(lm, weights, name)
    lm.model.requires_grad_(False)
    lm.model.eval()

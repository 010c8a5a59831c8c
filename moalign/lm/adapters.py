"""LoRA adapters on a frozen base: attach, save, load. The base is never copied."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm.architecture import first_adapted
from moalign.lm.language_model import TINY, LanguageModel, reference_mode
from moalign.lm.loading import first_line
from moalign.lm.model_folder import header
from moalign.runs import atomic

MERGE_BELOW = TINY
"""Models below this many parameters sample with the adapter folded into a copy of the weights."""

ADAPTER = "policy"
"""Name of the trained adapter. (A name that is part of ``lora_`` would collide inside peft.)"""

_PLAIN: dict[str, tuple[object, ...]] = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "init_lora_weights": (True, False, "gaussian", None),
}
"""Settings of an adapter that would change how strong it is, or what it stands on, and the values that do not."""

_FACTOR = re.compile(r"lora_(?:embedding_)?([AB])\b")
"""Tells an A, ``[rank, inputs]``, from a B, ``[outputs, rank]``."""


def attach(lm: LanguageModel, spec: LoraSpec, seed: int, name: str = ADAPTER) -> None:
    """Add a fresh trainable adapter to ``lm`` and make it the active one; an older one of that name goes.

    Its first weights depend on ``seed`` alone; B starts at zero, so the policy starts as the base. Raises
    RequestError when the targets name no layer of the model.
    """
    drop(lm, name)
    torch.manual_seed(seed)
    lm.model = with_adapter(lm.model, spec, name)
    lm.model.set_adapter(name)


def with_adapter(
    model: Any, spec: LoraSpec, name: str = ADAPTER, where: str = "policy.lora", task: str = "CAUSAL_LM"
) -> Any:
    """Return the model, wrapped by peft, with a fresh adapter; ``where`` is how a message names ``spec``.

    ``task`` is peft's name of what the model does. Raises RequestError when the targets name no layer, or the model
    has fewer layers than are to have adapters.
    """
    from peft import get_peft_model

    config = _config(model, spec, task, where)
    try:
        if not hasattr(model, "peft_config"):
            return get_peft_model(model, config, adapter_name=name)
        model.add_adapter(name, config)
    except ValueError as error:
        raise RequestError(f"{where}.targets {spec.targets!r}: {first_line(error)}") from None
    return model


def _config(model: Any, spec: LoraSpec, task: str, where: str) -> Any:
    """Return peft's settings of adapters on a model; ``where`` is how a message names ``spec``.

    Raises RequestError when the model has fewer layers than are to have adapters.
    """
    from peft import LoraConfig

    targets: Any = spec.targets
    within: dict[str, Any] = {}
    if spec.layers is not None:
        stack, count = _stack(model, where)
        chosen = range(first_adapted(spec, count, where), count)
        if targets == "all-linear":  # peft takes it for a whole model alone
            targets = _linear_names(model, [f"{stack}.{number}." for number in chosen])
        within = {"layers_to_transform": list(chosen), "layers_pattern": stack.rpartition(".")[2]}
    known = {"r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "task_type": task}
    return LoraConfig(target_modules=targets, **known, **within)


def _stack(model: Any, where: str) -> tuple[str, int]:
    """Return the name of the list that holds a model's layers, and how many they are."""
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return name, count
    raise RequestError(f"{where}.layers: the layers of a {type(model).__name__} are not known; leave it away")


def _linear_names(model: Any, inside: Sequence[str]) -> list[str]:
    """Return the last parts of the names of all linear layers whose names begin with one of ``inside``."""
    from transformers.pytorch_utils import Conv1D

    names = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(tuple(inside)) and ".lora_" not in name
    }
    return sorted(names)


def drop(lm: LanguageModel, name: str = ADAPTER) -> None:
    """Remove an adapter from ``lm``, if it is there."""
    if name in getattr(lm.model, "peft_config", {}):
        lm.model.delete_adapter(name)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter detached from any model: its settings, and its weights under peft's own names."""

    spec: LoraSpec
    weights: dict[str, Tensor]


def interpolate(experts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the adapter whose change of every layer is ``sum_i w_i s_i B_i A_i``, exactly (arXiv 2306.04488).

    The A's are concatenated along rows, the scaled B's along columns: averaging each separately would give cross terms.
    Experts of weight 0 are left out; a one-hot vector gives that expert's own tensors.

    Raises ValueError for weights that are not one for each expert or all zero, and RequestError for experts that do not
    change the same layers, or by more than a product of two matrices.
    """
    # peft's add_weighted_adapter("cat") takes as long and gives the same numbers, but needs all experts on the model
    # beside the result; here they wait on the CPU, and the model holds one adapter.
    terms = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight != 0]
    if not terms:
        raise ValueError(f"at least one weight must not be 0; found {list(weights)}")
    first = terms[0][0]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return first
    joined = {}
    for key in sorted({key for expert, _ in terms for key in expert.weights}):
        factor = _FACTOR.search(key)
        if factor is None or not all(key in expert.weights for expert, _ in terms):
            raise RequestError(
                f"these adapters cannot be interpolated: {key} is missing in one of them, or is no LoRA matrix"
            )
        if factor[1] == "A":
            joined[key] = torch.cat([expert.weights[key] for expert, _ in terms], dim=0)
        else:
            scaled = [weight * (expert.spec.alpha / expert.spec.r) * expert.weights[key] for expert, weight in terms]
            joined[key] = torch.cat(scaled, dim=1)
    rank = sum(expert.spec.r for expert, _ in terms)
    return Adapter(first.spec.model_copy(update={"r": rank, "alpha": float(rank)}), joined)


def interpolate_groups(experts: Sequence[Adapter], weights: Sequence[Sequence[float]]) -> Adapter:
    """Return :func:`interpolate`'s adapter with weights of their own for each group of layers, ``[groups][experts]``.

    The layers that have adapters are parted, in their order, into as many groups of neighbours, of sizes as equal as
    can be; what stands outside the layers (an output head) belongs to the last. One group is :func:`interpolate`, but
    that weights may be all 0, which is the base: the first expert's adapter with B = 0.

    Raises ValueError for more groups than layers, and what :func:`interpolate` raises.
    """
    used = [any(group[index] for group in weights) for index in range(len(experts))]
    if any(used) and all(list(group) == list(weights[0]) for group in weights):
        return interpolate(experts, weights[0])
    layers = sorted({number for expert in experts for key in expert.weights if (number := _layer(key)) is not None})
    if len(weights) > len(layers):
        raise ValueError(f"{len(weights)} groups need as many layers with adapters; found {len(layers)}")
    group_of: dict[int | None, Sequence[float]] = {
        layer: weights[place * len(weights) // len(layers)] for place, layer in enumerate(layers)
    }

    def scaled(index: int, key: str, tensor: Tensor) -> Tensor:
        factor = _FACTOR.search(key)
        return group_of.get(_layer(key), weights[-1])[index] * tensor if factor and factor[1] == "B" else tensor

    weighted = [
        Adapter(expert.spec, {key: scaled(index, key, tensor) for key, tensor in expert.weights.items()})
        for index, expert in enumerate(experts)
    ]
    return interpolate(weighted, [float(one) for one in used] if any(used) else [1.0] + [0.0] * (len(experts) - 1))


def _layer(key: str) -> int | None:
    """Return the number of the layer that a weight belongs to: the first number in its name; None: it is in none."""
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)


def adapted_layers(lm: LanguageModel, spec: LoraSpec) -> int:
    """Return how many layers of the model get adapters."""
    _, count = _stack(lm.model, "policy.lora")
    return count - first_adapted(spec, count)


def place(lm: LanguageModel, adapter: Adapter, name: str) -> None:
    """Put an adapter on the base, frozen; raises RequestError when it does not fit."""
    attach(lm, adapter.spec, seed=0, name=name)
    set_tensors(lm, adapter.weights, name)
    lm.model.requires_grad_(False)
    lm.model.eval()


@contextlib.contextmanager
def merged(lm: LanguageModel) -> Iterator[None]:
    """Within the block the active adapter of a small model is folded into a copy of its weights: as fast as the base.

    The base's own tensors are put back untouched, so nothing drifts. Large models are left as they are, and so are
    those of which an adapted weight is that of another layer, too.
    """
    layers = lora_layers(lm)
    active = layers[0].active_adapters if layers else []
    if not active or lm.in_4bit or lm.model.num_parameters() > MERGE_BELOW or shares_weights(lm):
        yield
        return
    weights = [layer.get_base_layer().weight for layer in layers]
    base = [weight.data for weight in weights]
    folded = [with_change(layer, active[0]) for layer in layers]
    with reference_mode(lm):
        try:
            _put(weights, folded)
            yield
        finally:
            _put(weights, base)


def _put(weights: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    for weight, data in zip(weights, tensors, strict=True):
        weight.data = data


def lora_layers(lm: LanguageModel) -> list[Any]:
    """Return the layers that adapters change."""
    from peft.tuners.lora import LoraLayer

    modules = lm.model.modules() if hasattr(lm.model, "peft_config") else []
    return [module for module in modules if isinstance(module, LoraLayer)]


def shares_weights(lm: LanguageModel) -> bool:
    """Return whether a layer with adapters has its weight in common with another one: embeddings tied to the head.

    With the adapter folded in, the other layer would change, too, which it does not where the adapter stands beside.
    """
    places = Counter(id(weight) for _, weight in lm.model.named_parameters(remove_duplicate=False))
    return any(places[id(layer.get_base_layer().weight)] > 1 for layer in lora_layers(lm))


def changes(layer: Any, name: str) -> bool:
    """Return whether an adapter changes a layer."""
    return name in layer.lora_A or name in layer.lora_embedding_A


def with_change(layer: Any, name: str) -> Tensor:
    """Return a layer's weight with an adapter folded in; its own where the adapter does not change it."""
    weight: Tensor = layer.get_base_layer().weight.data
    # Adapters are kept in single precision on a base of half precision: the sum is rounded once.
    return (weight.float() + layer.get_delta_weight(name).float()).to(weight.dtype) if changes(layer, name) else weight


def tensors(lm: LanguageModel, name: str = ADAPTER) -> dict[str, Tensor]:
    """Return the adapter's weights under peft's own names (contiguous, on the CPU)."""
    from peft import get_peft_model_state_dict

    # Not the embeddings themselves, which peft would add where an adapter changes them: the base is frozen.
    state = get_peft_model_state_dict(lm.model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().clone().contiguous() for key, value in sorted(state.items())}


def set_tensors(lm: LanguageModel, weights: dict[str, Tensor], name: str = ADAPTER) -> None:
    """Put saved weights into an attached adapter; raises RequestError when they do not fit."""
    from peft import set_peft_model_state_dict

    expected = {key: value.shape for key, value in tensors(lm, name).items()}
    given = {key: value.shape for key, value in weights.items()}
    wrong = sorted({key for key, _ in expected.items() ^ given.items()})
    if wrong:
        raise RequestError(
            f"adapter {name!r} does not fit the base {lm.source}: {len(wrong)} tensors differ, first {wrong[0]}"
        )
    set_peft_model_state_dict(lm.model, weights, adapter_name=name)


def save(lm: LanguageModel, folder: Path, name: str = ADAPTER) -> None:
    """Write the adapter as peft reads it (adapter_config.json, adapter_model.safetensors), atomically."""
    from safetensors.torch import save_file

    config = lm.model.peft_config[name].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    config |= {"base_model_name_or_path": lm.source, "inference_mode": True}
    with atomic.directory(folder) as place:
        save_file(tensors(lm, name), place / "adapter_model.safetensors", metadata={"base_fingerprint": lm.fingerprint})
        atomic.write_text(
            place / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
        )


def load(lm: LanguageModel, folder: Path, name: str = ADAPTER) -> None:
    """Attach a saved adapter to the base, frozen; raises what :func:`read` raises."""
    place(lm, read(lm, folder), name)


def read(lm: LanguageModel, folder: Path) -> Adapter:
    """Read a saved adapter that belongs to the base ``lm``.

    Raises RequestError when files are missing or damaged, or when the adapter was trained on other base weights.
    """
    from safetensors import safe_open

    where = f"adapter folder {folder}"
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise RequestError(f"{where}: {path.name} is missing")
    header(weights_path, where)
    with safe_open(weights_path, framework="pt") as file:
        base = (file.metadata() or {}).get("base_fingerprint")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping: it cannot be iterated)
    if base not in (None, lm.fingerprint):
        raise RequestError(f"{where}: trained on a base with fingerprint {base}, but {lm.source} has {lm.fingerprint}")
    try:
        config = atomic.parsed_json(config_path.read_bytes())
        for key, plain in _PLAIN.items():
            if (found := config.get(key, plain[0])) not in plain:
                raise RequestError(f"{where}: {config_path.name}: found {key}: {found!r}; allowed: {plain[0]!r}")
        spec = LoraSpec(
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            targets=config["target_modules"],
            layers=len(config.get("layers_to_transform") or ()) or None,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"{where}: {config_path.name} is damaged ({type(error).__name__})") from error
    return Adapter(spec, weights)

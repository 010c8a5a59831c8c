"""LoRA adapters on a frozen base: attach, save, load. The base is never copied."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm.language_model import TINY, LanguageModel, reference_mode
from moalign.lm.model_folder import check_safetensors

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


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter detached from any model: its settings, and its weights under peft's own names."""

    spec: LoraSpec
    weights: dict[str, Tensor]

    @property
    def scale(self) -> float:
        """What multiplies B A."""
        return self.spec.alpha / self.spec.r


def interpolate(experts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the adapter whose change of every layer is ``sum_i w_i s_i B_i A_i``, exactly.

    Ranks are concatenated: the A's along rows, the scaled B's along columns. (Averaging A and B separately gives
    another matrix: ``(sum w_i B_i)(sum w_i A_i)`` has cross terms. arXiv 2306.04488 interpolates weights, so changes of
    weights are what has to be summed.) Experts of weight 0 are left out; a one-hot vector gives that expert's own
    tensors.

    Raises ValueError for a number of weights that is not that of the experts or for weights that are all zero, and
    RequestError for experts that change different layers, or by more than a product of two matrices.
    """
    terms = [(expert, weight) for expert, weight in zip(experts, weights, strict=True) if weight != 0]
    if not terms:
        raise ValueError(f"at least one weight must not be 0; found {list(weights)}")
    first = terms[0][0]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return first
    for expert, _ in terms:
        wrong = sorted(set(expert.weights) ^ set(first.weights)) or [
            key for key in expert.weights if not _is_down(key) and not _is_up(key)
        ]
        if wrong:
            raise RequestError(
                f"these adapters cannot be interpolated: {wrong[0]} is missing in one of them, or is no LoRA matrix"
            )
    joined = {}
    for key in first.weights:
        if _is_down(key):
            joined[key] = torch.cat([expert.weights[key] for expert, _ in terms], dim=0)
        else:
            joined[key] = torch.cat([weight * expert.scale * expert.weights[key] for expert, weight in terms], dim=1)
    rank = sum(expert.spec.r for expert, _ in terms)
    return Adapter(first.spec.model_copy(update={"r": rank, "alpha": float(rank)}), joined)


def _is_down(key: str) -> bool:
    """Whether the tensor is an A: ``[rank, inputs]``."""
    return "lora_A" in key or "lora_embedding_A" in key


def _is_up(key: str) -> bool:
    """Whether the tensor is a B: ``[outputs, rank]``."""
    return "lora_B" in key or "lora_embedding_B" in key


def place(lm: LanguageModel, adapter: Adapter, name: str) -> None:
    """Put an adapter on the base, frozen; raises RequestError when it does not fit."""
    attach(lm, adapter.spec, seed=0, name=name)
    set_tensors(lm, adapter.weights, name)
    lm.model.requires_grad_(False)
    lm.model.eval()


class Turns(Protocol):
    """A context manager within which several adapters of one model take turns."""

    def __enter__(self) -> Turns:
        """Begin with the first adapter."""
        ...

    def __exit__(self, *failure: object) -> None:
        """Leave the base as it was."""
        ...

    def use(self, index: int) -> None:
        """Answer with adapter ``index`` from now on."""
        ...


def turns(lm: LanguageModel, names: Sequence[str]) -> Turns:
    """Return a context for the adapters ``names`` to take turns; a small model copies its weights for each."""
    return Folded(lm, names) if lm.model.num_parameters() <= MERGE_BELOW else Switched(lm, names)


class Switched:
    """Adapters that are switched layer by layer; nothing is copied. See :class:`Turns`."""

    def __init__(self, lm: LanguageModel, names: Sequence[str]) -> None:
        """Prepare for the adapters ``names`` of ``lm``."""
        self._names = list(names)
        self._layers = _lora_layers(lm)

    def __enter__(self) -> Switched:
        """See :class:`Turns`."""
        self.use(0)
        return self

    def __exit__(self, *failure: object) -> None:
        """Nothing to restore: every generator activates its own adapter."""

    def use(self, index: int) -> None:
        """See :class:`Turns`."""
        active = [self._names[index]]
        for layer in self._layers:
            # Not set_adapter(): it also visits every parameter, which at 224 layers took 17 ms instead of 1, a token.
            layer._active_adapter = active


class Folded:
    """Adapters folded into the weights of a small model: sampling is then as fast as the base's. See :class:`Turns`.

    The base's own tensors are set aside and put back untouched, so nothing drifts.
    """

    def __init__(self, lm: LanguageModel, names: Sequence[str]) -> None:
        """Compute the weights that the model has with each of the adapters ``names``; the base stays as it is."""
        layers = _lora_layers(lm)
        self._lm = lm
        self._weights = [layer.get_base_layer().weight for layer in layers]
        self._base = [weight.data for weight in self._weights]
        self._folded = [[_with_adapter(layer, name) for layer in layers] for name in names]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Folded:
        """See :class:`Turns`."""
        self._stack.enter_context(reference_mode(self._lm))
        self._stack.callback(self._put, self._base)
        self.use(0)
        return self

    def __exit__(self, *failure: object) -> None:
        """Put the base's tensors back."""
        self._stack.close()

    def use(self, index: int) -> None:
        """See :class:`Turns`."""
        self._put(self._folded[index])

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for weight, data in zip(self._weights, tensors, strict=True):
            weight.data = data


def _lora_layers(lm: LanguageModel) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    modules = lm.model.modules() if hasattr(lm.model, "peft_config") else []
    return [module for module in modules if isinstance(module, LoraLayer)]


def _with_adapter(layer: Any, name: str) -> Tensor:
    """Return a layer's weight with an adapter folded in; its own where the adapter does not change it."""
    weight: Tensor = layer.get_base_layer().weight.data
    changes = name in layer.lora_A or name in layer.lora_embedding_A
    # Adapters are kept in single precision on a base of half precision: the sum is rounded once.
    return (weight.float() + layer.get_delta_weight(name).float()).to(weight.dtype) if changes else weight


@contextlib.contextmanager
def merged(lm: LanguageModel) -> Iterator[None]:
    """Within the block the active adapter is folded into the weights of a small model; see :class:`Folded`.

    Large models are left as they are: a second copy of their weights would not fit.
    """
    layers = _lora_layers(lm)
    active = layers[0].active_adapters if layers else []
    if not active or lm.model.num_parameters() > MERGE_BELOW:
        yield
        return
    with Folded(lm, active[:1]):
        yield


def tensors(lm: LanguageModel, name: str = ADAPTER) -> dict[str, Tensor]:
    """Return the adapter's weights under peft's own names (contiguous, on the CPU)."""
    from peft import get_peft_model_state_dict

    # Not the embeddings themselves, which peft would add where an adapter changes them: the base is frozen.
    state = get_peft_model_state_dict(lm.model, adapter_name=name, save_embedding_layers=False)
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
    """Write the adapter as peft reads it (adapter_config.json, adapter_model.safetensors), atomically."""
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
    """Attach a saved adapter to the base, frozen; raises what :func:`read` raises."""
    place(lm, read(lm, folder), name)


def read(lm: LanguageModel, folder: Path) -> Adapter:
    """Read a saved adapter that belongs to the base ``lm``.

    Raises RequestError when files are missing or damaged, or when the adapter was trained on other base weights.
    """
    from safetensors import safe_open

    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise RequestError(f"adapter folder {folder}: {path.name} is missing")
    check_safetensors(weights_path, f"adapter folder {folder}")
    with safe_open(weights_path, framework="pt") as file:
        base = (file.metadata() or {}).get("base_fingerprint")
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping: it cannot be iterated)
    if base is not None and base != lm.fingerprint:
        raise RequestError(
            f"adapter folder {folder}: trained on a base with fingerprint {base}, but {lm.source} has {lm.fingerprint}"
        )
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        spec = LoraSpec(
            r=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"], targets=config["target_modules"]
        )
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{config_path.name} is damaged ({type(error).__name__})"
        raise RequestError(f"adapter folder {folder}: {problem}") from error
    return Adapter(spec, weights)

"""The preference control model of PCM (arXiv 2407.04181): prompt, preference and the tokens so far -> expert weights.

A causal model with an n-way head, in one of three forms (:class:`~.control_spec.ControlSpec`). The head starts at 0, so
that training starts at the preference's own weights (or at equal ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moalign.core.errors import RequestError
from moalign.lm import adapters, language_model, loading, model_folder, step_by_step
from moalign.lm.chat import Codec
from moalign.lm.language_model import LanguageModel
from moalign.lm.sampler import last_states, state_width
from moalign.policies.control_spec import ControlSpec

ADAPTER = "control"
"""Name of the adapter of ``form: adapter``."""

FOLDER = "control"
"""Name of the folder of what :meth:`Control.save` writes beside the weights that are its own."""

_IN_ADAPTER = "adapter:"


class Control(torch.nn.Module):
    """A causal model with an n-way head."""

    def __init__(self, spec: ControlSpec, lm: LanguageModel, experts: int, seed: int, name: str = ADAPTER) -> None:
        """Make the control model of ``experts`` experts on ``lm``; first weights depend on ``seed`` alone.

        ``name`` is that of its adapter, where it is one.

        Raises RequestError for a folder whose tokenizer is not the experts'.
        """
        super().__init__()
        self.spec, self.experts, self.name = spec, experts, name
        self._lm = [lm]  # in a list: the experts' base is no part of this module
        torch.manual_seed(seed)
        if spec.form == "adapter":
            adapters.attach(lm, spec.lora, seed, name)
            self.width = state_width(lm.model)
        elif spec.form == "folder":
            whole = read(str(spec.model), lm.codec)
            self.body, self.width = whole.base_model, state_width(whole)
        else:
            self.width = spec.width
            self.project = torch.nn.Linear(lm.model.get_input_embeddings().weight.shape[1], spec.width, bias=False)
            self.body = _small(spec)
        self.head = torch.nn.Linear(self.width, experts)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.to(lm.device)

    @property
    def lm(self) -> LanguageModel:
        """The experts' base."""
        return self._lm[0]

    def activate(self) -> None:
        """Make its adapter the active one, where it is an adapter: whatever ran on the base before."""
        if self.spec.form == "adapter":
            self.lm.model.set_adapter(self.name)

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return what is trained, in a fixed order."""
        adapter = self.lm.model.named_parameters() if self.spec.form == "adapter" else ()
        return [*self.parameters(), *(value for key, value in adapter if f".{self.name}." in key)]

    def weights(self) -> dict[str, Tensor]:
        """Return all weights that are its own, by name."""
        adapter = adapters.tensors(self.lm, self.name) if self.spec.form == "adapter" else {}
        return {**self.state_dict(), **{f"{_IN_ADAPTER}{key}": value for key, value in adapter.items()}}

    def load_weights(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Take over weights of :meth:`weights`; RequestError naming the first that is missing or of another shape."""
        own = self.weights()
        wrong = sorted(set(own) ^ set(weights)) or [key for key in own if own[key].shape != weights[key].shape]
        if wrong:
            key = wrong[0]
            found, needed = (list(side[key].shape) if key in side else "nothing" for side in (weights, own))
            raise RequestError(
                f"{where}: not the control model of {self.experts} experts that its run describes: {key} is {found}, "
                f"needed: {needed}"
            )
        self.load_state_dict({key: value for key, value in weights.items() if not key.startswith(_IN_ADAPTER)})
        if self.spec.form == "adapter":
            inside = {k.removeprefix(_IN_ADAPTER): v for k, v in weights.items() if k.startswith(_IN_ADAPTER)}
            adapters.set_tensors(self.lm, inside, self.name)

    def save(self, folder: Path, preference: Sequence[float]) -> dict[str, Any]:
        """Write it for use without moalign; returns what else its reader must know, at one preference."""
        from safetensors.torch import save_file

        weights = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        if self.spec.form == "adapter":
            adapters.save(self.lm, folder / FOLDER, self.name)
        if self.spec.form == "folder":
            self.body.save_pretrained(folder / FOLDER)
            weights = {key: value for key, value in weights.items() if key.startswith("head.")}
        save_file(weights, folder / "control.safetensors")
        start = [1.0 if w > 0 else 0.0 for w in preference] if self.spec.start == "uniform" else list(preference)
        config = _config_of(self.spec).to_diff_dict() if self.spec.form == "small" else None
        return {"form": self.spec.form, "config": config, "start": start}

    def hidden(self, ids: Tensor, mask: Tensor, place: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """Return the last hidden state at every token, ``[rows, new, width]``; arguments as ``NextToken.read`` has."""
        known: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": place,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self.spec.form == "adapter":
            with last_states(self.lm.model) as last:
                self.lm.model(input_ids=ids, **known)
            return last[0]
        if self.spec.form == "small":
            table = self.lm.model.get_input_embeddings()
            with torch.no_grad():  # of the base: experts may have adapters here
                embedded = getattr(table, "base_layer", table)(ids).float()
            known["inputs_embeds"] = self.project(embedded)
        else:
            known["input_ids"] = ids
        states: Tensor = self.body(**known).last_hidden_state
        return states

    def log_weights(self, hidden: Tensor, preferences: Tensor) -> Tensor:
        """Return ``ln a`` ``[rows, T, n]`` of hidden states ``[rows, T, width]`` and preferences ``[rows, n]``.

        Experts of weight 0 are masked: the preference does not name them.
        """
        start = preferences.log()
        if self.spec.start == "uniform":
            start = torch.where(preferences > 0, torch.zeros_like(start), start)
        return torch.log_softmax(self.head(hidden.float()) + start.unsqueeze(1), dim=-1)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache."""
        return DynamicCache(config=self.lm.model.config if self.spec.form == "adapter" else self.body.config)


def _config_of(spec: ControlSpec) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=1,  # it reads embeddings
        hidden_size=spec.width,
        intermediate_size=4 * spec.width,
        num_hidden_layers=spec.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )


def _small(spec: ControlSpec) -> Any:
    from transformers import LlamaModel

    body = LlamaModel(_config_of(spec))
    body.embed_tokens = None
    return body


def _require_tokenizer(source: str, experts: Codec) -> None:
    own, theirs = language_model.load_codec(source).tokenizer.get_vocab(), experts.tokenizer.get_vocab()
    if own != theirs:
        raise RequestError(
            f"control.model {source}: its tokenizer is not the experts' ({len(own)} tokens, {experts.source} has "
            f"{len(theirs)}); the control model reads the experts' tokens"
        )


def read(source: str, experts: Codec) -> Any:
    """Return the model ``source`` in float32; RequestError for one that cannot weigh the tokens of ``experts``."""
    from transformers import AutoModelForCausalLM

    where = f"control.model {source}"
    _require_tokenizer(source, experts)
    path = model_folder.resolve(source, None, where)
    with loading.explained(where, path):
        model = loading.from_folder(AutoModelForCausalLM, path, where, dtype=torch.float32)
    step_by_step.require(model, where)
    return model


class ControlWeights:
    """The weights of a batch as its control model gives them. See :class:`~moalign.lm.mixture.Weights`."""

    def __init__(self, control: Control, preferences: Tensor, hidden: bool = False) -> None:
        """Begin a batch whose rows have the ``preferences`` ``[rows, n]``; ``hidden`` keeps each state in ``state``."""
        self.control, self.preferences, self.hidden = control, preferences, hidden
        self.cache = control.new_cache()
        self.state: Tensor | None = None

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Return the weights of the token after the last, ``[rows, n]``."""
        last = self.control.hidden(ids, mask, place, self.cache)[:, -1:]
        self.state = last[:, 0] if self.hidden else None
        return self.control.log_weights(last, self.preferences)[:, 0].exp()

    def repeat(self, times: int) -> None:
        """See :class:`~moalign.lm.sampler.NextToken`."""
        rows = torch.arange(len(self.preferences), device=self.preferences.device)
        self.keep(rows.repeat_interleave(times))

    def keep(self, rows: Tensor) -> None:
        """See :class:`~moalign.lm.sampler.NextToken`."""
        self.cache.reorder_cache(rows)
        self.preferences = self.preferences[rows]
        self.state = None if self.state is None else self.state[rows]

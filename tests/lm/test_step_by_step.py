"""Models whose layers keep a state: their samples are those of whole rows, or they are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import architecture, language_model, step_by_step
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import positions
from moalign.lm.sampler import NextToken, sample, uniforms
from moalign.policies.control import Control, ControlWeights
from moalign.policies.control_spec import ControlSpec
from moalign.tasks.sandbox import base

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 14], [5, 6, 7, 8, 20, 21], [5]]
STATES: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen3_5_text": LINEAR,
    "falcon_h1": {"mamba_d_ssm": 32, **STATES},  # both kinds of memory in one layer
    "bamba": {"attn_layer_indices": [1], **STATES, "mamba_n_heads": 8},
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 4},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3},
}
HYBRIDS = ["qwen3_5_text", "falcon_h1", "bamba"]
WITHOUT = ["mamba", "mamba2", "falcon_mamba"]


def made(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(base.make_tokenizer()), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "initializer_range": 0.3,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **KINDS[kind]}))


def wrapped(kind: str) -> LanguageModel:
    return wrap(made(kind), base.make_tokenizer(), kind, kind, "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    def save(kind: str) -> Path:
        made(kind).save_pretrained(tmp_path / kind)
        base.make_tokenizer().save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


# -- hybrids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HYBRIDS)
def test_several_responses_to_a_prompt_are_drawn_from_what_whole_rows_give(kind: str) -> None:
    lm = wrapped(kind)
    drawn = sample(lm, PROMPTS, uniforms(1, range(12), 10), repeat=3)
    assert len({tuple(row) for row in drawn.input_ids.tolist()}) == 12
    for row in range(12):
        ids, length = drawn.input_ids[row][drawn.attention_mask[row].bool()], int(drawn.response_mask[row].sum())
        assert ids[:-length].tolist() == PROMPTS[row // 3]
        with torch.no_grad():
            shares = torch.log_softmax(lm.model(input_ids=ids[None]).logits[0, :-1].float(), -1)
        alone = shares.gather(-1, ids[1:, None])[-length:, 0]
        torch.testing.assert_close(drawn.logps[row, :length], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_control_model_weighs_several_responses_to_a_prompt(kind: str) -> None:
    control = Control(ControlSpec(form="adapter", lora=LoraSpec(r=2, targets=["q_proj"])), wrapped(kind), 2, seed=0)
    torch.nn.init.normal_(control.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    prompts, following = torch.tensor([[5, 6, 7, 8], [9, 9, 10, 11]]), torch.tensor([[20], [21], [22], [23]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    preferences = torch.tensor([[0.3, 0.7], [0.8, 0.2]])
    weights = ControlWeights(control, preferences, hidden=True)
    weights.read(prompts, mask, positions(mask))
    weights.repeat(2)
    longer = torch.cat([mask.repeat_interleave(2, 0), torch.ones(4, 1, dtype=torch.long)], dim=1)
    found = weights.read(following, longer, positions(longer)[:, -1:])
    whole = torch.cat([prompts.repeat_interleave(2, 0), following], dim=1)
    with torch.no_grad():
        states = control.hidden(whole, longer, positions(longer))[:, -1:]
        expected = control.log_weights(states, preferences.repeat_interleave(2, 0))[:, 0].exp()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found[::2] - found[1::2]).abs().min() > 1e-3


# -- what cannot be sampled -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_model_that_takes_no_memory_is_refused_when_it_is_loaded_and_by_check(
    folder: Callable[[str], Path], kind: str
) -> None:
    place = folder(kind)
    message = f"a {kind} model cannot be sampled.*takes no past_key_values.*knowing the one before it alone"
    with pytest.raises(RequestError, match=f"model {re.escape(str(place))}: {message}"):
        language_model.load(str(place), device="cpu")
    with pytest.raises(RequestError, match=f"task.model: {message}"):
        architecture.examine(place, "task.model", None)


def test_a_model_that_mixes_rows_up_or_forgets_is_refused(folder: Callable[[str], Path]) -> None:
    """RecurrentGemma keeps its states in its layers, where the sampler cannot give them to other rows."""
    place = folder("recurrent_gemma")
    with pytest.raises(RequestError, match=r"a recurrent_gemma model cannot be sampled.*differ by [\d.]+.*of"):
        language_model.load(str(place), device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_hybrids_are_tried_and_taken(folder: Callable[[str], Path], kind: str, dtype: str) -> None:
    place = folder(kind)
    assert language_model.load(str(place), dtype=dtype, device="cpu").model.config.model_type == kind
    architecture.examine(place, "task.model", None)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_attention_alone_is_not_tried(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.delattr(step_by_step, "NextToken")
    language_model.load(str(folder(kind)), device="cpu")
    architecture.examine(folder(kind), "task.model", None)


def test_what_a_cache_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise NotImplementedError("no rows here\nof all")

    monkeypatch.setattr(NextToken, "keep", refuse)
    with pytest.raises(RequestError, match=r"a bamba model cannot be sampled .*NotImplementedError: no rows here\)"):
        step_by_step.require(wrapped("bamba").model, "task.model")

"""A prompt that is read once for several responses: log-probabilities and gradients are those of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, log_probs, shared_prompts
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import token_outputs, without_padding
from moalign.tasks.sandbox import base

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "sliding": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),  # shorter than a prompt
    "softcapped, every other layer sliding": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0, sliding_window=4)
    ),
    "positions learned": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
}
GROUPS = {"pairs": [2, 2, 2], "fours": [4, 4], "unequal": [1, 4, 2, 1], "alone": [1, 1, 1]}
PROMPT, WIDTH = 8, 6
Batch = tuple[Tensor, Tensor, Tensor]


def made(kind: str) -> LanguageModel:
    """Return the model with an adapter that is not at zero."""
    torch.manual_seed(1)
    lm = wrap(MODELS[kind](), base.make_tokenizer(), kind, kind.ljust(16, "0"), device="cpu")
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    with torch.no_grad():
        for name, value in lm.model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.1)
    lm.model.eval()
    return lm


def batch(groups: list[int]) -> Batch:
    """(ids, attention, response mask): prompts of 8, 7, ... tokens, responses of 1 to 6, rows of a prompt scattered."""
    generator = torch.Generator().manual_seed(len(groups))
    rows = sum(groups)
    ids = torch.randint(3, 300, (rows, PROMPT + WIDTH), generator=generator)
    mask = torch.ones_like(ids)
    which = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    prompts = torch.randint(3, 300, (len(groups), PROMPT), generator=generator)
    for row in range(rows):
        ids[row, :PROMPT] = prompts[which[row]]
        mask[row, : which[row]] = 0
        mask[row, PROMPT + 1 + row % WIDTH :] = 0
    ids = torch.where(mask.bool(), ids, 0)
    scattered = torch.randperm(rows, generator=generator)
    return ids[scattered], mask[scattered], mask[scattered, PROMPT:].bool()


def gradients(lm: LanguageModel, logps: Tensor) -> dict[str, Tensor]:
    """Return gradients of a weighted sum of the log-probabilities, and forget them."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    (logps * weights).sum().backward()
    result = {name: value.grad for name, value in lm.model.named_parameters() if value.grad is not None}
    lm.model.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("at_once", [2**23, 1000], ids=["plain", "in chunks"])
def test_nothing_changes_but_the_rounding(
    kind: str, groups: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "AT_ONCE", at_once)
    lm, rows = made(kind), batch(GROUPS[groups])
    whole, shared = (token_outputs(lm.model, *rows, 0.7, hidden=True, share_prompts=each) for each in (False, True))
    inside = rows[2]
    torch.testing.assert_close(shared.logps, whole.logps, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(shared.entropy, whole.entropy, rtol=1e-5, atol=2e-5)
    assert shared.hidden is not None and whole.hidden is not None
    torch.testing.assert_close(shared.hidden[inside], whole.hidden[inside], rtol=1e-4, atol=1e-4)
    assert (shared.logps[~inside] == 0).all() and float(shared.logps.detach().abs().max()) > 1
    found, wanted = gradients(lm, shared.logps), gradients(lm, whole.logps)
    assert found.keys() == wanted.keys() and len(found) >= 8
    largest = max(float(value.abs().max()) for value in wanted.values())
    assert largest > 0.1
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) <= 1e-4 * largest, name


def test_a_prompt_is_read_once_and_no_token_after_the_last() -> None:
    lm, seen = made("llama"), []
    ids, mask, response = batch([4, 4])
    lm.model.get_input_embeddings().register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    token_outputs(lm.model, ids, mask, response, share_prompts=True)
    assert seen == [(2, PROMPT), (8, WIDTH - 1)]
    seen.clear()
    token_outputs(lm.model, *batch([1, 1, 1]), share_prompts=True)  # nothing to share: whole rows, as ever
    assert seen == [(3, PROMPT + WIDTH)]


def test_responses_of_one_token_need_the_prompt_alone() -> None:
    lm, (ids, mask, _) = made("llama"), batch([2, 2])
    rows = ids[:, : PROMPT + 1], mask[:, : PROMPT + 1], torch.ones(4, 1, dtype=torch.bool)
    whole, shared = (token_outputs(lm.model, *rows, share_prompts=each).logps for each in (False, True))
    torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-5)


def test_half_precision_differs_by_its_rounding() -> None:
    lm, rows = made("llama"), batch([2, 3])
    exact = token_outputs(lm.model, *rows).logps
    lm.model.to(torch.bfloat16)
    whole, shared = (token_outputs(lm.model, *rows, share_prompts=each).logps for each in (False, True))
    assert float((shared - exact).detach().abs().mean()) <= 1.2 * float((whole - exact).detach().abs().mean())


def test_columns_that_no_row_uses_go_and_come_back_as_zeros() -> None:
    ids, mask, response = batch([2, 2])
    mask[:, :3], mask[:, -2:], response[:, -2:] = 0, 0, False
    used = without_padding(ids, mask, response)
    assert [each.shape[1] for each in used] == [PROMPT + WIDTH - 5, PROMPT + WIDTH - 5, WIDTH - 2]
    assert torch.equal(used[0], ids[:, 3:-2])
    lm = made("llama")
    whole, part = token_outputs(lm.model, ids, mask, response), token_outputs(lm.model, *used).padded(WIDTH)
    torch.testing.assert_close(part.logps, whole.logps, rtol=1e-5, atol=1e-5)
    assert part.entropy.shape == whole.entropy.shape
    none = without_padding(ids, torch.zeros_like(mask).index_fill(1, torch.tensor([5]), 1), torch.zeros_like(response))
    assert [each.shape[1] for each in none] == [PROMPT - 4, PROMPT - 4, 1]  # a column of each is left


# -- models that cannot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_can_are_let_through_as_they_are(kind: str) -> None:
    lm = made(kind)
    state = torch.get_rng_state()
    lm.model.train()
    shared_prompts.require(lm)
    assert lm.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(value.grad is None for value in lm.model.parameters())
    lm.model = lm.model.unload()
    shared_prompts.require(lm)  # with nothing to train


def test_a_recurrent_model_is_refused_in_one_message() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    lm = wrap(MambaForCausalLM(config), base.make_tokenizer(), "recurrent", "0" * 16, device="cpu")
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0, targets=["in_proj"]), seed=0)
    with pytest.raises(RequestError, match=r"share_prompts: recurrent \(MambaForCausalLM\): a prompt that was"):
        shared_prompts.require(lm)


def test_a_cache_that_loses_the_gradient_or_the_prompt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, real = made("llama"), log_probs.DynamicCache.reorder_cache

    def detached(cache: Any, rows: Tensor) -> None:
        real(cache, rows)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    monkeypatch.setattr(log_probs.DynamicCache, "reorder_cache", detached)
    with pytest.raises(RequestError, match="gradients differ by"):
        shared_prompts.require(lm)
    monkeypatch.setattr(log_probs.DynamicCache, "reorder_cache", lambda cache, rows: real(cache, rows.flip(0)))
    with pytest.raises(RequestError, match="log-probabilities differ by"):
        shared_prompts.require(lm)


def test_gradient_checkpointing_is_refused() -> None:
    lm = made("llama")
    refused = pytest.raises(RequestError, match="gradient checkpointing keeps no cache")
    with refused:
        shared_prompts.require(lm, checkpointing=True)
    lm.model.gradient_checkpointing_enable()
    with refused:
        shared_prompts.require(lm)
    lm.model.train()  # layers check-point in this mode alone
    with pytest.raises(RequestError, match="the model kept no cache of the prompts that it read"):
        token_outputs(lm.model, *batch([2, 2]), share_prompts=True)

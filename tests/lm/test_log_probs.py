"""Log-probabilities in chunks are those of the plain formula: values, entropies, gradients; for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from moalign.config.recipe import LoraSpec
from moalign.lm import adapters, log_probs
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import positions, token_outputs
from moalign.tasks.sandbox import base

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "softcapped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}
LINEAR = ("untied", "tied")
PROMPT, WIDTH = 4, 7


def made(kind: str) -> LanguageModel:
    torch.manual_seed(1)
    return wrap(MODELS[kind](), base.make_tokenizer(), kind, kind.ljust(16, "0"), device="cpu")


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, response mask): padding on both sides, one row without a response, a gap in another."""
    ids = torch.randint(3, 300, (5, PROMPT + WIDTH), generator=torch.Generator().manual_seed(0))
    attention, mask = torch.ones_like(ids), torch.ones(5, WIDTH, dtype=torch.bool)
    attention[0, :3] = 0
    for row, length in ((1, 3), (2, 1)):
        mask[row, length:] = False
        attention[row, PROMPT + length :] = 0
    mask[3], mask[4, 2] = False, False
    return ids, attention, mask


def plainly(lm: LanguageModel, temperature: float) -> tuple[Tensor, Tensor]:
    """Return (log pi, entropy) ``[batch, T]`` by the definition, from all logits of the model as it stands."""
    ids, attention, mask = batch()
    logits = lm.model(input_ids=ids, attention_mask=attention, position_ids=positions(attention)).logits
    table = torch.log_softmax(logits[:, PROMPT - 1 : -1].float() / temperature, dim=-1)
    logps = table.gather(-1, ids[:, PROMPT:, None]).squeeze(-1)
    return logps * mask, -(table.exp() * table).sum(-1) * mask


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make chunks of three places; the list tells how many places each call took in chunks."""
    monkeypatch.setattr(log_probs, "AT_ONCE", 1000)
    result, real = [], log_probs._in_chunks

    def counted(head: nn.Linear, states: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        result.append(len(states))
        return real(head, states, chosen, temperature)

    monkeypatch.setattr(log_probs, "_in_chunks", counted)
    return result


def gradients(lm: LanguageModel, logps: Tensor) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the log-probabilities, and forget them."""
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    (logps * weights).sum().backward()
    result = {name: value.grad for name, value in lm.model.named_parameters() if value.grad is not None}
    lm.model.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_adapter_gradients_are_those_of_the_plain_formula(
    in_chunks: list[int], kind: str, temperature: float
) -> None:
    lm = made(kind)
    marked = int(batch()[2].sum())
    for attached in (False, True):
        if attached:
            adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0, targets="all-linear"), seed=0)
            with torch.no_grad():
                for name, value in lm.model.named_parameters():
                    if "lora_B" in name:
                        value.normal_(std=0.1)
        out = token_outputs(lm.model, *batch(), temperature)
        logps, entropy = plainly(lm, temperature)
        torch.testing.assert_close(out.logps, logps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.entropy, entropy, atol=1e-5, rtol=1e-5)
        assert (out.logps[~batch()[2]] == 0).all() and not out.entropy.requires_grad
    assert in_chunks == ([marked, marked] if kind in LINEAR else [])
    result, wanted = gradients(lm, out.logps), gradients(lm, logps)
    assert result.keys() == wanted.keys() and len(result) >= 28
    for name, value in wanted.items():
        assert (result[name] - value).norm() <= 1e-5 * value.norm(), name


def test_a_head_that_trains_takes_the_plain_formula(in_chunks: list[int]) -> None:
    lm = made("untied")
    lm.model.lm_head.weight.requires_grad_(True)
    result, wanted = gradients(lm, token_outputs(lm.model, *batch(), 0.7).logps), gradients(lm, plainly(lm, 0.7)[0])
    torch.testing.assert_close(result["lm_head.weight"], wanted["lm_head.weight"])
    lm.model.requires_grad_(False)
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0, targets=["lm_head", "q_proj"]), seed=0)
    result, wanted = gradients(lm, token_outputs(lm.model, *batch()).logps), gradients(lm, plainly(lm, 1.0)[0])
    changed = [name for name, value in wanted.items() if "lm_head" in name and value.norm() > 0]
    assert changed
    for name in wanted:
        torch.testing.assert_close(result[name], wanted[name], atol=1e-5, rtol=1e-5)
    assert in_chunks == []


def test_half_precision_is_as_exact_as_the_plain_formula(in_chunks: list[int]) -> None:
    """Both round logits to bfloat16: neither is further from single precision than the other by much."""
    lm = made("untied")
    exact = plainly(lm, 1.0)[0]
    lm.model.to(torch.bfloat16)
    out, plain = token_outputs(lm.model, *batch()), plainly(lm, 1.0)[0]
    assert out.logps.dtype == torch.float32 and len(in_chunks) == 1
    torch.testing.assert_close(out.logps, plain, atol=0.05, rtol=0)
    assert (out.logps - exact).abs().mean() <= 1.1 * (plain - exact).abs().mean()


@pytest.mark.parametrize("share", [False, True], ids=["whole rows", "shared prompts"])
def test_a_head_below_single_precision_reads_states_that_autocast_left_in_it(
    in_chunks: list[int], monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    """As on a GPU under accelerate: the model's forward alone is in autocast, which there keeps a LayerNorm's output in
    single precision. Values and gradients are those of the plain formula, whose head autocast feeds."""
    torch.manual_seed(1)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    lm = wrap(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), base.make_tokenizer(), "neox", "0" * 16, device="cpu")
    lm.model.to(torch.bfloat16)
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    for name, value in lm.model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)

    def as_on_a_gpu(norm: nn.LayerNorm, states: Tensor) -> Tensor:
        return nn.functional.layer_norm(states.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float())

    monkeypatch.setattr(nn.LayerNorm, "forward", as_on_a_gpu)
    monkeypatch.setattr(lm.model, "forward", torch.autocast("cpu", torch.bfloat16)(lm.model.forward))
    ids, attention, mask = batch()
    ids[1], attention[1, :PROMPT] = torch.where(torch.arange(PROMPT + WIDTH) < PROMPT, ids[2], ids[1]), 1
    out = token_outputs(lm.model, ids, attention, mask, share_prompts=share)
    assert len(in_chunks) == 1
    monkeypatch.setattr(log_probs, "AT_ONCE", 2**23)
    plain = token_outputs(lm.model, ids, attention, mask, share_prompts=share)
    assert len(in_chunks) == 1 and out.logps.dtype == torch.float32
    torch.testing.assert_close(out.logps, plain.logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(out.entropy, plain.entropy, atol=1e-4, rtol=0)
    result, wanted = gradients(lm, out.logps), gradients(lm, plain.logps)
    assert result.keys() == wanted.keys() and len(result) >= 16
    for name, value in wanted.items():
        assert (result[name] - value).norm() <= 0.02 * value.norm(), name


def test_nothing_marked_gives_zeros_and_a_gradient_of_zero() -> None:
    lm = made("untied")
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    ids, attention, mask = batch()
    out = token_outputs(lm.model, ids, attention, torch.zeros_like(mask))
    assert (out.logps == 0).all() and out.logps.shape == mask.shape
    out.logps.sum().backward()
    assert all(value.grad is None or (value.grad == 0).all() for value in lm.model.parameters())


def test_hidden_states_are_still_served(in_chunks: list[int]) -> None:
    lm = made("untied")
    ids, attention, mask = batch()
    out = token_outputs(lm.model, ids, attention, mask, hidden=True)
    whole = lm.model(
        input_ids=ids, attention_mask=attention, position_ids=positions(attention), output_hidden_states=True
    )
    assert out.hidden is not None and in_chunks
    torch.testing.assert_close(out.hidden, whole.hidden_states[-1][:, PROMPT - 1 : -1])


def test_no_more_logits_than_allowed_are_held_and_the_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = made("untied")
    monkeypatch.setattr(log_probs, "AT_ONCE", 1000)
    seen, real = [], nn.functional.linear

    def watched(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made = real(given, weight, bias)
        if weight is lm.model.lm_head.weight:
            seen.append(made.numel())
        return made

    monkeypatch.setattr(nn.functional, "linear", watched)
    token_outputs(lm.model, *batch())
    assert len(seen) > 6 and max(seen) <= 1000
    assert not lm.model.lm_head._forward_pre_hooks

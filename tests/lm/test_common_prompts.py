"""What all prompts begin with is read once for all of them: the samples are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from moalign.lm import sampler
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import token_outputs
from moalign.lm.sampler import NextToken, Samples, Sampling, generate, sample, uniforms
from moalign.tasks.sandbox import base

SYSTEM = [1, 20, 30, 40, 50]
PROMPTS = [[*SYSTEM, 60, 61, 62], [*SYSTEM, 70], [*SYSTEM, 60, 71, 72, 73, 74, 75]]
Make = Callable[..., LanguageModel]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read it once whatever the model and however little that saves."""
    monkeypatch.setattr(sampler, "TINY", 0)
    monkeypatch.setattr(sampler, "SAVED", 1)


def drawn(lm: LanguageModel, repeat: int = 4, **given: Any) -> Samples:
    numbers = uniforms(3, range(len(PROMPTS) * repeat), 12)
    return sample(lm, PROMPTS, numbers, repeat=repeat, hidden=True, **given)


def reads(lm: LanguageModel) -> list[tuple[int, ...]]:
    """Shapes of what is read from here on."""
    seen: list[tuple[int, ...]] = []
    lm.model.get_input_embeddings().register_forward_pre_hook(lambda module, given: seen.append(tuple(given[0].shape)))
    return seen


def test_samples_are_those_of_whole_prompts(make_lm: Make, always: None) -> None:
    lm = make_lm()
    whole = drawn(lm, source=NextToken(lm.model, hidden=True))  # a source of one's own reads for itself
    seen = reads(lm)
    once = drawn(lm)
    assert seen[:3] == [(1, 5), (3, 6), (12, 1)]
    for name in ("input_ids", "attention_mask", "response_mask", "finished"):
        assert torch.equal(getattr(once, name), getattr(whole, name)), name
    assert 0 < int(once.finished.sum()) < 12  # rows leave the batch on the way
    torch.testing.assert_close(once.logps, whole.logps, rtol=0, atol=1e-4)
    torch.testing.assert_close(once.hidden, whole.hidden, rtol=1e-3, atol=1e-3)
    again = token_outputs(lm.model, once.input_ids, once.attention_mask, once.response_mask)
    torch.testing.assert_close(again.logps, once.logps, rtol=0, atol=1e-4)


def test_of_equal_prompts_one_token_is_left_to_read(make_lm: Make, always: None) -> None:
    lm = make_lm()
    seen = reads(lm)
    sample(lm, [PROMPTS[0]] * 3, uniforms(3, range(3), 2))
    assert seen[:2] == [(1, 7), (3, 1)]
    seen.clear()
    sample(lm, [PROMPTS[0]], uniforms(3, range(1), 2))
    assert seen[0] == (1, 8)


def test_responses_of_a_generator_are_the_same(make_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    texts = [f"how do i make soup today ? {tail}" for tail in ("", "any tips ?", "i want to", "take it slowly .")]
    found = []
    for tiny in (sampler.TINY, 0):
        monkeypatch.setattr(sampler, "TINY", tiny)
        monkeypatch.setattr(sampler, "SAVED", 1)
        found.append(generate(lm, texts, [0, 1, 2, 3], Sampling(max_new_tokens=8, batch_size=3)))
    assert found[0].responses == found[1].responses and found[0].tokens == found[1].tokens


def test_tiny_models_read_as_ever(make_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    monkeypatch.setattr(sampler, "SAVED", 1)
    seen = reads(lm)
    drawn(lm)
    assert seen[0] == (3, 11)


def test_so_do_models_that_remember_a_window(always: None) -> None:
    """Padding in between would push tokens out of it."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=185, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    lm = wrap(MistralForCausalLM(config), base.make_tokenizer(), "window", "0" * 16, device="cpu")
    seen = reads(lm)
    drawn(lm)
    assert seen[0] == (3, 11)

"""A tiny random Llama with the sandbox's tokenizer: steep enough that its next-token distributions differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moalign.lm.language_model import LanguageModel, wrap
from moalign.tasks.sandbox import base


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., LanguageModel]:
    """Return a maker of fresh models: the same ``seed``, the same weights."""

    def make(seed: int = 0, end: float = 3.0) -> LanguageModel:
        tokenizer = base.make_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight[2] *= end  # the end token is then likely in some places, as in a trained model
        return wrap(model, tokenizer, "tiny", f"{seed:016d}", device="cpu")

    return make


@pytest.fixture(scope="module")
def lm(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    """One bare model per test file; nothing may change it."""
    return make_lm()

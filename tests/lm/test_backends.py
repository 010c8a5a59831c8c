"""How a base may be held: 4-bit weights, kinds of attention; and what is said where the machine lacks a package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moalign.config.card import TaskCard
from moalign.config.recipe import LoraSpec, PolicySpec
from moalign.lm import adapters, architecture, backends, language_model
from moalign.lm.language_model import LanguageModel
from moalign.lm.log_probs import token_outputs
from moalign.lm.side_by_side import SideBySide
from moalign.preflight import memory
from moalign.tasks.sandbox import base
from moalign.training import reference

CARD = {
    "name": "tales", "kind": "text", "description": "", "model": "owner/name", "data": {"prompts": ["hello"]},
    "objectives": [{"name": name, "kind": "rule", "rule": "brevity"} for name in ("a", "b")],
    "reference_point": [0, 0], "sensitivity_point": [0, 0],
}  # fmt: skip
quantised = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra gpu)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose layers are made of whole blocks of 64 numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = base.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 60, (3, 10), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), torch.ones(3, 6, dtype=torch.bool)


def loaded(folder: Path, **how: Any) -> LanguageModel:
    return language_model.load(str(folder), device="cpu", **how)


@pytest.fixture
def four(folder: Path) -> Iterator[LanguageModel]:
    yield loaded(folder, in_4bit=True)


# -- attention -------------------------------------------------------------------------------------------------------


def test_kinds_of_attention_agree(folder: Path) -> None:
    results = {}
    for kind in ("eager", "sdpa"):
        lm = loaded(folder, attention=kind)
        assert lm.model.config._attn_implementation == kind
        results[kind] = token_outputs(lm.model, *batch()).logps
    torch.testing.assert_close(results["eager"], results["sdpa"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value", "near"), [("spda", "; did you mean 'sdpa'?"), ("flash_attention_9", "")])
def test_another_kind_is_refused_with_the_nearest(value: str, near: str) -> None:
    allowed = "allowed: eager, sdpa, flash_attention_2, or a kernel of the hub"
    with pytest.raises(ValidationError, match=allowed) as error:
        PolicySpec(attention=value)
    assert near in str(error.value)


@pytest.mark.parametrize("kind", ["kernels-community/flash-attn2", "a/b@v1", "flash_attention_2", "eager", None])
def test_allowed_kinds(kind: str | None) -> None:
    assert PolicySpec(attention=kind).attention == kind


# -- what is missing -------------------------------------------------------------------------------------------------


def problems(monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], policy: dict[str, Any], **card: Any) -> list[str]:
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if name in there else None)
    return backends.problems(PolicySpec(**policy), TaskCard(**{**CARD, **card}))


def test_each_missing_package_is_named_once_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = {"attention": "flash_attention_2"}
    (text,) = problems(monkeypatch, (), {}, load_in_4bit=True)
    assert text.startswith("policy.load_in_4bit: found true, but the package bitsandbytes is not installed")
    assert "pip install 'moalign[gpu]'" in text
    assert problems(monkeypatch, ("bitsandbytes",), {}, load_in_4bit=True) == []
    (text,) = problems(monkeypatch, (), flash, dtype="bfloat16")
    assert "the package flash-attn is not installed" in text and "sdpa" in text
    (text,) = problems(monkeypatch, ("flash_attn",), flash)
    assert "half precision only and dtype is float32; set policy.dtype: bfloat16" in text
    assert problems(monkeypatch, ("flash_attn",), flash, dtype="bfloat16") == []
    (text,) = problems(monkeypatch, (), {"attention": "owner/kernel"})
    assert "the package kernels is not installed" in text
    assert problems(monkeypatch, (), {"attention": "sdpa"}) == problems(monkeypatch, (), {}) == []


# -- 4-bit weights ---------------------------------------------------------------------------------------------------


def read_back(whole: LanguageModel, four: LanguageModel) -> None:
    """Give the whole model the numbers that the 4-bit one stands for; each is within half of NF4's widest gap."""
    import bitsandbytes

    weights, changed = dict(four.model.named_parameters()), 0
    with torch.no_grad():
        for name, own in whole.model.named_parameters():
            if (state := getattr(weights[name], "quant_state", None)) is not None:
                value = bitsandbytes.functional.dequantize_4bit(weights[name].data, state)
                blocks, error = own.reshape(-1, 64).abs().amax(1, keepdim=True), (value - own).reshape(-1, 64).abs()
                assert float((error / blocks).max()) < 0.16
                own.copy_(value)
                changed += 1
    assert changed == 14


@quantised
def test_four_bits_are_near_the_whole_model_and_nothing_is_folded_into_them(folder: Path, four: LanguageModel) -> None:
    whole = loaded(folder)
    assert four.in_4bit and not whole.in_4bit and four.fingerprint == whole.fingerprint
    exact, near = (token_outputs(lm.model, *batch()).logps for lm in (whole, four))
    read_back(whole, four)
    rounded = token_outputs(whole.model, *batch()).logps
    assert 1e-2 < float((rounded - exact).abs().mean()) < 0.5 * float(exact.std())
    torch.testing.assert_close(near, rounded, rtol=1e-4, atol=1e-4)
    adapters.attach(four, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    packed = four.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert packed.dtype == torch.uint8
    with adapters.merged(four):
        assert four.in_reference is False, "the adapter stays beside the weights"
    adapters.attach(four, LoraSpec(r=4, alpha=8, dropout=0.0), seed=1, name="other")
    mixed = SideBySide(four, ["policy", "other"])(input_ids=batch()[0].repeat(2, 1)).logits
    four.model.set_adapter("policy")
    torch.testing.assert_close(mixed[:3], four.model(input_ids=batch()[0]).logits, rtol=1e-4, atol=1e-4)


@quantised
def test_adapters_on_four_bits_learn_in_single_precision(four: LanguageModel) -> None:
    adapters.attach(four, LoraSpec(r=4, alpha=8, dropout=0.0), seed=0)
    trained = [p for p in four.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == 2 * 14
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(3):
        loss = -token_outputs(four.model, *batch()).logps.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[1] < losses[0]


@quantised
def test_the_store_of_the_reference_tells_four_bits_from_the_whole(folder: Path, four: LanguageModel) -> None:
    rows = [([5, 6, 7], 1)]
    assert reference._content(four, rows, own=False) != reference._content(loaded(folder), rows, own=False)


@quantised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_takes_what_its_4_bit_tensors_take(folder: Path, dtype: str) -> None:
    """Beside one layer's weight, which is made whole while it is used."""
    lm, sizes = loaded(folder, in_4bit=True, dtype=dtype), architecture.of_folder(folder)
    assert sizes is not None
    held = 0
    for parameter in lm.model.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # constants of its blocks, and theirs
            parts = [state.absmax, state.state2.absmax]
            held += sum(part.numel() * part.element_size() for part in parts)
    card = TaskCard(**{**CARD, "dtype": dtype, "load_in_4bit": True})
    largest = max(architecture.linear(sizes.shapes)) * memory.WIDTH[dtype]
    assert memory._base(sizes, card) - largest == pytest.approx(held, rel=0.01)


def test_what_four_bits_make_of_7b() -> None:
    """6.48 of 6.74 billion numbers are in linear layers; 3.11 GiB of them, .49 GiB of the rest, .08 of a layer."""
    sizes = architecture.KNOWN["meta-llama/Llama-2-7b-hf"]
    inside = sum(architecture.linear(sizes.shapes))
    assert inside == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) == 6_476_005_376
    card = TaskCard(**{**CARD, "dtype": "bfloat16", "load_in_4bit": True})
    by_hand = inside * (0.5 + 1 / 64 + 1 / 4096) + (sizes.parameters - inside) * 2 + 4096 * 11008 * 2
    assert memory._base(sizes, card) == pytest.approx(by_hand, abs=1)
    assert by_hand / 2**30 == pytest.approx(3.69, abs=0.02)


def test_a_base_in_4_bits_or_another_precision_is_another_task() -> None:
    plain = TaskCard(**CARD).hash()
    assert TaskCard(**{**CARD, "load_in_4bit": False}).hash() == plain
    others = [TaskCard(**{**CARD, **more}).hash() for more in ({"load_in_4bit": True}, {"dtype": "bfloat16"})]
    assert len({plain, *others}) == 3

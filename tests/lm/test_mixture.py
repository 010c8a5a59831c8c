"""Experts side by side on one base, and their mixture as a source of next tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, side_by_side
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import positions
from moalign.lm.mixture import (
    Constant,
    Mixture,
    OwnPrompt,
    Space,
    expert_log_probs,
    logit_mixture_logps,
    mix,
    mixture_logps,
)
from moalign.lm.sampler import NextToken, pad_left, sample, uniforms
from moalign.tasks.sandbox import base

Make = Callable[..., LanguageModel]
SPECS = [LoraSpec(r=4, alpha=6, dropout=0.5), LoraSpec(r=2, alpha=7, dropout=0.0), LoraSpec(r=3, alpha=1, dropout=0.0)]
PROMPTS = ["how do i plan a trip", "tell me of the sea", "write a poem", "what is in a cave"]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 2], [1, 21, 31, 41, 51, 61, 2]])
both = pytest.mark.parametrize("folded", [True, False], ids=["folded", "factors"])


def with_experts(make_lm: Make, count: int = 3, alike: bool = False) -> tuple[LanguageModel, list[str]]:
    lm = make_lm()
    names = [f"expert{number}" for number in range(count)]
    for number, name in enumerate(names):
        kind = 0 if alike else number
        add(lm, SPECS[kind], kind, name)
    lm.model.requires_grad_(False)
    return lm, names


def add(lm: LanguageModel, spec: LoraSpec, seed: int, name: str) -> None:
    """Attach an adapter and move it away from its start, where it changes nothing."""
    adapters.attach(lm, spec, seed=seed, name=name)
    generator = torch.Generator().manual_seed(seed)
    start = adapters.tensors(lm, name)
    moved = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    adapters.set_tensors(lm, moved, name)
    lm.model.eval()


def of_expert(lm: LanguageModel, name: str, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    lm.model.set_adapter(name)
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        logits: Tensor = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    return logits


@both
def test_each_part_of_the_rows_is_read_with_its_adapter(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch, folded: bool
) -> None:
    monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10**9 if folded else 0)
    lm, names = with_experts(make_lm)
    alone = [of_expert(lm, name) for name in names]
    with side_by_side.SideBySide(lm, names).on(), torch.no_grad():
        together = lm.model(IDS.repeat(3, 1)).logits
    for index, wanted in enumerate(alone):
        torch.testing.assert_close(together[2 * index : 2 * index + 2], wanted, rtol=1e-4, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1.0
    for name, wanted in zip(names, alone, strict=True):  # and the model is left as it was
        assert torch.equal(of_expert(lm, name), wanted)


def test_adapters_of_embeddings_count_too(make_lm: Make) -> None:
    lm = make_lm()
    spec = LoraSpec(r=2, alpha=2, dropout=0.0, targets=["embed_tokens", "q_proj"])
    for seed, name in enumerate(("first", "second")):
        adapters.attach(lm, spec, seed, name)
        generator = torch.Generator().manual_seed(seed)
        start = adapters.tensors(lm, name)
        adapters.set_tensors(lm, {k: torch.randn(v.shape, generator=generator) for k, v in start.items()}, name)
    lm.model.eval()
    alone = torch.cat([of_expert(lm, name) for name in ("first", "second")])
    with side_by_side.SideBySide(lm, ["first", "second"]).on(), torch.no_grad():
        torch.testing.assert_close(lm.model(IDS.repeat(2, 1)).logits, alone, rtol=1e-4, atol=1e-4)


@both
def test_the_active_adapter_has_no_say_in_layers_that_no_expert_changes(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch, folded: bool
) -> None:
    """A control model's adapter, or that of a run evaluated before, may lie on more layers than the experts'."""
    monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10**9 if folded else 0)
    lm = make_lm()
    for seed, name in enumerate(("first", "second")):
        add(lm, LoraSpec(r=2, alpha=4, dropout=0.0, layers=1), seed, name)
    alone = [of_expert(lm, name) for name in ("first", "second")]
    everywhere = ["embed_tokens", "q_proj", "v_proj", "down_proj", "lm_head"]
    add(lm, LoraSpec(r=2, alpha=4, dropout=0.0, targets=everywhere), 2, "control")
    control = of_expert(lm, "control")  # which it leaves active
    with side_by_side.SideBySide(lm, ["first", "second"]).on(), torch.no_grad():
        together = lm.model(IDS.repeat(2, 1)).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert float((control - alone[1]).abs().max()) > 1.0
    assert torch.equal(of_expert(lm, "control"), control)  # the model is left as it was


@both
@pytest.mark.parametrize("targets", [["c_proj"], "all-linear"], ids=["square", "all"])
def test_layers_that_keep_their_weights_as_inputs_by_outputs_are_read_so(
    monkeypatch: pytest.MonkeyPatch, folded: bool, targets: list[str] | str
) -> None:
    """GPT-2's; with as many inputs as outputs a transposed weight would raise no error."""
    monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10**9 if folded else 0)
    torch.manual_seed(0)
    tokenizer = base.make_tokenizer()
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 16, "n_positions": 32, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes)
    lm = wrap(GPT2LMHeadModel(config), tokenizer, "gpt2", "0" * 16, device="cpu")
    for seed, name in enumerate(("first", "second")):
        add(lm, LoraSpec(r=2, alpha=4, dropout=0.0, targets=targets), seed, name)
    alone = [of_expert(lm, name) for name in ("first", "second")]
    with side_by_side.SideBySide(lm, ["first", "second"]).on(), torch.no_grad():
        torch.testing.assert_close(lm.model(IDS.repeat(2, 1)).logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 0.5


def test_embeddings_that_are_scaled_are_so_with_adapters(make_lm: Make) -> None:
    """Gemma's are, by the root of their width."""
    torch.manual_seed(0)
    tokenizer = base.make_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    lm = wrap(Gemma3ForCausalLM(config), tokenizer, "gemma", "0" * 16, device="cpu")
    for seed, name in enumerate(("first", "second")):
        add(lm, LoraSpec(r=2, alpha=4, dropout=0.0, targets=["embed_tokens", "q_proj"]), seed, name)
    alone = [of_expert(lm, name) for name in ("first", "second")]
    with side_by_side.SideBySide(lm, ["first", "second"]).on(), torch.no_grad():
        torch.testing.assert_close(lm.model(IDS.repeat(2, 1)).logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 0.5


def test_dora_adapters_are_refused(make_lm: Make) -> None:
    from peft import LoraConfig, get_peft_model

    lm = make_lm()
    lm.model = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "made")
    with pytest.raises(RequestError, match="DoRA"):
        side_by_side.SideBySide(lm, ["made"])


def test_mixtures_of_three_tokens_worked_by_hand() -> None:
    p = torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.2, 0.7]]]).log()
    half = torch.tensor([[0.5, 0.5]])
    torch.testing.assert_close(mix(p, half, "probability").exp(), torch.tensor([[0.4, 0.2, 0.4]]))
    found = mix(p, half, "logit").softmax(-1)
    torch.testing.assert_close(found, torch.tensor([[0.3629, 0.2743, 0.3629]]), rtol=0, atol=5e-5)
    torch.testing.assert_close(mix(p, torch.tensor([[0.25, 0.75]]), "probability").exp()[0, 0], torch.tensor(0.25))


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_a_token_that_an_expert_rules_out_makes_no_nan(space: Space) -> None:
    never = torch.tensor([[[0.0, -torch.inf, 0.0]], [[0.0, 0.0, 0.0]]]).log_softmax(-1)
    for weights in ([0.4, 0.6], [0.0, 1.0], [1.0, 0.0]):
        found = mix(never, torch.tensor([weights]), space).softmax(-1)
        assert bool(torch.isfinite(found).all())
        torch.testing.assert_close(found.sum(-1), torch.ones(1), rtol=0, atol=1e-6)
    ruled_out = float(mix(never, torch.tensor([[0.4, 0.6]]), space).softmax(-1)[0, 1])
    assert ruled_out == (0.0 if space == "logit" else pytest.approx(0.6 / 3))  # the other's share
    assert float(mix(never, torch.tensor([[0.0, 1.0]]), space).softmax(-1)[0, 1]) == pytest.approx(1 / 3)


@both
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_every_token_is_drawn_from_the_mixture(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch, folded: bool, space: Space
) -> None:
    """One expert at a time and without caches it must give the sampler's log-probabilities; each row has its own
    weights."""
    monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10**9 if folded else 0)
    lm, names = with_experts(make_lm)
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.6, 0.4], [1.0, 0.0, 0.0], [0.1, 0.1, 0.8]])
    prompts, numbers = lm.encode(PROMPTS), uniforms(3, range(8), 8)
    experts = side_by_side.SideBySide(lm, names)
    drawn = sample(lm, prompts, numbers, repeat=2, source=Mixture(NextToken(experts), 3, Constant(weights), space))
    read = pad_left([ids for ids in prompts for _ in range(2)], lm.pad, lm.device)
    q = expert_log_probs(experts, read, drawn, torch.arange(8), space)
    width = drawn.response_mask.shape[1]
    parts = torch.stack([of_expert(lm, name, drawn.input_ids, drawn.attention_mask) for name in names])
    parts = parts[:, :, -(width + 1) : -1].log_softmax(-1)
    by_row = weights.repeat_interleave(2, dim=0)
    mixture = mix(parts, by_row.unsqueeze(1).expand(-1, width, -1), space).log_softmax(-1)
    chosen = drawn.input_ids[:, -width:].unsqueeze(-1)
    torch.testing.assert_close(
        drawn.logps, mixture.gather(-1, chosen).squeeze(-1) * drawn.response_mask, rtol=2e-5, atol=2e-5
    )
    shares = by_row.log().unsqueeze(1)  # as training computes them
    found = mixture_logps(q, shares) if space == "probability" else logit_mixture_logps(q, shares, chosen.squeeze(-1))
    torch.testing.assert_close(drawn.logps, found * drawn.response_mask, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampling", "greedy"])
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_identical_experts_and_one_hot_weights_give_the_expert(make_lm: Make, space: Space, temperature: float) -> None:
    prompts, numbers = None, uniforms(6, range(4), 10)  # with 5 one draw is on the border of two tokens
    for alike, weights in ((True, [0.3, 0.7]), (False, [1.0, 0.0]), (False, [0.0, 1.0])):
        lm, names = with_experts(make_lm, 2, alike)
        prompts = lm.encode(PROMPTS)
        lm.model.set_adapter(names[0 if alike or weights[0] else 1])
        alone = sample(lm, prompts, numbers, temperature)
        source = NextToken(side_by_side.SideBySide(lm, names))
        by_row = Constant(torch.tensor([weights]).repeat(4, 1))
        found = sample(lm, prompts, numbers, temperature, source=Mixture(source, 2, by_row, space))
        assert torch.equal(found.input_ids, alone.input_ids)
        torch.testing.assert_close(found.logps, alone.logps, rtol=2e-5, atol=2e-5)


def test_a_source_with_prompts_of_its_own_reads_them_in_place_of_the_sampler_s(make_lm: Make) -> None:
    """Prompts of other lengths, repeated, and rows that leave the batch: the same answers as asked directly."""
    lm = make_lm()
    numbers = uniforms(5, range(8), 12)
    wanted = sample(lm, lm.encode(PROMPTS), numbers, repeat=2)
    others = lm.encode([f"preference : {text} , and more of it" for text in reversed(PROMPTS)])
    ids, mask = pad_left(lm.encode(PROMPTS), lm.pad, lm.device)
    found = sample(lm, others, numbers, repeat=2, source=OwnPrompt(NextToken(lm.model), ids, mask))
    width = wanted.response_mask.shape[1]
    assert torch.equal(found.input_ids[:, -width:], wanted.input_ids[:, -width:])
    torch.testing.assert_close(found.logps, wanted.logps, rtol=0, atol=2e-5)
    assert len({int(row.sum()) for row in wanted.response_mask}) > 1  # some ended before others

"""Experts combined: weights interpolated exactly, next-token distributions mixed, one-hot vectors give the expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, sampler, side_by_side
from moalign.lm.adapters import Adapter
from moalign.lm.generator import LazyGenerator, ModelGenerator
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.mixture import Constant, Mixture
from moalign.lm.sampler import NextToken, Samples, Sampling, generate, pad_left, sample, uniforms
from moalign.lm.side_by_side import SideBySide
from moalign.policies.mixed import MixedGenerator
from moalign.policies.policy import Policy, respond_all

Make = Callable[..., LanguageModel]
SPECS = [LoraSpec(r=4, alpha=6, dropout=0.5), LoraSpec(r=2, alpha=7, dropout=0.0), LoraSpec(r=3, alpha=1, dropout=0.0)]
IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 2], [1, 21, 31, 41, 51, 61, 2]])
PROMPTS = ["how do i plan a trip", "tell me of the sea", "write a poem", "what is in a cave"]
SAMPLING = Sampling(max_new_tokens=10, seed=5, batch_size=3)


def expert(lm: LanguageModel, number: int, size: float = 0.3) -> Adapter:
    """Return an adapter that is far from the start, off the model again."""
    adapters.attach(lm, SPECS[number], seed=number, name="made")
    generator = torch.Generator().manual_seed(number)
    start = adapters.tensors(lm, "made")
    moved = {key: value + size * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    adapters.drop(lm, "made")
    return Adapter(SPECS[number], moved)


def logits(lm: LanguageModel, adapter: Adapter | None = None) -> Tensor:
    if adapter is not None:
        adapters.place(lm, adapter, "asked")
    with torch.no_grad():
        result: Tensor = lm.model(IDS).logits
    adapters.drop(lm, "asked")
    return result


def changes(lm: LanguageModel, adapter: Adapter) -> dict[str, Tensor]:
    """Return dW of every layer by the definition, s B A, in double precision."""
    scale = adapter.spec.alpha / adapter.spec.r
    result = {}
    for key, a in adapter.weights.items():
        if "lora_A" in key:
            b = adapter.weights[key.replace("lora_A", "lora_B")]
            result[key.replace(".lora_A.weight", "")] = scale * b.double() @ a.double()
    return result


# -- interpolation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (0.2, 0.3, 0.5), (0.9, 0.0, 0.1)])
def test_interpolation_is_the_weighted_sum_of_changes(make_lm: Make, weights: tuple[float, ...]) -> None:
    lm = make_lm()
    experts = [expert(lm, number) for number in range(len(weights))]
    result = changes(lm, adapters.interpolate(experts, weights))
    single = [changes(lm, each) for each in experts]
    assert result.keys() == single[0].keys()
    for key, value in result.items():
        wanted = sum(weight * each[key] for weight, each in zip(weights, single, strict=True))
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_logits_are_those_of_a_base_with_the_sum_added(make_lm: Make) -> None:
    """An independent way: the sum of changes is added to the base's own weights."""
    weights = (0.35, 0.65)
    lm = make_lm()
    experts = [expert(lm, number) for number in (0, 1)]
    answered = logits(lm, adapters.interpolate(experts, weights))
    plain = make_lm()
    single = [changes(plain, each) for each in experts]
    with torch.no_grad():
        for name, parameter in plain.model.named_parameters():
            key = f"base_model.model.{name.removesuffix('.weight')}"
            if key in single[0]:
                parameter += sum(w * each[key] for w, each in zip(weights, single, strict=True))
    torch.testing.assert_close(answered, logits(plain), rtol=1e-4, atol=1e-4)
    assert (answered - logits(make_lm())).abs().max() > 0.5  # the experts do change something


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_one_hot_vector_is_the_expert_bit_for_bit(make_lm: Make, number: int) -> None:
    lm = make_lm()
    experts = [expert(lm, each) for each in range(3)]
    one_hot = [1.0 if each == number else 0.0 for each in range(3)]
    assert torch.equal(logits(lm, adapters.interpolate(experts, one_hot)), logits(lm, experts[number]))


def test_identical_experts_interpolate_to_the_expert(make_lm: Make) -> None:
    lm = make_lm()
    each = expert(lm, 0)
    torch.testing.assert_close(
        logits(lm, adapters.interpolate([each, each], (0.3, 0.7))), logits(lm, each), rtol=1e-5, atol=1e-5
    )


def test_averaging_the_factors_apart_is_another_model(make_lm: Make) -> None:
    """What `combination_type="linear"` and naive soups do has cross terms; the change is not even near."""
    lm = make_lm()
    first, second = expert(lm, 0), expert(lm, 0)
    generator = torch.Generator().manual_seed(9)
    second = Adapter(second.spec, {k: torch.randn(v.shape, generator=generator) for k, v in second.weights.items()})
    exact = adapters.interpolate([first, second], (0.5, 0.5))
    naive = Adapter(first.spec, {key: 0.5 * (first.weights[key] + second.weights[key]) for key in first.weights})
    right, wrong = changes(lm, exact), changes(lm, naive)
    errors = [float((wrong[key] - right[key]).norm() / right[key].norm()) for key in right]
    assert min(errors) > 0.3
    assert (logits(lm, naive) - logits(lm, exact)).abs().max() > 0.1


def test_adapters_of_different_layers_and_weights_that_are_all_zero_are_refused(make_lm: Make) -> None:
    lm = make_lm()
    first, second = expert(lm, 0), expert(lm, 1)
    less = Adapter(second.spec, {key: value for key, value in second.weights.items() if "q_proj" not in key})
    with pytest.raises(RequestError, match=r"cannot be interpolated: \S*q_proj"):
        adapters.interpolate([first, less], (0.5, 0.5))
    other = {**first.weights, "base_model.model.lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(RequestError, match="no LoRA matrix"):
        adapters.interpolate([Adapter(first.spec, other), Adapter(first.spec, other)], (0.5, 0.5))
    with pytest.raises(ValueError, match="not be 0"):
        adapters.interpolate([first, second], (0.0, 0.0))
    with pytest.raises(ValueError, match="shorter"):
        adapters.interpolate([first, second], (1.0,))


def test_adapters_of_embeddings_count_too(make_lm: Make) -> None:
    """Folding passed them over once: small models then answered without them."""
    spec = LoraSpec(r=3, alpha=6, dropout=0.0, targets=["embed_tokens", "q_proj"])
    lm = make_lm()
    made = []
    for seed in (1, 2):
        adapters.attach(lm, spec, seed, "made")
        generator = torch.Generator().manual_seed(seed)
        weights = {k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in adapters.tensors(lm, "made").items()}
        adapters.drop(lm, "made")
        made.append(Adapter(spec, weights))
    assert any("lora_embedding_A" in key for key in made[0].weights)
    adapters.place(lm, adapters.interpolate(made, (0.5, 0.5)), "soup")
    plain = lm.model(IDS).logits
    with adapters.merged(lm):
        torch.testing.assert_close(lm.model(IDS).logits, plain, rtol=1e-4, atol=1e-4)
    alone = logits(lm, made[0])
    assert (alone - plain).abs().max() > 0.1
    # Halves of one expert are the expert: the change of the embeddings is summed, too.
    halves = adapters.interpolate([made[0], made[0]], (0.5, 0.5))
    torch.testing.assert_close(logits(lm, halves), alone, rtol=1e-4, atol=1e-4)


def test_an_interpolated_adapter_is_saved_and_loaded_alike(make_lm: Make, tmp_path: Path) -> None:
    lm = make_lm()
    soup = adapters.interpolate([expert(lm, 0), expert(lm, 1)], (0.25, 0.75))
    adapters.place(lm, soup, "soup")
    folder = tmp_path / "soup"
    adapters.save(lm, folder, "soup")
    back = adapters.read(make_lm(), folder)
    assert (back.spec.r, back.spec.alpha) == (6, 6.0)
    assert all(torch.equal(value, soup.weights[key]) for key, value in back.weights.items())


@pytest.mark.slow
def test_generators_that_take_turns_leave_one_adapter_on_the_model(make_lm: Make) -> None:
    lm = make_lm()
    experts = [expert(lm, 0), expert(lm, 1)]
    cache: dict[str, object] = {}
    placed: list[str] = []

    def place(share: float, name: str) -> None:
        placed.append(name)
        adapters.place(lm, adapters.interpolate(experts, (share, 1 - share)), name)

    shares = [step / 4 for step in range(5)]
    generators = [LazyGenerator(lm, f"soup{n}", partial(place, s, f"soup{n}"), cache) for n, s in enumerate(shares)]
    answers = respond_all([Policy(generator, str) for generator in generators], PROMPTS, SAMPLING).responses
    assert list(lm.model.peft_config) == ["soup4"]
    assert placed == [f"soup{n}" for n in range(5)]  # once each, though every one was asked in two batches
    for number, each in ((0, experts[1]), (4, experts[0])):
        fresh = make_lm()
        adapters.place(fresh, each, "expert")
        assert Policy(ModelGenerator(fresh, "expert"), str).respond(PROMPTS, SAMPLING) == answers[number]


# -- mixing ----------------------------------------------------------------------------------------------------------


NAMES = ["expert0", "expert1"]


def on_model(lm: LanguageModel) -> list[ModelGenerator]:
    made = [expert(lm, number) for number in range(2)]
    for name, each in zip(NAMES, made, strict=True):
        adapters.place(lm, each, name)
    return [ModelGenerator(lm, name) for name in NAMES]


def mixture_of(lm: LanguageModel, weights: tuple[float, ...], rows: int) -> Mixture:
    """Return a fresh source of MOD's mixture for a batch of so many prompts."""
    constant = Constant(torch.tensor([weights]).repeat(rows, 1))
    return Mixture(NextToken(SideBySide(lm, NAMES)), len(NAMES), constant, "logit")


@pytest.mark.parametrize("small", [True, False], ids=["folded", "switched"])
def test_every_token_is_drawn_from_the_mixture(make_lm: Make, monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    """Teacher forcing without caches, one expert at a time, must give the log-probabilities of the sampler."""
    if not small:
        monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10)
    lm, weights = make_lm(), (0.3, 0.7)
    experts = on_model(lm)
    prompts = lm.encode(PROMPTS)
    numbers = uniforms(3, range(len(PROMPTS)), 8)
    drawn = sample(lm, prompts, numbers, temperature=0.8, source=mixture_of(lm, weights, len(prompts)))
    width = drawn.response_mask.shape[1]
    place = (drawn.attention_mask.cumsum(-1) - 1).clamp_min(0)
    parts = []
    for each in experts:
        lm.model.set_adapter(each.adapter)
        with torch.no_grad():
            out = lm.model(input_ids=drawn.input_ids, attention_mask=drawn.attention_mask, position_ids=place)
        parts.append(out.logits[:, -(width + 1) : -1].log_softmax(-1))
    mixture = ((weights[0] * parts[0] + weights[1] * parts[1]) / 0.8).log_softmax(-1)
    wanted = mixture.gather(-1, drawn.input_ids[:, -width:].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(drawn.logps, wanted * drawn.response_mask, rtol=1e-4, atol=1e-4)
    assert float((parts[0] - parts[1]).abs().max()) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.0], ids=["sampling", "greedy"])
@pytest.mark.parametrize("small", [True, False], ids=["folded", "switched"])
def test_one_hot_and_identical_experts_give_the_expert(
    make_lm: Make, monkeypatch: pytest.MonkeyPatch, small: bool, temperature: float
) -> None:
    if not small:
        monkeypatch.setattr(side_by_side, "MERGE_BELOW", 10)
    lm = make_lm()
    first, second = on_model(lm)
    limits = Sampling(max_new_tokens=10, seed=5, batch_size=3, temperature=temperature)

    def answers(generator: MixedGenerator | ModelGenerator) -> tuple[list[str], int]:
        made = generator.generate(PROMPTS, range(len(PROMPTS)), limits)
        return made.responses, made.tokens

    alone = answers(first), answers(second)
    assert alone[0] != alone[1]
    assert answers(MixedGenerator(lm, NAMES, (1.0, 0.0))) == alone[0]
    assert answers(MixedGenerator(lm, NAMES, (0.0, 1.0))) == alone[1]
    assert answers(MixedGenerator(lm, [NAMES[1]] * 2, (0.4, 0.6))) == alone[1]
    between = answers(MixedGenerator(lm, NAMES, (0.5, 0.5)))
    assert between not in alone
    assert answers(MixedGenerator(lm, NAMES, (0.5, 0.5))) == between  # and nothing was left behind


@pytest.mark.slow
def test_what_a_mixture_says_of_its_answers_is_the_mixture_s_own(make_lm: Make) -> None:
    """Each expert reads the answer alone; their log-probabilities are combined and normalised at every token."""
    lm, weights = make_lm(), (0.3, 0.7)
    experts = on_model(lm)
    made = MixedGenerator(lm, NAMES, weights).generate(PROMPTS, range(4), SAMPLING)
    traces = made.traces
    assert traces is not None and traces.vocabulary is lm.tokenizer
    assert sum(map(len, traces.ids)) == made.tokens
    for prompt, ids, logp in zip(lm.encode(PROMPTS), traces.ids, traces.logps, strict=True):
        combined = torch.zeros(len(ids), len(lm.tokenizer))
        for each, weight in zip(experts, weights, strict=True):
            lm.model.set_adapter(each.adapter)
            with torch.no_grad():
                out = lm.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            combined += weight * out.log_softmax(-1)
        wanted = combined.log_softmax(-1)[range(len(ids)), ids].sum()
        assert logp == pytest.approx(float(wanted), abs=1e-3)
    alone = experts[0].generate(PROMPTS, range(4), SAMPLING).traces
    one_hot = MixedGenerator(lm, NAMES, (1.0, 0.0)).generate(PROMPTS, range(4), SAMPLING).traces
    assert alone is not None and one_hot is not None and one_hot.logps == alone.logps


def test_greedy_takes_the_likeliest_token_of_the_mixture(make_lm: Make) -> None:
    lm, weights = make_lm(), (0.5, 0.5)
    on_model(lm)
    ids, mask = pad_left(lm.encode(PROMPTS), lm.pad, lm.device)
    parts = []
    for name in ("expert0", "expert1"):
        lm.model.set_adapter(name)
        with torch.no_grad():
            place = (mask.cumsum(-1) - 1).clamp_min(0)
            parts.append(lm.model(input_ids=ids, attention_mask=mask, position_ids=place).logits[:, -1].log_softmax(-1))
    wanted = (0.5 * parts[0] + 0.5 * parts[1]).argmax(-1)
    numbers = uniforms(0, range(len(PROMPTS)), 1)
    drawn = sample(lm, lm.encode(PROMPTS), numbers, 0.0, source=mixture_of(lm, weights, len(PROMPTS)))
    assert drawn.input_ids[:, -1].tolist() == wanted.tolist()


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch_and_shares_random_numbers(make_lm: Make) -> None:
    lm = make_lm()
    on_model(lm)
    generator = MixedGenerator(lm, NAMES, (0.5, 0.5))
    together = generator.generate(PROMPTS, range(4), SAMPLING).responses
    apart = [generator.generate([text], [row], SAMPLING).responses[0] for row, text in enumerate(PROMPTS)]
    assert together == apart
    # Weights that hardly differ, on the same numbers: nearly every sample is the same one.
    rows, at_once = range(40), replace(SAMPLING, batch_size=40)
    near = [
        MixedGenerator(lm, NAMES, (share, 1 - share)).generate(PROMPTS * 10, rows, at_once).responses
        for share in (0.5, 0.5001)
    ]
    other = generator.generate(PROMPTS * 10, rows, replace(at_once, seed=6)).responses
    assert np.mean([a == b for a, b in zip(*near, strict=True)]) > 0.9
    assert np.mean([a == b for a, b in zip(near[0], other, strict=True)]) < 0.5


def test_rows_that_have_ended_leave_every_expert_of_a_mixture(make_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    on_model(lm)

    def made(above: float) -> tuple[Samples, int]:
        monkeypatch.setattr(sampler, "KEEP_ABOVE", above)
        source = mixture_of(lm, (0.4, 0.6), len(PROMPTS))
        drawn = sample(lm, lm.encode(PROMPTS), uniforms(0, range(40), 10), repeat=10, source=source)
        return drawn, source.source.cache.layers[0].keys.shape[0]

    (stay, all_rows), (leave, rows) = made(0.0), made(0.999)
    assert rows < all_rows == 80
    assert torch.equal(stay.input_ids, leave.input_ids) and torch.equal(stay.finished, leave.finished)
    torch.testing.assert_close(leave.logps, stay.logps, atol=1e-6, rtol=0)


def test_mixing_leaves_the_base_untouched(make_lm: Make) -> None:
    lm = make_lm()
    on_model(lm)
    generator = MixedGenerator(lm, NAMES, (0.5, 0.5))
    with reference_mode(lm):
        before = lm.model(IDS).logits
    generator.generate(PROMPTS, range(4), SAMPLING)
    with reference_mode(lm):
        assert torch.equal(lm.model(IDS).logits, before)


def test_repeated_rows_read_the_prompt_once(make_lm: Make) -> None:
    lm = make_lm()
    on_model(lm)
    prompts, numbers = lm.encode(PROMPTS[:2]), uniforms(1, range(4), 6)
    once = sample(lm, prompts, numbers, repeat=2, source=mixture_of(lm, (0.5, 0.5), 2))
    repeated = [prompts[0], prompts[0], prompts[1], prompts[1]]
    twice = sample(lm, repeated, numbers, source=mixture_of(lm, (0.5, 0.5), 4))
    torch.testing.assert_close(once.logps, twice.logps)
    assert torch.equal(once.input_ids, twice.input_ids)


def test_the_plain_path_is_the_direct_source(make_lm: Make) -> None:
    lm = make_lm()
    given = generate(lm, PROMPTS, range(4), SAMPLING, source=lambda places: NextToken(lm.model))
    plain = generate(lm, PROMPTS, range(4), SAMPLING)
    assert given.responses == plain.responses and given.tokens == plain.tokens
    assert given.traces is not None and plain.traces is not None and given.traces.logps == plain.traces.logps


# -- what cannot be mixed --------------------------------------------------------------------------------------------


def test_mixing_refuses_what_is_no_mixture(make_lm: Make) -> None:
    lm = make_lm()
    with pytest.raises(ValueError, match="not be 0"):
        MixedGenerator(lm, NAMES, (0.0, 0.0))
    with pytest.raises(ValueError, match="shorter"):
        MixedGenerator(lm, NAMES, (1.0,))

"""The sampler: exact distributions, its log-probabilities, common random numbers, padding, end tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase

from moalign.lm import sampler
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.log_probs import token_outputs
from moalign.lm.sampler import (
    Generated,
    Samples,
    Sampling,
    Traces,
    cut,
    draw,
    generate,
    pad_left,
    responses,
    sample,
    uniforms,
)

PROMPTS = ["how do i make soup today ?", "soup", "tell me how to burn dry leaves with my kids ."]
STEPS = 12


def drawn(lm: LanguageModel, texts: list[str] = PROMPTS, repeat: int = 1, **more: float) -> Samples:
    rows = range(len(texts) * repeat)
    return sample(lm, lm.encode(texts), uniforms(7, rows, STEPS), repeat=repeat, **more)


# -- one token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-38, 1e-300])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    token, logp = draw(logits, torch.tensor([0.999]), temperature, 1.0)
    assert token.tolist() == [1]
    assert logp.item() == pytest.approx(2 - np.log(1 + np.exp(1) + np.exp(2)))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draw_follows_the_softmax_by_chi_square(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=12) * 1.5
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    count = 20_000
    numbers = torch.from_numpy(np.random.default_rng(2).random(count))
    tokens, logps = draw(torch.tensor(logits).expand(count, -1), numbers, temperature, 1.0)
    result = np.bincount(tokens.numpy(), minlength=12)
    assert chisquare(result, expected * count).pvalue > 1e-3
    np.testing.assert_allclose(logps.numpy(), np.log(expected)[tokens.numpy()], atol=1e-5)
    # The same counts against the other temperature fail, so the test can.
    other = np.exp(logits / (1.7 - temperature)) / np.exp(logits / (1.7 - temperature)).sum()
    assert chisquare(result, other * count).pvalue < 1e-6


@given(
    logits=st.lists(st.floats(-4, 4), min_size=2, max_size=8),
    temperature=st.sampled_from([0.5, 0.7, 1.0, 2.0]),
)
@settings(deadline=None, max_examples=60)
def test_even_numbers_give_exactly_the_softmax(logits: list[float], temperature: float) -> None:
    """Inverse distribution: 1,000 evenly spaced numbers hit every token its share of times, give or take one."""
    numbers = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens, _ = draw(torch.tensor(logits).expand(1000, -1), numbers, temperature, 1.0)
    weights = np.exp(np.array(logits) / temperature)
    np.testing.assert_allclose(np.bincount(tokens, minlength=len(logits)), 1000 * weights / weights.sum(), atol=1.01)
    assert (tokens.diff() >= 0).all()  # one number, one place: common random numbers


def test_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]))
    for number, token in ((0.0, 1), (0.2499, 1), (0.2501, 3), (1 - 2**-53, 3)):
        for top_p in (1.0, 0.99):
            result, logp = draw(logits, torch.tensor([number], dtype=torch.float64), 1.0, top_p)
            assert result.item() == token
            assert logp.item() == pytest.approx(np.log([0.25, 0.75][token // 3]), abs=1e-5)


@pytest.mark.parametrize("size", [257, 512, 1000, 5000])
def test_large_vocabularies_draw_what_a_plain_search_draws(size: int) -> None:
    """Tokens, chunks and ends without mass are never drawn; the others have exactly their share."""
    logits = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).float()
    logits[0] = logits[-1] = logits[size // 2] = -torch.inf
    if size == 1000:
        logits[256:512] = -torch.inf
    count = 4000
    numbers = torch.cat(
        [torch.arange(count, dtype=torch.float64) / count, torch.tensor([1 - 2**-53], dtype=torch.float64)]
    )
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    expected = torch.searchsorted(cumulative, numbers * cumulative[-1], right=True)
    tokens, logps = draw(logits.expand(count + 1, -1), numbers, 1.0, 1.0)
    # Single precision moves a boundary between tokens by about 1e-7 of the whole.
    near = (cumulative[None, :] - numbers[:, None]).abs().min(-1).values < 1e-6
    assert torch.equal(tokens[~near], expected[~near]) and near.float().mean() < 0.5
    assert (tokens.diff() >= 0).all()
    torch.testing.assert_close(logps, torch.log_softmax(logits, -1)[tokens])
    assert logps.isfinite().all()
    assert tokens[0] == 1 and tokens[-1] == size - 2


NUCLEI = [(0.01, {2}), (0.45, {2}), (0.55, {2, 0}), (0.85, {2, 0, 3}), (0.99, {0, 1, 2, 3})]


@pytest.mark.parametrize(("top_p", "kept"), NUCLEI)
def test_top_p_keeps_exactly_the_nucleus(top_p: float, kept: set[int]) -> None:
    probs = np.array([0.3, 0.05, 0.5, 0.15])
    numbers = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logps = draw(torch.tensor(np.log(probs)).expand(4000, -1), numbers, 1.0, top_p)
    assert set(tokens.tolist()) == kept
    share = np.where([i in kept for i in range(4)], probs, 0)
    share /= share.sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 4000, share, atol=1 / 2000)
    np.testing.assert_allclose(logps.numpy(), np.log(probs[tokens.numpy()]), atol=1e-5)  # the policy's, not the cut's


def test_greedy_takes_the_most_likely_token_whatever_the_number() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    for number in (0.0, 0.999):
        tokens, logps = draw(logits, torch.full((2,), number), 0.0, 1.0)
        assert tokens.tolist() == [1, 0]
        torch.testing.assert_close(logps, torch.log_softmax(logits, -1)[[0, 1], [1, 0]])


# -- whole responses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_a_fresh_pass(lm: LanguageModel, temperature: float) -> None:
    """What training computes on the same rows, without cache, is what the sampler said."""
    rows = drawn(lm, repeat=6, temperature=temperature)
    again = token_outputs(lm.model, rows.input_ids, rows.attention_mask, rows.response_mask, temperature)
    torch.testing.assert_close(again.logps, rows.logps, atol=1e-4, rtol=0)
    assert (rows.logps[rows.response_mask] < 0).all()
    assert rows.tokens == int(rows.response_mask.sum()) > 0


def test_a_row_does_not_depend_on_its_batch(lm: LanguageModel) -> None:
    together = drawn(lm)
    width = together.response_mask.shape[1]
    numbers = uniforms(7, range(3), STEPS)
    for i, ids in enumerate(lm.encode(PROMPTS)):
        alone = sample(lm, [ids], numbers[i : i + 1])
        length = int(alone.response_mask.sum())
        assert int(together.response_mask[i].sum()) == length
        assert together.input_ids[i, -width:][:length].tolist() == alone.input_ids[0, len(ids) :].tolist()
        torch.testing.assert_close(together.logps[i, :length], alone.logps[0], atol=1e-4, rtol=0)


def test_repeat_is_the_same_as_asking_again_and_again(lm: LanguageModel) -> None:
    repeated = drawn(lm, repeat=4)
    apart = drawn(lm, [text for text in PROMPTS for _ in range(4)])
    assert torch.equal(repeated.input_ids, apart.input_ids)
    assert torch.equal(repeated.attention_mask, apart.attention_mask)
    assert torch.equal(repeated.response_mask, apart.response_mask)
    torch.testing.assert_close(repeated.logps, apart.logps, atol=1e-4, rtol=0)


def test_numbers_depend_on_seed_and_row_alone() -> None:
    table = uniforms(3, [5, 0, 5], 8)
    assert table.shape == (3, 8) and table.dtype == torch.float64
    assert torch.equal(table[0], table[2]) and not torch.equal(table[0], table[1])
    assert torch.equal(uniforms(3, [0], 8)[0], table[1])
    assert torch.equal(uniforms(3, [0], 20)[0, :8], table[1])  # a longer response begins alike
    assert not torch.equal(uniforms(4, [0], 8)[0], table[1])
    assert ((table >= 0) & (table < 1)).all()


def test_first_tokens_follow_the_model(lm: LanguageModel) -> None:
    count = 3000
    ids = lm.encode(PROMPTS[:1])
    rows = sample(lm, ids, uniforms(11, range(count), 1), repeat=count)
    with torch.no_grad():
        expected = torch.softmax(lm.model(torch.tensor(ids)).logits[0, -1].double(), -1).numpy()
    result = np.bincount(rows.input_ids[:, -1], minlength=len(expected))
    common = expected * count >= 5
    pool = [*(result[common]), result[~common].sum()], [*(expected[common] * count), expected[~common].sum() * count]
    assert chisquare(*pool).pvalue > 1e-3


def test_greedy_equals_plain_decoding(lm: LanguageModel) -> None:
    rows = drawn(lm, temperature=0.0)
    for i, ids in enumerate(lm.encode(PROMPTS)):
        expected = list(ids)
        while len(expected) < len(ids) + STEPS and (len(expected) == len(ids) or expected[-1] != lm.eos):
            with torch.no_grad():
                expected.append(int(lm.model(torch.tensor([expected])).logits[0, -1].argmax()))
        assert rows.input_ids[i][rows.attention_mask[i].bool()].tolist() == expected


def test_end_token_ends_a_row(make_lm: Callable[..., LanguageModel]) -> None:
    """It counts as part of the response; padding follows and is masked everywhere."""
    lm = make_lm(end=6.0)
    rows = drawn(lm, repeat=40)
    width = rows.response_mask.shape[1]
    tokens = rows.input_ids[:, -width:]
    lengths = rows.response_mask.sum(1).tolist()
    assert min(lengths) < STEPS and len(set(lengths)) > 2
    for row, mask, logps, length in zip(tokens.tolist(), rows.response_mask, rows.logps, lengths, strict=True):
        assert mask.tolist() == [True] * length + [False] * (width - length)
        assert lm.eos not in row[: length - 1]
        assert row[length - 1] == lm.eos or length == STEPS
        assert row[length:] == [lm.pad] * (width - length)
        assert (logps[length:] == 0).all()
    texts = responses(lm, rows)
    assert all("<eos>" not in text and "<pad>" not in text for text in texts)
    assert any(text == "" for text in texts) == (1 in lengths)


def test_sampling_stops_when_every_row_has_ended(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm()
    with torch.no_grad():  # whatever came before, the end token comes next
        lm.model.lm_head.weight.zero_()
        lm.model.lm_head.weight[lm.eos] = 100 * lm.model.model.norm.weight
    forced = lm.model.forward

    def ended(**given: object) -> object:
        output = forced(**given)
        output.logits[..., lm.eos] = 1e4
        return output

    lm.model.forward = ended
    rows = drawn(lm)
    assert rows.response_mask.shape[1] == 1 and rows.tokens == 3
    assert responses(lm, rows) == ["", "", ""]


def test_any_end_id_ends_a_row_and_only_the_limit_leaves_it_unfinished(make_lm: Callable[..., LanguageModel]) -> None:
    lm = make_lm(end=6.0)
    before = drawn(lm, repeat=40)
    common = int(before.input_ids[:, -before.response_mask.shape[1]].mode().values)
    lm.end_ids = frozenset({lm.eos, common})
    rows = drawn(lm, repeat=40)
    width = rows.response_mask.shape[1]
    last = []
    for row, length, finished in zip(rows.input_ids[:, -width:], rows.response_mask.sum(1), rows.finished, strict=True):
        ids = row[:length].tolist()
        assert not {lm.eos, common} & set(ids[:-1])
        assert bool(finished) == (ids[-1] in (lm.eos, common))
        assert finished or length == STEPS
        last.append(ids[-1])
    assert {lm.eos, common} < set(last)
    assert rows.tokens < before.tokens


class Recorded(sampler.NextToken):
    """Tells how many rows it reads at each step."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__(lm.model, hidden=True)
        self.read_rows: list[int] = []

    def read(self, ids: torch.Tensor, mask: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        self.read_rows.append(len(ids))
        return super().read(ids, mask, place)


def sliding(tokenizer: PreTrainedTokenizerBase) -> LanguageModel:
    """A model whose cache forgets: attention looks back six tokens."""
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, sliding_window=6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[2] *= 6
    return wrap(model, tokenizer, "sliding", "s" * 16, device="cpu")


@pytest.mark.parametrize("kind", ["whole", "sliding"])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_rows_that_have_ended_leave_the_batch_and_nothing_else_changes(
    make_lm: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch, kind: str, share: float
) -> None:
    lm = make_lm(end=6.0)
    if kind == "sliding":
        lm = sliding(lm.tokenizer)

    def made(above: float) -> tuple[Samples, list[int]]:
        monkeypatch.setattr(sampler, "KEEP_ABOVE", above)
        source = Recorded(lm)
        numbers = uniforms(7, range(len(PROMPTS) * 20), STEPS)
        return sample(lm, lm.encode(PROMPTS), numbers, repeat=20, source=source), source.read_rows

    (stay, all_rows), (leave, fewer) = made(0.0), made(share)
    assert set(all_rows[1:]) == {60}
    alive = [60, *(stay.response_mask.sum(1)[:, None] > torch.arange(1, STEPS)).sum(0).tolist()]
    assert fewer[1:] != all_rows[1:] and all(read >= count for read, count in zip(fewer[1:], alive[1:], strict=False))
    if share > 0.9:
        assert fewer[1:] == [count for count in alive[1:] if count]
    for name in ("input_ids", "attention_mask", "response_mask", "finished"):
        assert torch.equal(getattr(stay, name), getattr(leave, name))
    torch.testing.assert_close(leave.logps, stay.logps, atol=1e-6, rtol=2e-6)
    assert stay.hidden is not None and leave.hidden is not None
    torch.testing.assert_close(leave.hidden, stay.hidden, atol=1e-5, rtol=0)
    with torch.no_grad():  # each state is the one that its token was drawn from
        logits = lm.model.lm_head(leave.hidden)
    width = leave.response_mask.shape[1]
    again = torch.log_softmax(logits, -1).gather(-1, leave.input_ids[:, -width:, None])[..., 0]
    torch.testing.assert_close(again[leave.response_mask], leave.logps[leave.response_mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [32, 16], ids=["one width", "states narrower than layers"])
def test_states_are_kept_of_a_model_that_calls_a_part_of_its_body(lm: LanguageModel, width: int) -> None:
    """OPTForCausalLM calls the decoder of its OPTModel; that of OPT-350M ends in states narrower than its layers."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=lm.model.config.vocab_size, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=width, do_layer_norm_before=width == 32, init_std=0.3, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    opt = wrap(OPTForCausalLM(config), lm.tokenizer, "opt", "o" * 16, device="cpu")
    rows = sample(opt, lm.encode(PROMPTS), uniforms(7, range(6), STEPS), repeat=2, hidden=True)
    assert rows.hidden is not None and rows.hidden.shape[-1] == width == sampler.state_width(opt.model)
    with torch.no_grad():  # each state is the one that its token was drawn from
        logits = opt.model.lm_head(rows.hidden)
        again = token_outputs(opt.model, rows.input_ids, rows.attention_mask, rows.response_mask, hidden=True)
    drawn_from = torch.log_softmax(logits, -1).gather(-1, rows.input_ids[:, -logits.shape[1] :, None])[..., 0]
    torch.testing.assert_close(drawn_from[rows.response_mask], rows.logps[rows.response_mask], atol=1e-4, rtol=0)
    assert again.hidden is not None
    torch.testing.assert_close(rows.hidden[rows.response_mask], again.hidden[rows.response_mask], atol=1e-4, rtol=0)


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[5], [6, 7, 8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


def test_sampler_leaves_no_gradient_and_no_cache(lm: LanguageModel) -> None:
    first, second = drawn(lm), drawn(lm)
    assert not first.logps.requires_grad
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.logps, second.logps)


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("yes . Human: more", ("Human:",), "yes ."),
        ("a b c", ("c", "b"), "a"),
        ("a b c", ("b", "c"), "a"),
        ("stop here", ("stop",), ""),
        ("\n\nHuman: more", ("\n\nHuman:",), ""),
        ("x a b c", ("b c", "a b"), "x"),
        (" no marker ", ("x",), "no marker"),
        ("kept whole", (), "kept whole"),
    ],
)
def test_cut_at_the_first_stop_text(text: str, stop: tuple[str, ...], left: str) -> None:
    assert cut(text, stop) == left


# -- batches -------------------------------------------------------------------------------------------

SAMPLING = Sampling(max_new_tokens=STEPS, seed=7, batch_size=64)


def test_generate_answers_in_order_whatever_the_batch_size(lm: LanguageModel) -> None:
    texts = PROMPTS * 4
    rows = list(range(len(texts)))
    made = generate(lm, texts, rows, SAMPLING)
    small = generate(lm, texts, rows, replace(SAMPLING, batch_size=5))
    whole = made.responses
    assert whole == small.responses and made.tokens == small.tokens
    assert len(set(whole)) > 6
    for i in (0, 7, 11):
        assert generate(lm, [texts[i]], [rows[i]], SAMPLING).responses == [whole[i]]
    backwards = generate(lm, texts[::-1], rows[::-1], SAMPLING)
    assert backwards.responses[::-1] == whole
    for other, turn in ((small, 1), (backwards, -1)):
        assert all(map(np.array_equal, traced(other).ids[::turn], traced(made).ids))
        assert traced(other).logps[::turn] == pytest.approx(traced(made).logps, abs=1e-3)


def test_generate_is_seeded(lm: LanguageModel) -> None:
    torch.manual_seed(1)
    first = generate(lm, PROMPTS, range(3), SAMPLING)
    torch.manual_seed(2)
    again = generate(lm, PROMPTS, range(3), SAMPLING)
    assert again.responses == first.responses and traced(again).logps == traced(first).logps
    assert generate(lm, PROMPTS, range(3), replace(SAMPLING, seed=8)).responses != first.responses
    assert generate(lm, PROMPTS, range(3, 6), SAMPLING).responses != first.responses


def test_generate_counts_end_tokens_and_cuts_at_stop(lm: LanguageModel) -> None:
    made = generate(lm, PROMPTS, range(3), SAMPLING)
    assert made.tokens == drawn(lm).tokens
    word = made.responses[0].split()[2]
    stopped = generate(lm, PROMPTS, range(3), replace(SAMPLING, stop=(word,)))
    assert stopped.tokens == made.tokens
    assert stopped.responses == [text.split(word)[0].strip() for text in made.responses]


def test_generate_cuts_long_prompts_on_the_left(lm: LanguageModel) -> None:
    words = PROMPTS[2].split()
    short = generate(lm, [" ".join(words[-3:])], [0], SAMPLING).responses
    assert generate(lm, [PROMPTS[2]], [0], replace(SAMPLING, max_prompt_tokens=4)).responses == short
    assert generate(lm, [PROMPTS[2]], [0], SAMPLING).responses != short


# -- what the policy thinks of its answers ---------------------------------------------------------------


def traced(made: Generated) -> Traces:
    assert made.traces is not None
    return made.traces


def read(lm: LanguageModel, prompt: str, ids: Sequence[int], temperature: float = 1.0) -> float:
    """Return log pi of a response's tokens: one plain pass without cache, mask or padding."""
    (head,) = lm.encode([prompt])
    with torch.no_grad():
        logits = lm.model(torch.tensor([[*head, *ids]])).logits[0].double() / temperature
    shares = torch.log_softmax(logits[len(head) - 1 : -1], dim=-1)
    return float(shares[range(len(ids)), list(ids)].sum())


@pytest.mark.parametrize("more", [{}, {"temperature": 0.7}, {"top_p": 0.6, "temperature": 0.8}, {"temperature": 0.0}])
def test_traces_are_the_sampled_tokens_and_what_a_plain_pass_says_of_them(
    lm: LanguageModel, more: dict[str, float]
) -> None:
    """A nucleus and greedy choice say which tokens are taken, not how likely the policy finds them."""
    sampling = replace(SAMPLING, batch_size=2, **more)
    texts = PROMPTS * 3
    made = generate(lm, texts, range(9), sampling)
    traces = traced(made)
    assert traces.vocabulary is lm.tokenizer
    assert sum(map(len, traces.ids)) == made.tokens and len({len(ids) for ids in traces.ids}) > 1
    for i, (text, ids, logp) in enumerate(zip(texts, traces.ids, traces.logps, strict=True)):
        alone = sample(lm, lm.encode([text]), uniforms(7, [i], STEPS), sampling.temperature, sampling.top_p)
        assert ids.tolist() == alone.input_ids[0, -alone.response_mask.shape[1] :].tolist()
        assert logp == pytest.approx(read(lm, text, ids, sampling.temperature or 1.0), abs=1e-3)


class ThreeTokens:
    """The end token (id 2), 5 and 6 have a quarter, a half and a quarter at every step."""

    state = None

    def read(self, ids: torch.Tensor, mask: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        shares = torch.zeros(len(ids), 8)
        shares[:, [2, 5, 6]] = torch.tensor([0.25, 0.5, 0.25])
        return shares.log() + 3.0  # logits are known up to a constant

    def repeat(self, times: int) -> None: ...

    def keep(self, rows: torch.Tensor) -> None: ...


def test_a_log_probability_by_hand(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """5, 6, end: 1/2 * 1/4 * 1/4. The second row ends at once: 1/4. The third is cut by the limit."""
    numbers = torch.tensor([[0.5, 0.9, 0.1, 0.5], [0.2, 0.5, 0.5, 0.5], [0.3, 0.74, 0.76, 0.5]])
    monkeypatch.setattr(sampler, "uniforms", lambda *given: numbers)
    made = generate(lm, ["go"] * 3, range(3), SAMPLING, source=lambda places: ThreeTokens())
    assert [ids.tolist() for ids in traced(made).ids] == [[5, 6, 2], [2], [5, 5, 6, 5]]
    assert traced(made).logps == pytest.approx(np.log([1 / 32, 1 / 4, 1 / 32]).tolist())
    assert traced(made).finished == [True, True, False]
    assert made.tokens == 8


def test_traces_end_where_the_first_stop_text_is_complete(lm: LanguageModel) -> None:
    whole = generate(lm, PROMPTS, range(3), SAMPLING)
    word = whole.responses[0].split()[2]
    cut_off = traced(generate(lm, PROMPTS, range(3), replace(SAMPLING, stop=(word,))))
    for row, (prompt, ids) in enumerate(zip(PROMPTS, traced(whole).ids, strict=True)):
        spoken = lm.tokenizer.decode(ids, skip_special_tokens=True).split()
        kept = spoken.index(word) + 1 if word in spoken else len(ids)
        assert cut_off.ids[row].tolist() == ids[:kept].tolist()
        assert cut_off.logps[row] == pytest.approx(read(lm, prompt, ids[:kept]), abs=1e-3)
        assert cut_off.finished[row] == (word in spoken or traced(whole).finished[row])
    assert len(cut_off.ids[0]) == 3 < len(traced(whole).ids[0])


def test_traces_are_picked_and_joined() -> None:
    def made(*numbers: int) -> Traces:
        return Traces(
            "words", [np.array([n]) for n in numbers], [-float(n) for n in numbers], [n == 2 for n in numbers]
        )

    both = Traces.joined([made(1, 2), made(3)])
    assert both is not None and both.vocabulary == "words"
    assert [ids.tolist() for ids in both.at([2, 0, 2]).ids] == [[3], [1], [3]]
    assert both.at([2, 0, 2]).logps == [-3.0, -1.0, -3.0]
    assert both.finished == [False, True, False] and both.at([1, 0]).finished == [True, False]
    assert Traces.joined([made(1), None]) is None and Traces.joined([]) is None

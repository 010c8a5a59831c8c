"""The sandbox's definition: prompts, contexts, phrases and the corpus prior, checked against the tables by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moalign.config.load import load_card
from moalign.data import splits
from moalign.tasks.sandbox import base, world
from moalign.tasks.sandbox.scorer import parse

CONTEXTS = [world.Context(domain, risk) for domain in range(4) for risk in range(4)]


def test_720_different_prompts_without_a_leak_between_splits() -> None:
    prompts = world.prompts()
    assert len(prompts) == 24 * 6 * 5 == len({splits.normalised(prompt) for prompt in prompts})
    for name in ("sandbox", "sandbox-cold", "sandbox-3", "sandbox-5"):
        card = load_card(name)
        parts = splits.split(prompts, card.splits)
        splits.check_leaks(parts)
        assert sorted(itertools.chain(*parts.values())) == sorted(prompts)
        assert len(parts["eval"]) >= card.evaluation.prompts


def test_contexts_are_read_off_prompts() -> None:
    assert world.context_of("how do i make soup today ?") == world.Context(0, 0)
    assert world.context_of("tell me how to make soup with my kids .") == world.Context(0, 1)
    assert world.context_of("any tips to climb a cliff with my kids ?") == world.Context(3, 3)
    assert world.context_of("what is love ?") == world.Context(-1, 1)
    counted = {world.context_of(prompt) for prompt in world.prompts()}
    assert counted == set(CONTEXTS)  # every domain meets every risk


def test_no_topic_or_tail_hides_inside_another() -> None:
    """Contexts are found by substring, so a topic inside another prompt would be misread."""
    for topic, (domain, risk) in world.TOPICS.items():
        for question, (tail, extra) in itertools.product(world.QUESTIONS, world.TAILS.items()):
            assert world.context_of(question.format(topic=topic, tail=tail)) == world.Context(domain, risk + extra)


def test_slot_rewards_by_hand() -> None:
    table = world.slot_rewards(world.Context(domain=1, risk=2))
    assert table.shape == (6, 5, 5)
    # "sure thing ,": (0.7, -0.6, 0.0); risk level 2 multiplies harmlessness by 1.3; 12 characters, 3 less than 15.
    assert table[0, 0] == pytest.approx([0.7, -0.6 * 1.3, 0.0, 0.3, 0.4])
    # the tool slot: the spade belongs to the garden, the pan does not, the duck to no domain.
    assert table[1, 1] == pytest.approx([1.0, -0.2 * 1.3, 0.0, -0.2, 0.0])
    assert table[1, 0] == pytest.approx([-0.4, -0.2 * 1.3, 0.0, 0.2, 0.0])
    assert table[1, 4] == pytest.approx([-0.4, 0.3 * 1.3, 0.8 * 0.7, -0.2, -0.1])
    assert world.slot_rewards(world.Context(-1, 1))[1, :, 0] == pytest.approx([-0.4] * 5)


@pytest.mark.parametrize("context", [*CONTEXTS, world.Context(-1, 1)])
def test_prior_is_a_positive_distribution_that_leans_to_the_right_tool(context: world.Context) -> None:
    prior = world.prior(context)
    assert prior.shape == (6, 5)
    assert prior.sum(axis=1) == pytest.approx(np.ones(6))
    assert (prior > 0).all()
    if context.domain >= 0:
        assert int(prior[world.TOOL_SLOT].argmax()) == context.domain


def test_prior_by_hand() -> None:
    # Slot 5 of risk level 0: logits 0.5 * (0.4 - 1) * harmlessness = -0.3 * (-0.3, 0, 0.7, 1.0, -0.2).
    weights = np.exp([0.09, 0.0, -0.21, -0.3, 0.06])
    assert world.prior(world.Context(2, 0))[5] == pytest.approx(weights / weights.sum())
    # Caution grows with risk: the most cautious phrase is likelier on a riskier topic.
    cautious = [world.prior(world.Context(2, risk))[5, 3] for risk in range(4)]
    assert cautious == sorted(cautious) and cautious[3] > 1.3 * cautious[0]


def test_every_response_is_enumerated_once_and_short() -> None:
    choices = world.all_choices()
    assert choices.shape == (15625, 6)
    assert len({tuple(choice) for choice in choices.tolist()}) == 15625
    texts = [world.response_text(tuple(choice)) for choice in choices.tolist()]
    assert len(set(texts)) == 15625
    assert max(len(text.split()) for text in texts) == 23


def test_responses_have_at_most_24_tokens_and_no_unknown_word() -> None:
    tokenizer = base.make_tokenizer()
    longest = 1  # the end token
    for slot in world.SLOTS:
        rows = tokenizer([phrase for phrase, _ in slot], add_special_tokens=False)["input_ids"]
        assert all(tokenizer.unk_token_id not in row for row in rows)
        longest += max(len(row) for row in rows)
    assert longest == 24
    for name in ("sandbox", "sandbox-cold", "sandbox-3", "sandbox-5"):
        assert longest <= load_card(name).generation.max_new_tokens


def test_prompts_with_preferences_and_tags_have_no_unknown_word() -> None:
    tokenizer = base.make_tokenizer()
    extra = ["[helpfulness 30.0% harmlessness 70.0% humor 0.5%] x", "<rm1_score> 1.2 <rm2_score> -0.3 <rm3_score> +4.0"]
    texts = [*world.prompts(), extra[0].removesuffix(" x"), extra[1], "helpfulness 0.3 harmlessness 0.7"]
    for row in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        assert tokenizer.unk_token_id not in row
    assert tokenizer.unk_token_id in tokenizer("zebra", add_special_tokens=False)["input_ids"]
    tags = tokenizer("<rm1_score>", add_special_tokens=False)["input_ids"]
    assert len(tags) == 1


def test_a_base_of_further_objectives_reads_them_and_numbers_other_words_as_before() -> None:
    few, more = base.make_tokenizer(["humor", "helpfulness"]), base.make_tokenizer(world.OBJECTIVES)
    assert few.get_vocab() == base.make_tokenizer().get_vocab()
    assert few.get_vocab().items() < more.get_vocab().items() and len(more) == len(few) + 4
    text = "[brevity 30.0% warmth 70.0%] <rm4_score> 1.2 <rm5_score> -0.3"
    assert more.unk_token_id not in more(text)["input_ids"] and few.unk_token_id in few(text)["input_ids"]


def test_decoding_gives_the_response_text_back() -> None:
    tokenizer = base.make_tokenizer()
    rng = np.random.default_rng(0)
    for choice in world.all_choices()[rng.integers(15625, size=50)].tolist():
        text = world.response_text(tuple(choice))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert parse(text) == (tuple(choice), 0)


def test_words_are_exactly_those_of_prompts_and_phrases() -> None:
    words = world.words()
    assert words == sorted(set(words))
    assert {"soup", "kids", "goggles", "?", ",", "."} <= set(words)
    assert "{topic}" not in words

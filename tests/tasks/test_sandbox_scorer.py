"""The exact scorers: hand-worked rewards of whole, broken and nonsensical responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.config.objectives import SandboxObjective
from moalign.core.errors import RequestError
from moalign.rewards.scorer import Scorer, build_scorer
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.scorer import SandboxScorer, parse, rewards

SAFE = "how do i make soup today ?"  # domain 0, risk 0: harmlessness x 0.4, humor x 1
RISKY = "tell me how to fell a tall tree with my kids ."  # domain 1, risk 3: harmlessness x 1.8, humor x 0.5
PHRASES = ["well ,", "use a hot pan", "take it slowly", "wear old clothes", "measure everything twice", "good luck ."]
WHOLE = " ".join(PHRASES)


def test_whole_response_by_hand() -> None:
    # helpfulness 0.0 + 1.0 (right tool) + 0.1 + 0.3 + 0.6 + 0.2
    # harmlessness (0.1 - 0.2 + 0.5 + 0.1 + 0.2 + 0.0) = 0.7, humor (0 + 0 - 0.1 + 0.1 - 0.2 + 0.1) = -0.1
    # characters 6, 13, 14, 16, 24, 11, each a tenth less than 1.5: brevity 0.9 + 0.2 + 0.1 - 0.1 - 0.9 + 0.4 = 0.6
    # warmth 0.0 + 0.0 + 0.5 + 0.3 - 0.1 + 0.6 = 1.3
    assert rewards(SAFE, WHOLE) == pytest.approx((2.2, 0.7 * 0.4, -0.1, 0.6, 1.3))
    # the pan is the wrong tool for a tree: helpfulness loses 1.4
    assert rewards(RISKY, WHOLE) == pytest.approx((0.8, 0.7 * 1.8, -0.1 * 0.5, 0.6, 1.3))


def test_missing_phrase_costs_one_and_a_half_and_its_own_worth() -> None:
    dropped = " ".join(PHRASES[:2] + PHRASES[3:])
    assert parse(dropped) == ((2, 0, -1, 1, 1, 1), 0)
    first, further = (2.2 - 0.1 - 1.5, (0.7 - 0.5) * 0.4 - 1.5, -0.1 + 0.1 - 1.5), (0.6 - 0.1 - 1.5, 1.3 - 0.5 - 1.5)
    assert rewards(SAFE, dropped) == pytest.approx((*first, *further))


def test_stray_word_costs_a_quarter_on_every_objective() -> None:
    assert parse(WHOLE + " soup") == ((2, 0, 2, 1, 1, 1), 1)
    expected = tuple(value - 0.25 for value in rewards(SAFE, WHOLE))
    for text in (f"soup {WHOLE}", f"{WHOLE} soup", WHOLE.replace("take", "soup take")):
        assert rewards(SAFE, text) == pytest.approx(expected)


def test_stray_inside_a_phrase_breaks_it() -> None:
    assert parse(WHOLE.replace("take it slowly", "take it soup slowly")) == ((2, 0, -1, 1, 1, 1), 4)


def test_repeated_phrase_counts_once_and_its_words_are_strays() -> None:
    assert parse(WHOLE.replace("take it slowly", "take it slowly take it slowly")) == ((2, 0, 2, 1, 1, 1), 3)
    # a second phrase of the same slot does not replace the first
    assert parse(WHOLE.replace("well ,", "well , better not ,")) == ((2, 0, 2, 1, 1, 1), 3)


def test_phrases_out_of_order() -> None:
    # the third slot's phrase first: slots 0 and 1 come too late, so their 2 + 4 words are strays
    text = " ".join([PHRASES[2], PHRASES[0], PHRASES[1], *PHRASES[3:]])
    assert parse(text) == ((-1, -1, 2, 1, 1, 1), 6)


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_response_misses_every_slot(text: str) -> None:
    assert parse(text) == ((-1,) * 6, 0)
    assert rewards(SAFE, text) == pytest.approx((-9.0, -9.0, -9.0, -9.0, -9.0))


def test_white_space_does_not_count_and_case_does() -> None:
    assert rewards(SAFE, "  " + WHOLE.replace(" ", "  \n")) == rewards(SAFE, WHOLE)
    assert parse(WHOLE.replace("well", "Well"))[0][0] == -1


def test_every_whole_response_equals_the_table() -> None:
    rng = np.random.default_rng(3)
    for prompt in (SAFE, RISKY, "what is love ?"):
        table = world.slot_rewards(world.context_of(prompt))
        for choice in world.all_choices()[rng.integers(15625, size=60)].tolist():
            expected = [sum(table[slot, phrase, m] for slot, phrase in enumerate(choice)) for m in range(5)]
            assert rewards(prompt, world.response_text(tuple(choice))) == pytest.approx(expected)


@given(st.lists(st.sampled_from([*world.words(), "zebra", "<unk>"]), max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_words_score_as_counted(words: list[str]) -> None:
    """Independent bookkeeping: filled slots' words and strays make up the text, and the sum follows."""
    filled, strays = parse(" ".join(words))
    used = sum(len(world.SLOTS[slot][phrase][0].split()) for slot, phrase in enumerate(filled) if phrase >= 0)
    assert used + strays == len(words)
    table = world.slot_rewards(world.context_of(RISKY))
    expected = -0.25 * strays + sum(
        table[slot, phrase] if phrase >= 0 else np.full(5, -1.5) for slot, phrase in enumerate(filled)
    )
    assert rewards(RISKY, " ".join(words)) == pytest.approx(tuple(expected))


def exact(name: str, **changes: bool) -> SandboxScorer:
    return SandboxScorer(SandboxObjective(name=name, kind="sandbox", **changes))


def test_scorers_pick_their_objective() -> None:
    for index, name in enumerate(world.OBJECTIVES):
        scorer = exact(name)
        assert scorer.name == name and scorer.maximise and scorer.cheap
        assert scorer.score([SAFE, RISKY], [WHOLE, ""]) == [rewards(SAFE, WHOLE)[index], -9.0]


def test_scorer_refuses_unequal_lengths_and_unknown_names() -> None:
    with pytest.raises(ValueError):
        exact("humor").score([SAFE, RISKY], [WHOLE])
    with pytest.raises(RequestError, match="did you mean 'humor'"):
        exact("humour")


def test_sandbox_objective() -> None:
    names = ("helpfulness", "humor")
    assert len({build_scorer(SandboxObjective(name=name, kind="sandbox"), Path()).revision for name in names}) == 2
    humor = build_scorer(SandboxObjective(name="humor", kind="sandbox"), Path())
    stored = build_scorer(SandboxObjective(name="humor", kind="sandbox", store=True), Path())
    assert isinstance(humor, Scorer)
    assert (humor.cheap, stored.cheap) == (True, False)
    with pytest.raises(RequestError, match="did you mean 'humor'"):
        build_scorer(SandboxObjective(name="humour", kind="sandbox"), Path())

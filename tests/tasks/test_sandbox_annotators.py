"""The sandbox's annotators: labels follow Bradley-Terry with the tastes that are told."""

from __future__ import annotations

import numpy as np
import pytest

from moalign.reward_models import calibration
from moalign.tasks.sandbox import annotators, base, world
from moalign.tasks.sandbox.scorer import rewards

PROMPTS = world.prompts()[::7]


def test_the_true_probability_by_hand() -> None:
    """One pair, one taste: sigma(w . (z(chosen) - z(rejected))), with z computed here from the world's own tables."""
    group = annotators.Group("g", (0.5, -0.25, 0.0), sharpness=2.0)
    (one,) = annotators.label([group], PROMPTS, 20, seed=3)
    sd = base.z_scale()[1]
    for prompt, chosen, rejected, chance in zip(one.prompts, one.chosen, one.rejected, one.chance, strict=True):
        better, worse = rewards(prompt, chosen), rewards(prompt, rejected)
        utility = 0.5 * (better[0] - worse[0]) / sd[0] - 0.25 * (better[1] - worse[1]) / sd[1]
        assert chance == pytest.approx(1 / (1 + np.exp(-2.0 * utility)))


@pytest.mark.slow
def test_labels_are_drawn_with_that_probability() -> None:
    (one,) = annotators.label([annotators.DIVERSE[0]], PROMPTS, 20_000, seed=1)
    chance = np.array(one.chance)
    # Of pairs labelled with certainty p the chosen one is right p of the time: the labels themselves are calibrated.
    delta = np.log(chance / (1 - chance))
    assert calibration.ece(delta, np.ones(len(delta))) < 0.01
    assert 0.6 < (chance > 0.5).mean() < 0.9
    assert (chance > 0.5).mean() == pytest.approx(np.maximum(chance, 1 - chance).mean(), abs=0.01)


def test_groups_disagree_as_much_as_they_are_said_to() -> None:
    def agreement(groups: tuple[annotators.Group, ...]) -> float:
        pairs = annotators.label(groups[:1], PROMPTS, 2000, seed=5)[0]
        utilities = [annotators.utilities(g, pairs.prompts, pairs.chosen, pairs.rejected) > 0 for g in groups]
        return float(np.mean([(utilities[0] == other).mean() for other in utilities[1:]]))

    assert agreement(annotators.ALIKE) == 1.0
    assert agreement(annotators.DIVERSE) < 0.75


def test_a_coin_has_no_taste() -> None:
    (one,) = annotators.label([annotators.Group("coin", (1, 1, 1), sharpness=0)], PROMPTS, 50, seed=0)
    assert set(one.chance) == {0.5}


def test_specialists_look_at_one_objective() -> None:
    groups = annotators.specialists(["humor", "helpfulness"], sharpness=1.5)
    assert [(g.name, g.weights, g.sharpness) for g in groups] == [
        ("humor", (0.0, 0.0, 1.0), 1.5),
        ("helpfulness", (1.0, 0.0, 0.0), 1.5),
    ]


def test_pairs_differ_come_from_the_corpus_and_depend_on_the_seed_alone() -> None:
    first = annotators.label(annotators.DIVERSE, PROMPTS[:2], 400, seed=9)
    again = annotators.label(annotators.DIVERSE, PROMPTS[:2], 400, seed=9)
    other = annotators.label(annotators.DIVERSE, PROMPTS[:2], 400, seed=10)
    assert [one.chosen for one in first] == [one.chosen for one in again] != [one.chosen for one in other]
    texts = set(annotators.world.response_text(tuple(c)) for c in world.all_choices())
    for one in first:
        assert len(one) == 400
        assert set(one.prompts) == set(PROMPTS[:2])
        assert all(a != b for a, b in zip(one.chosen, one.rejected, strict=True))
        assert set(one.chosen) | set(one.rejected) <= texts


def test_flipped_labels_are_those_of_none_turned_round_and_the_truth_stays() -> None:
    group = annotators.DIVERSE[:2]
    plain, some, more = (annotators.label(group, PROMPTS, 4000, seed=2, flipped=share) for share in (0, 0.1, 0.25))
    for one, two, three in zip(plain, some, more, strict=True):
        first, second, third = (list(zip(p.chosen, p.rejected, strict=True)) for p in (one, two, three))
        turned = [np.array([a != b for a, b in zip(first, other, strict=True)]) for other in (second, third)]
        assert turned[0].mean() == pytest.approx(0.1, abs=0.02)
        assert turned[1].mean() == pytest.approx(0.25, abs=0.03)
        assert not (turned[0] & ~turned[1]).any()  # a larger share turns round what a smaller one does, and more
        for pair, other, p, q, flip in zip(first, third, one.chance, three.chance, turned[1], strict=True):
            assert other == (pair[::-1] if flip else pair)
            assert q == pytest.approx(1 - p if flip else p)


@pytest.mark.slow
def test_thirty_two_thousand_pairs_hardly_repeat() -> None:
    (one,) = annotators.label(annotators.specialists(["helpfulness"]), world.prompts(), 32_000, seed=0)
    assert len(set(zip(one.prompts, one.chosen, one.rejected, strict=True))) > 31_990

"""The optimum by enumeration against closed forms: rewards add up over slots, so every slot has its own optimum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core import preferences
from moalign.pareto.front import nondominated
from moalign.tasks.sandbox import base, world
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs, optimum
from moalign.tasks.sandbox.scorer import rewards

GRID = preferences.grid(2, 10)
GRID_3 = preferences.grid(3, 4)
GRID_5 = preferences.grid(5, 2)
MEAN, SD = base.z_scale()
CONTEXTS = sorted({world.context_of(prompt) for prompt in world.prompts()}, key=lambda c: (c.domain, c.risk))
PROMPTS = world.prompts()[::31]  # 24 prompts of many domains and risks
TWO, THREE = [0, 1], [0, 1, 2]


def prompt_of(domain: int, risk: int) -> str:
    return next(prompt for prompt in world.prompts() if world.context_of(prompt) == world.Context(domain, risk))


def slot_argmax(context: world.Context, weights: Sequence[float], columns: list[int]) -> list[int]:
    """Per slot: the phrase of most utility; among equals, the one best on all objectives together."""
    table = world.slot_rewards(context)[..., columns] / SD[columns]
    choice = []
    for slot in table:
        utility = slot @ np.asarray(weights)
        equal = np.flatnonzero(utility >= utility.max() - 1e-12)
        choice.append(int(equal[slot[equal].sum(axis=1).argmax()]))
    return choice


def by_slots(prompts: Sequence[str], weights: Sequence[float], columns: list[int]) -> np.ndarray:
    """The optimum without KL, independently: one argmax a slot."""
    points = []
    for prompt in prompts:
        context = world.context_of(prompt)
        table = world.slot_rewards(context)
        choice = slot_argmax(context, weights, columns)
        points.append(sum(table[slot, phrase, columns] for slot, phrase in enumerate(choice)))
    return np.mean(points, axis=0)


def by_softmax(
    prompts: Sequence[str], weights: Sequence[float], columns: list[int], beta: float, priors: Sequence[np.ndarray]
) -> np.ndarray:
    """The optimum with KL and a reference that is independent over slots ``[6, 5]``: one softmax a slot."""
    points = []
    for prompt, prior in zip(prompts, priors, strict=True):
        table = world.slot_rewards(world.context_of(prompt))[..., columns]
        chance = prior * np.exp((table / SD[columns]) @ np.asarray(weights) / beta)
        chance /= chance.sum(axis=1, keepdims=True)
        points.append((chance[..., None] * table).sum(axis=(0, 1)))
    return np.mean(points, axis=0)


@pytest.mark.parametrize(("columns", "grid"), [(TWO, GRID), ([2, 0], GRID), (THREE, GRID_3), ([4, 0, 3, 1, 2], GRID_5)])
def test_enumeration_equals_one_argmax_a_slot(columns: list[int], grid: list[tuple[float, ...]]) -> None:
    found = optimum(PROMPTS, grid, columns, MEAN[columns], SD[columns])
    assert found.shape == (len(grid), len(columns))
    expected = np.array([by_slots(PROMPTS, weights, columns) for weights in grid])
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("columns", "grid"), [(TWO, GRID), (THREE, GRID_3)])
def test_with_kl_enumeration_equals_one_softmax_a_slot(
    columns: list[int], grid: list[tuple[float, ...]], beta: float
) -> None:
    priors = [world.prior(world.context_of(prompt)) for prompt in PROMPTS]
    found = optimum(PROMPTS, grid, columns, MEAN[columns], SD[columns], beta)
    expected = np.array([by_softmax(PROMPTS, weights, columns, beta, priors) for weights in grid])
    np.testing.assert_allclose(found, expected, atol=1e-4)  # the tie-break tilts by 1e-6 / beta


def test_with_kl_and_a_given_reference() -> None:
    """The reference may depend on the prompt and on the preference; here it is drawn at random for each."""
    rng = np.random.default_rng(5)
    prompts, grid = PROMPTS[:5], GRID[::5]
    priors = {(prompt, weights): rng.dirichlet(np.ones(5), size=6) for prompt in prompts for weights in grid}
    choices = world.all_choices()

    def reference(prompt: str, weights: Sequence[float]) -> np.ndarray:
        prior = priors[prompt, tuple(weights)]
        return np.log(prior)[np.arange(6), choices].sum(axis=1)

    found = optimum(prompts, grid, TWO, MEAN[TWO], SD[TWO], 0.5, reference)
    expected = [by_softmax(prompts, w, TWO, 0.5, [priors[prompt, w] for prompt in prompts]) for w in grid]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_limits_of_beta() -> None:
    """A tiny beta gives the argmax, a huge one the reference's own mean."""
    hard = optimum(PROMPTS, GRID[3:4], TWO, MEAN[TWO], SD[TWO])
    np.testing.assert_allclose(optimum(PROMPTS, GRID[3:4], TWO, MEAN[TWO], SD[TWO], 1e-4), hard, atol=1e-6)
    plain = [np.exp(corpus_log_probs(c)) @ all_rewards(c)[:, TWO] for c in map(world.context_of, PROMPTS)]
    soft = optimum(PROMPTS, GRID, TWO, MEAN[TWO], SD[TWO], 1e7)
    np.testing.assert_allclose(soft, np.tile(np.mean(plain, axis=0), (11, 1)), atol=1e-5)


def test_reference_that_rules_responses_out() -> None:
    """Log-probability -inf is a response that the reference never gives: the optimum does not either."""
    only = np.full(15625, -np.inf)
    only[[0, 777]] = np.log(0.5)
    table = all_rewards(world.context_of(PROMPTS[0]))[[0, 777]][:, TWO]
    chance = np.exp(table @ (np.array([0.5, 0.5]) / SD[TWO]) / 2.0)
    found = optimum(PROMPTS[:1], [(0.5, 0.5)], TWO, MEAN[TWO], SD[TWO], 2.0, lambda *_: only)
    np.testing.assert_allclose(found[0], chance @ table / chance.sum(), atol=1e-5)


@pytest.mark.parametrize("context", [CONTEXTS[0], CONTEXTS[7], CONTEXTS[-1]])
def test_corpus_log_probs_and_rewards_are_those_of_the_texts(context: world.Context) -> None:
    assert np.exp(corpus_log_probs(context)).sum() == pytest.approx(1.0)
    prompt = prompt_of(context.domain, context.risk)
    for row in np.random.default_rng(0).integers(15625, size=40).tolist():
        choice = world.all_choices()[row]
        text = world.response_text(tuple(choice))
        assert all_rewards(context)[row] == pytest.approx(rewards(prompt, text))
        assert corpus_log_probs(context)[row] == pytest.approx(np.log(world.prior(context)[np.arange(6), choice]).sum())


def test_at_least_eight_distinct_optima_and_all_on_the_front() -> None:
    points = optimum(world.prompts(), GRID, TWO, MEAN[TWO], SD[TWO])
    assert len(np.unique(points.round(9), axis=0)) >= 8
    unique = np.unique(points.round(9), axis=0)
    assert nondominated(unique).all()
    assert (np.diff(points[:, 0]) >= 0).all() and (np.diff(points[:, 1]) <= 0).all()  # weights on helpfulness rise


def test_one_hot_optimum_is_not_dominated_by_a_neighbour() -> None:
    """At a corner several responses may be equally good for the one objective; the best on the other is taken."""
    for weights, column in (((1.0, 0.0), 0), ((0.0, 1.0), 1)):
        for context in CONTEXTS:
            raw = all_rewards(context)[:, TWO]
            best = raw[raw[:, column] >= raw[:, column].max() - 1e-12]
            found = optimum([prompt_of(context.domain, context.risk)], [weights], TWO, MEAN[TWO], SD[TWO])[0]
            assert found[1 - column] == pytest.approx(best[:, 1 - column].max())


def test_answers_depend_on_risk_and_on_domain() -> None:
    """At one weight the best response changes with the prompt, so a policy that ignores it cannot be optimal."""
    weights = (0.5, 0.5)
    by_risk = {tuple(slot_argmax(world.Context(1, risk), weights, TWO)) for risk in range(4)}
    assert len(by_risk) >= 3
    by_domain = {tuple(slot_argmax(world.Context(domain, 0), weights, TWO)) for domain in range(4)}
    assert len(by_domain) == 4
    points = [optimum([prompt_of(1, risk)], [weights], TWO, MEAN[TWO], SD[TWO])[0] for risk in range(4)]
    assert len(np.unique(np.round(points, 9), axis=0)) == 4


@pytest.mark.parametrize("weights", GRID)
def test_one_answer_to_all_prompts_stays_below_the_optimum(weights: tuple[float, ...]) -> None:
    """No response that ignores the prompt reaches the optimum (the corner of harmlessness has none to read)."""
    tilt = np.array(weights) / SD[TWO]
    fixed = np.mean([all_rewards(world.context_of(prompt))[:, TWO] @ tilt for prompt in PROMPTS], axis=0).max()
    best = float(optimum(PROMPTS, [weights], TWO, MEAN[TWO], SD[TWO])[0] @ tilt)
    if weights[0] == 0:
        assert fixed == pytest.approx(best)
    else:
        assert fixed < best - 1e-3


@pytest.mark.parametrize("context", CONTEXTS)
def test_no_response_is_optimal_for_all_preferences(context: world.Context) -> None:
    utilities = (all_rewards(context)[:, TWO] / SD[TWO]) @ np.array(GRID).T
    optimal = utilities >= utilities.max(axis=0) - 1e-9
    assert optimal.any(axis=0).all()
    assert not optimal.all(axis=1).any()
    assert optimal.sum(axis=1).max() <= 8


def best_utility(prompt: str, weights: Sequence[float], columns: list[int]) -> float:
    raw = all_rewards(world.context_of(prompt))[:, columns]
    return float(((raw / SD[columns]) @ np.asarray(weights)).max())


def utility(prompt: str, text: str, weights: Sequence[float], columns: list[int]) -> float:
    return float((np.array(rewards(prompt, text))[columns] / SD[columns]) @ np.asarray(weights))


def damaged(text: list[str], rng: np.random.Generator) -> list[list[str]]:
    """Every way to spoil six phrases: one dropped, one repeated, two swapped, a stray word, all of it twice."""
    drop = [text[:i] + text[i + 1 :] for i in range(6)]
    repeat = [text[: i + 1] + text[i:] for i in range(6)]
    swap = [[*text[:i], text[i + 1], text[i], *text[i + 2 :]] for i in range(5)]
    stray = [[*text[:i], str(rng.choice(world.words())), *text[i:]] for i in range(7)]
    return [*drop, *repeat, *swap, *stray, text + text, [], text[::-1]]


@pytest.mark.parametrize(("columns", "grid"), [(TWO, GRID), (THREE, GRID_3)])
def test_spoiling_the_best_response_always_costs(columns: list[int], grid: list[tuple[float, ...]]) -> None:
    rng = np.random.default_rng(1)
    for prompt in PROMPTS[::6]:
        for weights in grid[::2]:
            choice = slot_argmax(world.context_of(prompt), weights, columns)
            phrases = [world.SLOTS[slot][phrase][0] for slot, phrase in enumerate(choice)]
            best = best_utility(prompt, weights, columns)
            assert utility(prompt, " ".join(phrases), weights, columns) == pytest.approx(best)
            for words in damaged(phrases, rng):
                assert utility(prompt, " ".join(words), weights, columns) < best - 0.1


WORDS = [*world.words(), "zebra"]
PIECES = [*(phrase for slot in world.SLOTS for phrase, _ in slot), *WORDS]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=12),
    prompt=st.sampled_from(world.prompts()),
    weights=st.sampled_from(GRID_3),
)
@settings(deadline=None, max_examples=300)
def test_no_text_whatever_beats_the_optimum(pieces: list[str], prompt: str, weights: tuple[float, ...]) -> None:
    assert utility(prompt, " ".join(pieces), weights, THREE) <= best_utility(prompt, weights, THREE) + 1e-9


@pytest.mark.slow
@given(
    choice=st.tuples(*[st.integers(-1, 4)] * 6),
    strays=st.lists(st.sampled_from(WORDS), max_size=4),
    prompt=st.sampled_from(world.prompts()),
    weights=st.sampled_from(GRID),
)
@settings(deadline=None, max_examples=300)
def test_malformed_texts_stay_strictly_below(
    choice: tuple[int, ...], strays: list[str], prompt: str, weights: tuple[float, ...]
) -> None:
    """Slots left out and words added: strictly below the optimum unless the text is whole."""
    phrases = [world.SLOTS[slot][phrase][0] for slot, phrase in enumerate(choice) if phrase >= 0]
    value = utility(prompt, " ".join([*phrases, *strays]), weights, TWO)
    best = best_utility(prompt, weights, TWO)
    assert value <= best + 1e-9
    if min(choice) >= 0 and strays:
        assert value <= best - 0.25 / SD[TWO].max() + 1e-9
    if min(choice) < 0 and not strays:
        assert value < best - 0.1


def test_missing_is_worse_than_the_best_phrase_of_every_slot_for_every_preference() -> None:
    """What the comment in the world promises, for a fine grid and all five objectives."""
    for context in CONTEXTS:
        table = world.slot_rewards(context) / SD
        for weights in preferences.grid(5, 10):
            best = (table @ np.array(weights)).max(axis=1)
            missing = float((world.MISSING / SD) @ np.array(weights))
            assert (best > missing).all()

"""The optimum at a KL against closed forms, brute force, and the sandbox's own optimum, computed another way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moalign.config.load import load_card
from moalign.core import preferences
from moalign.tasks.frontier import Frontier
from moalign.tasks.load import make_task
from moalign.tasks.sandbox import base, world
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs, frontier, optimum

MEAN, SD = (values[:2] for values in base.z_scale())
GRID = preferences.grid(2, 4)
PROMPTS = world.prompts()[::31]  # 24 prompts of many domains and risks


def coin(heads: Sequence[float], worth: Sequence[float]) -> Frontier:
    """Prompts with two answers: the second has chance ``heads`` and utility ``worth``, the first has 0."""
    chance, utility = np.array(heads), np.array(worth)
    table = np.stack([np.zeros_like(utility), utility], axis=1)
    logs = np.log(np.stack([1 - chance, chance], axis=1))
    return Frontier(logs, table[..., None], table, np.full(len(heads), 1 / len(heads)))


def divergence(p: float, q: float) -> float:
    return sum(a * math.log(a / b) for a, b in ((p, q), (1 - p, 1 - q)) if a > 0)


def test_a_fair_coin_by_hand() -> None:
    """Chance 1 / (1 + exp(-1 / b)) of the better side: .75 at b = 1 / log 3, which is log 2 - H(.75) = .1308 nats."""
    found = coin([0.5], [1.0])
    kl, rewards = found.at(1 / math.log(3))
    assert rewards == pytest.approx([0.75]) and kl == pytest.approx(0.130812, abs=1e-6)
    assert found.at_kl(0.130812) == pytest.approx([0.75], abs=1e-3)
    assert found.at_kl(0.0) == pytest.approx([0.5], abs=1e-4)
    assert found.at_kl(-0.01) == pytest.approx([0.5], abs=1e-4)  # an estimate may be below 0
    assert found.at_kl(math.log(2)) == pytest.approx([1.0]) == found.at_kl(80.0)


def test_no_other_way_of_spending_the_same_kl_earns_more() -> None:
    """Two unlike prompts share one budget: all pairs of chances are tried, not the tilted ones alone."""
    heads, worth, budget = (0.3, 0.1), (1.0, 2.0), 0.25
    steps = np.linspace(0.0, 1.0, 1001)
    spent = [np.array([divergence(p, q) for p in steps]) for q in heads]
    allowed = np.add.outer(*spent) / 2 <= budget
    gained = np.add.outer(worth[0] * steps, worth[1] * steps) / 2
    best = gained[allowed].max()
    assert float(coin(heads, worth).at_kl(budget)[0]) == pytest.approx(best, abs=2e-3)


def test_mass_outside_the_answers_is_lost_to_the_optimum() -> None:
    """The reference gives neither answer in a fifth of the cases: whoever always answers is log(1 / .8) away."""
    found = Frontier(np.log([[0.4, 0.4]]), np.array([[[0.0], [1.0]]]), np.array([[0.0, 1.0]]), np.ones(1))
    assert found.at(1e4)[0] == pytest.approx(-math.log(0.8), abs=1e-6)
    assert found.at_kl(-math.log(0.4)) == pytest.approx([1.0])


def test_an_answer_that_the_reference_never_gives_is_out_of_reach() -> None:
    with np.errstate(divide="ignore"):
        logs = np.log([[0.5, 0.5, 0.0]])
    utility = np.array([[0.0, 1.0, 5.0]])
    found = Frontier(logs, utility[..., None], utility, np.ones(1))
    assert found.at_kl(9.0) == pytest.approx([1.0])
    assert found.at_kl(0.130812) == pytest.approx([0.75], abs=1e-3)
    assert found.at(1e-6) == (pytest.approx(math.log(2)), pytest.approx([1.0]))


def by_slots(prompts: Sequence[str], weights: Sequence[float], beta: float) -> tuple[float, np.ndarray]:
    """KL and rewards of the tilted corpus, independently: it is a product over slots, so one softmax a slot."""
    kls, points = [], []
    for prompt in prompts:
        prior, table = world.prior(world.context_of(prompt)), world.slot_rewards(world.context_of(prompt))[..., :2]
        chance = prior * np.exp((table / SD) @ np.asarray(weights) / beta)
        chance /= chance.sum(axis=1, keepdims=True)
        kls.append((chance * np.log(chance / prior)).sum())
        points.append((chance[..., None] * table).sum(axis=(0, 1)))
    return float(np.mean(kls)), np.mean(points, axis=0)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_sandboxs_frontier_is_one_softmax_a_slot(beta: float) -> None:
    for weights, found in zip(GRID, frontier(PROMPTS, GRID, [0, 1], MEAN, SD), strict=True):
        kl, rewards = by_slots(PROMPTS, weights, beta)
        assert found.at(beta)[0] == pytest.approx(kl, abs=1e-4)  # the tie-break tilts by 1e-6 / beta
        np.testing.assert_allclose(found.at(beta)[1], rewards, atol=1e-4)
        np.testing.assert_allclose(found.at_kl(kl), rewards, atol=1e-3)


def test_a_reference_that_minds_the_wording_is_that_of_the_optimum() -> None:
    """Against the enumeration of all responses, with random references of four prompts in two contexts."""
    of_context = {}
    for prompt in world.prompts():
        of_context.setdefault(world.context_of(prompt), []).append(prompt)
    prompts = [prompt for members in list(of_context.values())[:2] for prompt in members[:2]]
    rng = np.random.default_rng(3)
    logs = {prompt: np.log(rng.dirichlet(np.ones(15625))) for prompt in prompts}
    found = frontier(prompts, GRID, [0, 1], MEAN, SD, lambda chosen: [logs[prompt] for prompt in chosen])
    expected = optimum(prompts, GRID, [0, 1], MEAN, SD, 0.5, lambda prompt, _: logs[prompt])
    np.testing.assert_allclose([each.at(0.5)[1] for each in found], expected, atol=1e-9)


def test_prompts_of_a_context_stand_for_each_other() -> None:
    called: list[str] = []

    def corpus(prompts: Sequence[str]) -> list[np.ndarray]:
        called.extend(prompts)
        return [corpus_log_probs(world.context_of(prompt)) for prompt in prompts]

    prompts = world.prompts()[::7]
    (found,) = frontier(prompts, [(0.5, 0.5)], [0, 1], MEAN, SD, corpus)
    contexts = {world.context_of(prompt) for prompt in prompts}
    assert len(contexts) <= len(called) <= 2 * len(contexts) < len(prompts)
    kl, rewards = by_slots(prompts, (0.5, 0.5), 0.3)  # over all of them
    assert found.at(0.3)[0] == pytest.approx(kl, abs=1e-4)
    np.testing.assert_allclose(found.at(0.3)[1], rewards, atol=1e-4)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)])
def test_it_rises_bends_down_and_has_slope_beta(weights: tuple[float, float]) -> None:
    (found,) = frontier(PROMPTS, [weights], [0, 1], MEAN, SD)
    kls, rewards = found.curve()
    utility = rewards / SD @ np.array(weights)
    assert kls[0] == 0 and (np.diff(kls) >= 0).all() and (np.diff(utility) > -1e-9).all()
    apart = np.diff(kls) > 1e-4
    slopes = (np.diff(utility) / np.maximum(np.diff(kls), 1e-12))[apart]
    assert len(slopes) > 20 and (np.diff(slopes) < 1e-3).all()
    for beta in (2.0, 0.4, 0.1):
        (low, below), (high, above) = found.at(beta * 1.001), found.at(beta / 1.001)
        assert (above - below) / SD @ np.array(weights) / (high - low) == pytest.approx(beta, rel=1e-3)


def test_its_ends_are_the_reference_and_the_unregularised_optimum() -> None:
    plain = np.mean([np.exp(corpus_log_probs(c)) @ all_rewards(c)[:, :2] for c in map(world.context_of, PROMPTS)], 0)
    hard = optimum(PROMPTS, GRID, [0, 1], MEAN, SD)
    for found, best in zip(frontier(PROMPTS, GRID, [0, 1], MEAN, SD), hard, strict=True):
        np.testing.assert_allclose(found.at_kl(0.0), plain, atol=1e-3)
        np.testing.assert_allclose(found.at_kl(50.0), best, atol=1e-9)
        np.testing.assert_allclose(found.curve()[1][-1], best, atol=1e-9)


@pytest.mark.parametrize(
    "setting",
    [
        "task.generation.max_new_tokens=23",  # the end token of the longest response has no room
        "task.generation.temperature=0",
        "task.template.stop=[good]",
    ],
)
def test_where_the_bases_answers_are_others_nothing_is_known(tmp_path: Path, setting: str) -> None:
    task = make_task(load_card("sandbox", [setting]), tmp_path)
    assert task.frontier(task.grid) is None
    assert "language_model" not in vars(task)


def test_of_a_users_own_base_nothing_is_known(tmp_path: Path, random_base: Path) -> None:
    task = make_task(load_card("sandbox", [f"task.model={random_base}"]), tmp_path)
    assert task.frontier(task.grid) is None


def test_responses_are_in_the_order_of_the_choices() -> None:
    assert [tuple(row) for row in world.all_choices().tolist()] == list(itertools.product(range(5), repeat=6))

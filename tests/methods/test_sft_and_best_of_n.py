"""The unsteered base and best-of-n against their exact values on the sandbox.

The sandbox's base was trained on a corpus whose distribution over its 15,625 responses is known, so what the base
and the best of n of its samples obtain on average can be computed by enumeration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.evaluation.evaluate import Evaluation, evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.policies import policy
from moalign.tasks.sandbox import world
from moalign.tasks.sandbox.optimum import all_rewards, corpus_log_probs
from moalign.training.job import RunContext

BIAS = 0.015
"""How far the base's mean may lie from the corpus's, in normalised units (1 spans the middle 98 % of scores).

The base is only nearly the corpus: measured over 16 samples a prompt, its means lie at most 0.0053 away, and one
response in 200 has a stray or missing phrase. This is three times that: another seed trains another base. A
wrong choice of the best is off by more than 0.2, see :func:`test_the_tolerance_would_see_a_wrong_choice`.
"""


def best_of(n: int, utility: np.ndarray, chances: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Return E[raw of the best of n independent draws] ``[objectives]``, by order statistics.

    The best utility is at most v with probability F(v)^n; given it is v, the response is distributed as one draw is
    given utility v. With n = 1 this is the mean.
    """
    __, group = np.unique(utility.round(9), return_inverse=True)
    mass = np.bincount(group, chances)
    below = np.concatenate([[0.0], mass.cumsum() / mass.sum()]) ** n
    return np.asarray((np.diff(below)[group] * chances / mass[group]) @ raw)


def exact(context: RunContext, preference: Sequence[float], n: int) -> np.ndarray:
    """Return the exact mean of normalised scores over the evaluation prompts ``[objectives]``."""
    columns = [world.OBJECTIVES.index(name) for name in context.task.names]
    means = []
    for prompt in context.task.eval_prompts:
        place = world.context_of(prompt)
        raw = all_rewards(place)[:, columns]
        utility = context.task.normaliser.z(raw) @ np.asarray(preference)
        means.append(best_of(n, utility, np.exp(corpus_log_probs(place)), raw))
    return context.task.normaliser.unit(np.array(means)).mean(axis=0)


def evaluated(method: str, results: Path, *overrides: str) -> tuple[RunContext, Evaluation]:
    request = TrainRequest(method, overrides=("task.grid=3", "task.evaluation.samples=4", *overrides), results=results)
    run, _ = train(plan(request))
    plugin, context = context_of(run, results)
    return context, evaluate(plugin, context)


def assert_close(evaluation: Evaluation, wanted: list[np.ndarray]) -> None:
    """Each mean lies within its own 95 % interval, widened by :data:`BIAS`.

    The interval resamples prompts, so it also holds the spread between prompts, which the exact value shares: noise
    of sampling alone is several times smaller, and no extra width is needed against chance.
    """
    for point, mean in zip(evaluation.result.points, wanted, strict=True):
        found, bounds = np.array(point.mean), np.array(point.interval)
        half = (bounds[:, 1] - bounds[:, 0]) / 2
        assert (np.abs(found - mean) <= half + BIAS).all(), f"{point['prefs']}: {found} is not {mean} (half {half})"
        assert (half < 0.05).all()


def test_order_statistics_by_hand() -> None:
    # Of two draws from {0: .5, 1: .3, 2: .2} the best is 0 with .25, 1 with .64 - .25, 2 with 1 - .64.
    utility, chances = np.array([0.0, 1.0, 2.0]), np.array([0.5, 0.3, 0.2])
    assert best_of(2, utility, chances, utility[:, None]).tolist() == pytest.approx([0.39 + 0.72])
    assert best_of(1, utility, chances, utility[:, None]).tolist() == pytest.approx([0.7])
    # Ties: two responses of the same utility, three to one in chance.
    raw = np.array([[10.0], [20.0], [0.0]])
    assert best_of(3, np.array([1.0, 1.0, 0.0]), np.array([0.6, 0.2, 0.2]), raw).tolist() == pytest.approx(
        [(1 - 0.2**3) * 12.5]
    )


def test_order_statistics_against_simulation() -> None:
    rng = np.random.default_rng(0)
    raw, chances = rng.normal(size=(30, 2)), rng.dirichlet(np.ones(30))
    utility = raw @ [0.3, 0.7]
    drawn = rng.choice(30, size=(200_000, 4), p=chances)
    best = drawn[np.arange(len(drawn)), utility[drawn].argmax(axis=1)]
    assert best_of(4, utility, chances, raw) == pytest.approx(raw[best].mean(axis=0), abs=0.01)


@pytest.mark.slow
def test_the_base_obtains_the_corpus_mean(tmp_path: Path) -> None:
    context, evaluation = evaluated("sft", tmp_path, "steps=0")
    grid = context.task.grid
    assert_close(evaluation, [exact(context, preference, 1) for preference in grid])
    means = [point.mean for point in evaluation.result.points]
    assert means[0] == means[1] == means[2]  # unsteered: one sample serves every preference


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8])
def test_the_best_of_n_obtains_the_expected_maximum(tmp_path: Path, n: int) -> None:
    context, evaluation = evaluated("best-of-n", tmp_path, f"n={n}")
    assert_close(evaluation, [exact(context, preference, n) for preference in context.task.grid])
    rows = 128 * 4
    assert evaluation.result.cost.reward_calls == 3 * rows * n * 2  # what it scored to choose, not the judge's
    assert evaluation.result.cost.tokens_generated > rows * n * 10  # candidates are shared by the preferences


@pytest.mark.slow
def test_the_tolerance_would_see_a_wrong_choice(tmp_path: Path) -> None:
    context = context_of(train(plan(TrainRequest("best-of-n", results=tmp_path)))[0], tmp_path)[1]
    one_hot = (1.0, 0.0)
    right = exact(context, one_hot, 8)
    for wrong in (exact(context, one_hot, 1), exact(context, (0.0, 1.0), 8), exact(context, (0.5, 0.5), 8)):
        assert np.abs(right - wrong).max() > 0.2


# -- choosing --------------------------------------------------------------------------------------------------------


def test_it_keeps_the_candidate_of_the_highest_weighted_score(small_task: tuple[str, ...], tmp_path: Path) -> None:
    request = TrainRequest("best-of-n", overrides=(*small_task, "n=5"), results=tmp_path)
    run, _ = train(plan(request))
    method, context = context_of(run, tmp_path)
    prompts = context.task.eval_prompts
    limits = context.task.sampling(3)
    seen: list[list[list[str]]] = []
    for preference in ((1.0, 0.0), (0.2, 0.8)):
        best = method.policy(context, preference)
        choose: Any = best.choose

        def look(asked: Sequence[str], candidates: Any, choose: Any = choose) -> Any:
            seen.append([list(row) for row in candidates])
            return choose(asked, candidates)

        best.choose = look
        answers = policy.respond_all([best], prompts, limits).responses[0]
        for prompt, row, answer in zip(prompts, seen[-1], answers, strict=True):
            assert len(row) == 5
            utility = context.panel.z(context.panel.score([prompt] * 5, row)) @ np.array(preference)
            assert answer == row[int(utility.argmax())]
    assert seen[0] == seen[1]  # the same candidates for every preference


def test_best_of_one_is_the_base(small_task: tuple[str, ...], tmp_path: Path) -> None:
    def answers(method: str, *overrides: str) -> list[str]:
        run, _ = train(plan(TrainRequest(method, overrides=(*small_task, *overrides), results=tmp_path)))
        plugin, context = context_of(run, tmp_path)
        return plugin.policy(context, (0.5, 0.5)).respond(context.task.eval_prompts, context.task.sampling(3))

    assert answers("best-of-n", "n=1") == answers("sft", "steps=0")


@pytest.mark.slow
def test_sft_trains_on_the_bare_prompts(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.training import sft as engine

    rows: list[tuple[list[str], list[str]]] = []
    encode = engine.encode_rows
    monkeypatch.setattr(
        engine,
        "encode_rows",
        lambda lm, texts, answers, *rest: (rows.append((texts, answers)), encode(lm, texts, answers, *rest))[1],
    )
    made = plan(TrainRequest("sft", overrides=(*small_task, "steps=1", "batch=4"), results=tmp_path))
    train(made)
    scored = made.task.scored()
    assert rows == [(scored.prompts, scored.responses)]
    assert set(scored.prompts) <= set(made.task.prompts["train"])


def test_prompting_asks_the_base_with_the_preference(small_task: tuple[str, ...], tmp_path: Path) -> None:
    for style, wanted in (
        ("percent", "[helpfulness 30.0% harmlessness 70.0%] hi"),
        ("fraction", "[helpfulness 0.3 harmlessness 0.7] hi"),
    ):
        run, _ = train(plan(TrainRequest("prompting", overrides=(*small_task, f"style={style}"), results=tmp_path)))
        method, context = context_of(run, tmp_path)
        asked = method.policy(context, (0.3, 0.7))
        assert asked.render("hi") == wanted
        assert asked.generator is method.policy(context, (1.0, 0.0)).generator

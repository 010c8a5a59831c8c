"""Hindsight distillation: the best of n for drawn preferences, as training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moalign.core.errors import RequestError
from moalign.training import distil as engine
from moalign.training.distil import DistilConfig, best_of, distil, pools
from moalign.training.job import Job

MakeJob = Callable[..., Job]


def test_the_best_of_hand_written_scores() -> None:
    z = np.array([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]]] * 4)
    wanted = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.7, 0.3)]  # .7 * 1 = .7 against .6
    assert best_of(z, wanted).tolist() == [0, 1, 2, 0]


def test_of_equals_the_first() -> None:
    assert best_of(np.ones((1, 3, 2)), [(0.5, 0.5)]).tolist() == [0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 4))
def test_nothing_in_the_pool_is_better(seed: int, n: int, objectives: int) -> None:
    rng = np.random.default_rng(seed)
    z, wanted = rng.normal(size=(5, n, objectives)), rng.dirichlet(np.ones(objectives), size=5)
    for row, index in enumerate(best_of(z, wanted).tolist()):
        utilities = [sum(w * v for w, v in zip(wanted[row], z[row, j], strict=True)) for j in range(n)]
        assert utilities[index] >= max(utilities) - 1e-12


def test_a_pool_is_the_first_n_responses_of_each_prompt_and_costs_what_it_holds(make_job: MakeJob) -> None:
    job = make_job("hindsight")
    scored = job.task.scored()
    prompts, responses, z = pools(job, 3)
    assert sorted(set(prompts)) == sorted(set(scored.prompts))
    assert z.shape == (len(prompts), 3, 2)
    own = [i for i, prompt in enumerate(scored.prompts) if prompt == prompts[4]][:3]
    assert [response.text for response in responses[4]] == [scored.responses[i].text for i in own]
    assert z[4] == pytest.approx(job.panel.z(scored.raw[own]))
    assert job.meter.reward_calls == len(prompts) * 3 * 2


def test_more_than_the_task_has_is_refused(make_job: MakeJob) -> None:
    with pytest.raises(RequestError, match="17 scored responses a prompt asked for, but task .* has at most 16"):
        pools(make_job("hindsight"), 17)


def rows_of(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, where: str = "one", **changes: Any
) -> tuple[Job, list[str], list[str]]:
    job = make_job("hindsight", where=where)
    told: list[Any] = []
    monkeypatch.setattr("moalign.training.sft.train_sft", lambda *given: told.append(given))
    distil(job, job.task.language_model, DistilConfig(**{"steps": 40, "batch": 8, "n": 4, **changes}))
    _, _, texts, answers, _, phase = told[0]
    assert phase == engine.PHASE
    return job, texts, answers


def test_each_row_is_the_pools_best_answer_for_the_preference_written_in_it(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, texts, answers = rows_of(make_job, monkeypatch)
    assert len(texts) == len(answers) == 320
    prompts, responses, z = pools(job, 4)
    place = {prompt: i for i, prompt in enumerate(prompts)}
    agreeing = 0
    for text, answer in zip(texts, answers, strict=True):
        stated, prompt = text[1:].split("] ", 1)
        w = np.array([float(word[:-1]) for word in stated.split() if word.endswith("%")]) / 100
        x = place[prompt]
        agreeing += responses[x][int((z[x] @ w).argmax())] == answer
    assert agreeing >= 318  # the text rounds w to a tenth of a percent: a near tie may fall either way


def test_rows_depend_on_the_seed_alone(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    _, texts, answers = rows_of(make_job, monkeypatch)
    again = rows_of(make_job, monkeypatch, where="two")
    assert again[1:] == (texts, answers)
    assert len(set(texts)) > 300  # a preference is drawn afresh for every row

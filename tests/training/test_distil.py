"""Hindsight distillation: the best of n for drawn preferences, as training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.training import distil as engine
from moalign.training.distil import DistilConfig, distil, pools, tilted
from moalign.training.job import Job

MakeJob = Callable[..., Job]


def test_a_tilted_draw_follows_the_weights_of_the_scores() -> None:
    """exp(s / beta) of scores 0, log 2 and log 5 at beta 1 are 1, 2 and 5 of 8; at beta 1/2 they are squared: of 30."""
    s = np.tile(np.log([1.0, 2.0, 5.0]), (40_000, 1))
    rng = np.random.default_rng(0)
    assert np.bincount(tilted(s, 1.0, rng)) / len(s) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.01)
    assert np.bincount(tilted(s, 0.5, rng)) / len(s) == pytest.approx([1 / 30, 4 / 30, 25 / 30], abs=0.01)
    assert set(tilted(s[:50] * 1e6, 1e-3, rng).tolist()) == {2}  # no overflow


def test_tilted_draws_from_the_base_are_samples_of_the_closed_form() -> None:
    """With the base's own samples as pool the draw tends to base * exp(s / beta) / Z."""
    rng = np.random.default_rng(1)
    base, s_of = np.array([0.6, 0.3, 0.1]), np.array([0.0, 0.5, 1.0])
    pool = rng.choice(3, size=(20_000, 64), p=base)
    picked = pool[np.arange(len(pool)), tilted(s_of[pool], 0.5, rng)]
    closed = base * np.exp(s_of / 0.5)
    assert np.bincount(picked) / len(picked) == pytest.approx(closed / closed.sum(), abs=0.02)


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

"""``moalign eval`` of a policy that samples: its tokens, its seed, and what more samples are good for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moalign.evaluation.evaluate import evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train


def test_the_table_of_a_model_s_answers_holds_their_tokens(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run, _ = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path)))
    method, context = context_of(run, tmp_path)
    evaluate(method, context)
    table, codec = run.read_table("responses"), context.task.codec
    limit = context.task.card.generation.max_new_tokens
    assert codec.decode(table["ids"]) == table["response"].tolist()
    for ids, finished in zip(table["ids"], table["finished"], strict=True):
        assert finished == (ids[-1] in codec.ends.ids)
        assert finished or len(ids) == limit
    assert set(table["finished"]) == {True, False}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_answers(small_task: tuple[str, ...], tmp_path: Path) -> None:
    found = []
    for where in ("a", "b"):
        run, _ = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path / where)))
        found.append(evaluate(*context_of(run, tmp_path / where)))
    assert np.array_equal(found[0].scores, found[1].scores)


def test_more_samples_narrow_the_intervals(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """With a policy that samples: prompts differ less when each is the mean of several answers."""
    run, _ = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path)))
    opened_ = context_of(run, tmp_path)
    one, many = (evaluate(*opened_, samples=count) for count in (1, 8))
    spread = [float(result.scores.var(axis=0).mean()) for result in (one, many)]
    assert spread[1] < 0.5 * spread[0]

"""What answers are worth to groups of users: by hand, in the evaluation, and in the comparison's tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moalign.comparison.result import CompareResult
from moalign.evaluation import evaluate
from moalign.evaluation.result import EvalResult
from moalign.evaluation.user_groups import of_groups, worst
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.report import markdown, tables
from moalign.tasks.sandbox import annotators, world
from moalign.tasks.sandbox.base import z_scale
from tests.comparison.conftest import PUBLISHED

GROUPS = "task.sandbox.annotators={groups: diverse, pairs: 50, sharpness: 2}"


def test_the_worst_group_by_hand() -> None:
    """The smallest of each row is .1, .2 and -1: the second preference serves its worst-off group best."""
    assert worst(np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.25], [4.0, -1.0, 2.0]])) == 0.2


def test_a_group_is_worth_its_log_odds_over_the_average_answer() -> None:
    """One sd of helpfulness above it is worth 2 x 1 to eager ones, 2 x .6 to sober ones and nothing to careful ones."""
    mean, sd = (values[:3] for values in z_scale())
    groups = annotators.groups_of("diverse", world.OBJECTIVES, 2.0)
    found = annotators.worth(groups, np.stack([mean, mean + sd * [1, 0, 0]]))
    assert found == pytest.approx(np.array([[0] * 5, [2.0, 0.0, 0.0, 1.2, 0.8]]))


def test_it_agrees_with_what_annotators_label(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """The difference in worth of a pair's answers is the log odds of its label's true probability."""
    task = plan(TrainRequest("sft", task="sandbox-groups", overrides=(*small_task, GROUPS), results=tmp_path)).task
    for column, pairs in enumerate(task.pair_sets()):
        rewards = [task.panel.score(pairs.prompts, texts) for texts in (pairs.chosen, pairs.rejected)]
        chosen, rejected = (task.group_utilities(raw)[:, column] for raw in rewards)
        chance = np.array(pairs.chance)
        assert chosen - rejected == pytest.approx(np.log(chance / (1 - chance)))


def test_an_evaluation_says_how_badly_off_the_worst_group_is(small_task: tuple[str, ...], tmp_path: Path) -> None:
    request = TrainRequest("prompting", task="sandbox-groups", overrides=(*small_task, GROUPS), results=tmp_path)
    run, _ = train(plan(request))
    method, context = context_of(run, tmp_path)
    made = evaluate.evaluate(method, context)
    groups = made.result.groups
    assert groups is not None and groups.names == ("eager", "careful", "playful", "sober", "mild")
    raw = np.array([point.raw for point in made.result.points])
    assert np.array(groups.utilities) == pytest.approx(context.task.group_utilities(raw))
    at = [point.preference for point in made.result.points].index(groups.preference)
    assert groups.worst == pytest.approx(min(groups.utilities[at])) == pytest.approx(worst(np.array(groups.utilities)))
    assert groups.group == groups.names[int(np.argmin(groups.utilities[at]))]
    assert groups.worst_interval[0] < groups.worst < groups.worst_interval[1]
    stored = json.loads((run.path / "eval.json").read_text())
    assert stored["groups"]["worst_ci"] == list(groups.worst_interval)
    assert EvalResult.load(run.path / "eval.json").groups == groups


@pytest.mark.parametrize("more", [(), ("task.sandbox.annotators={groups: diverse}",)])
def test_a_task_that_knows_no_groups_has_no_key(small_task: tuple[str, ...], tmp_path: Path, more: tuple[str]) -> None:
    """No annotators named; or some who look at humor, which is no objective here."""
    run, _ = train(plan(TrainRequest("prompting", overrides=(*small_task, *more), results=tmp_path)))
    method, context = context_of(run, tmp_path)
    assert "groups" not in evaluate.evaluate(method, context).result.content
    assert of_groups(context.task, [(0.5, 0.5)], np.zeros((4, 1, 2))) is None


def test_the_table_has_a_column_where_a_row_has_it(tmp_path: Path) -> None:
    stored = CompareResult.load(PUBLISHED[0])
    assert not any("worst_group" in row for row in stored.content["rows"])
    assert "worst group" not in markdown.page(stored.content, tmp_path)
    stored.entries[0].worst_group = -0.123
    content = stored.content
    assert [row.get("worst_group") for row in content["rows"]][:2] == [-0.123, None]
    page = markdown.page(content, tmp_path)
    assert "worst group" in page and "-0.123" in page
    assert tables.METHODS["worst_group"].text(content["rows"][1]) == tables.NONE

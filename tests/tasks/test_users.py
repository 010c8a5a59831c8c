"""The users of a task: who labelled its pairs, in how many groups they may fall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moalign.config.load import load_card
from moalign.core.errors import RequestError
from moalign.tasks.load import make_task
from moalign.tasks.task import Task

CARD = """\
name: tales
kind: text
description: x
objectives:
  - {name: long, kind: rule, rule: length}
  - {name: late, kind: rule, rule: dialogue-share}
reference_point: [0, 0]
sensitivity_point: [0, 0]
splits: {train: 0.5, calibration: 0.25, eval: 0.25}
model: nowhere
data: {prompts: [hi], PAIRS}
"""


def of_pairs(folder: Path, pairs: str) -> Task:
    (folder / "task.yaml").write_text(CARD.replace("PAIRS", pairs))
    return make_task(load_card(folder / "task.yaml"), folder / "results")


def test_the_field_group_of_a_file_names_the_user(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"how {n} ?", "chosen": "a b", "rejected": f"{n}", "group": ("ann", "bo", "cy")[n % 3]}
        for n in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = of_pairs(tmp_path, f"pairs: {{path: {tmp_path / 'pairs.jsonl'}}}")
    assert [user.name for user in task.users] == ["ann", "bo", "cy"]
    assert 15 < sum(map(len, task.users)) < 45  # the training split's
    assert task.group_of_user is None and task.user_groups is None
    task.require_groups(3, "clusters")
    with pytest.raises(
        RequestError, match="clusters: found 4; allowed: 1 to 3, as task tales: 3 users label the pairs"
    ):
        task.require_groups(4, "clusters")


def test_a_card_without_pairs_has_no_users(tmp_path: Path) -> None:
    task = of_pairs(tmp_path, "pairs: null")
    with pytest.raises(RequestError, match=r"task tales: its card has no data\.pairs; needed: pairs whose field group"):
        task.require_groups(2, "clusters")

"""What a method's settings cannot have is refused before a run is made, and by ``check``."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan
from moalign.preflight import check

CASES = [
    ("modpo", "role=helpfull", "did you mean 'helpfulness'"),
    ("modpo", "role=helpfulness", "its weight on role helpfulness is 0; allowed: at least 0.05"),
    ("spo", "alpha=0.95", "the round of objective 1 would move by c = 0.025"),
    ("dpo-lw", "batch=1", "batch 1: every batch holds pairs of each of 2 objectives; allowed: at least 2"),
    ("raco", "batch=1", "batch 1: every batch"),
    ("mrpo", "batch=1", "batch 1: every batch"),
    ("bapo", "batch=1", "batch 1: every batch"),
    ("cpo", 'importance={"kindness": 1}', "unknown objective 'kindness'"),
]


@pytest.mark.parametrize(("method", "setting", "message"), CASES)
def test_refused_before_a_run_is_made_and_by_check(method: str, setting: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as refused:
        plan(TrainRequest(method, task="sandbox", overrides=[setting], results=tmp_path))
    assert message in str(refused.value)
    (problem,) = check.check(f"sandbox/{method}", [setting], tmp_path).problems
    assert message in problem
    assert not list(tmp_path.iterdir())


def test_what_other_preferences_can_have_is_not_refused(tmp_path: Path) -> None:
    """The role's weight is .05 or more at each; one objective of two counts; c = .5 - .9 x .5 = .05."""
    for method, setting, prefs in (
        ("modpo", "role=helpfulness", "0.5,0.5"), ("dpo-lw", "batch=1", "1,0"), ("spo", "alpha=0.9", "0.5,0.5")
    ):  # fmt: skip
        plan(TrainRequest(method, task="sandbox", overrides=[setting], prefs=[prefs], results=tmp_path))

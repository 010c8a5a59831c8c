"""``holdout``: which run a request with preferences held out of training is, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan


def test_a_holdout_makes_another_run_and_an_old_request_stays_the_same_run(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    def made(*overrides: str, **more: Any) -> Any:
        return plan(TrainRequest("sft", overrides=(*small_task, "steps=0", *overrides), results=tmp_path, **more))

    plain, held = made(), made("holdout=[[0.5, 0.5]]")
    assert "holdout" not in plain.identity
    assert plain.folder != held.folder
    assert held.given == [(0.0, 1.0), (1.0, 0.0)]
    assert made("holdout=[[0.5, 0.5]]", prefs=("0,1", "1,0")).folder == held.folder
    assert made(prefs=("0,1", "1,0")).folder != held.folder


def test_holding_out_everything_is_refused(small_task: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holdout: it holds every preference"):
        plan(TrainRequest("sft", overrides=(*small_task, "holdout=[[0.5, 0.5]]"), prefs=("0.5,0.5",), results=tmp_path))
    with pytest.raises(RequestError, match=r"holdout.*0.5,0.6.*sum to 1.1"):
        plan(TrainRequest("sft", overrides=(*small_task, "holdout=[[0.5, 0.6]]"), results=tmp_path))

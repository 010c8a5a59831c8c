"""Annotated pairs of the sandbox and a tiny backbone for reward-model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.config.card import SplitSpec
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.runs import RewardRequest, make
from moalign.reward_models.settings import RewardSettings

SHORT: dict[str, Any] = {
    "steps": 4,
    "batch": 6,
    "lr": 1e-2,
    "max_tokens": 96,
    "template": "{prompt} {response}",
    "checkpoint_every": 2,
    "log_every": 1,
    "splits": SplitSpec(train=0.6, calibration=0.2, eval=0.2),
}


@pytest.fixture(scope="session")
def labelled() -> Callable[..., list[PairSet]]:
    """``labelled(groups, count)``: pairs of the first ``groups`` diverse annotator groups."""
    from moalign.tasks.sandbox import annotators, world

    def make_pairs(groups: int = 2, count: int = 40, seed: int = 0) -> list[PairSet]:
        return annotators.label(annotators.DIVERSE[:groups], world.prompts(), count, seed)

    return make_pairs


@pytest.fixture
def ask(random_base: Path, tmp_path: Path, labelled: Callable[..., list[PairSet]]) -> Callable[..., RewardRequest]:
    """``ask(groups=2, where="a", **settings)``: a request for a reward model on the tiny random base."""

    def request(groups: int = 2, where: str = "a", count: int = 40, **settings: Any) -> RewardRequest:
        chosen = RewardSettings(**{**SHORT, "loss": "multitask" if groups > 1 else "bt", **settings})
        return make("toy", chosen, str(random_base), labelled(groups, count), results=tmp_path / where)

    return request

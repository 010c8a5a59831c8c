"""Annotated pairs of the sandbox and a tiny backbone for reward-model tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.config.card import SplitSpec
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.runs import RewardRequest, make, obtain
from moalign.reward_models.settings import RewardSettings
from moalign.runs.run import Run

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


@pytest.fixture(scope="session")
def request_in(random_base: Path, labelled: Callable[..., list[PairSet]]) -> Callable[..., RewardRequest]:
    """``request_in(results, groups=2, **settings)``: a request for a reward model on the tiny random base."""

    def request(results: Path, groups: int = 2, count: int = 40, **settings: Any) -> RewardRequest:
        chosen = RewardSettings(**{**SHORT, "loss": "multitask" if groups > 1 else "bt", **settings})
        return make("toy", chosen, str(random_base), labelled(groups, count), results=results)

    return request


@pytest.fixture
def ask(request_in: Callable[..., RewardRequest], tmp_path: Path) -> Callable[..., RewardRequest]:
    """``ask(groups=2, where="a", **settings)``: a request whose run is the test's own."""
    return lambda groups=2, where="a", **settings: request_in(tmp_path / where, groups, **settings)


@pytest.fixture(scope="session")
def trained(
    request_in: Callable[..., RewardRequest], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[RewardRequest, Run]]:
    """``trained(groups=2, **settings)``: a request and its finished run, trained once for all tests that read it."""
    results = tmp_path_factory.mktemp("trained")

    def obtained(groups: int = 2, **settings: Any) -> tuple[RewardRequest, Run]:
        request = request_in(results, groups, **settings)
        return request, obtain(request)[0]

    return obtained

"""The sandbox's tasks with their trained bases (cached by content), and how their bases answer a grid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moalign.config.load import load_card
from moalign.tasks.load import make_task
from moalign.tasks.sandbox.task import SandboxTask


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SandboxTask]:
    """Return a built-in task by name, made once; its base trains when the cache lacks it."""
    results = tmp_path_factory.mktemp("results")
    made: dict[str, SandboxTask] = {}

    def get(name: str) -> SandboxTask:
        if name not in made:
            task = make_task(load_card(name), Path(results))
            assert isinstance(task, SandboxTask)
            made[name] = task
        return made[name]

    return get


@pytest.fixture(scope="session")
def answers(sandbox: Callable[[str], SandboxTask]) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """Return the bare base's raw scores: asked with every preference ``[k, prompts, m]``, and plainly ``[prompts, m]``.

    Drawn as the judge draws: a prompt has the same random numbers whatever the preference.
    """
    from functools import partial

    from moalign.lm.generator import ModelGenerator
    from moalign.policies.policy import Policy, respond_all

    made: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def get(name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in made:
            task = sandbox(name)
            generator, prompts = ModelGenerator(task.language_model), task.eval_prompts
            policies = [Policy(generator, partial(task.renderer.preference, weights=w)) for w in task.grid]
            policies.append(Policy(generator, task.renderer.plain))
            replies = respond_all(policies, prompts, task.sampling(task.card.evaluation.seed)).responses
            raw = np.stack([task.panel.score(prompts, row) for row in replies])
            made[name] = (raw[:-1], raw[-1])
        return made[name]

    return get

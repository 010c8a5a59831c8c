"""Walks the registry: every method keeps the plugin contract, and trains and answers through the same code.

The run of seconds uses the method's own ``quick`` settings, so that a new method brings them in its one file.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from moalign.config.strict import Strict
from moalign.core.errors import RequestError
from moalign.evaluation import evaluate
from moalign.experiment import train
from moalign.experiment.train import TrainRequest
from moalign.methods import registry
from moalign.methods.base import Capabilities, Method

METHODS = registry.names()
MOST_LINES = 400
SMALL_TASK = (
    "task.grid=3",
    "task.evaluation.prompts=16",
    "task.evaluation.bootstrap=100",
    "task.pool.prompts=24",
    "task.pool.per_prompt=2",
    "task.pool.calibration_per_prompt=4",
)
SOURCE = re.compile(r"arXiv[: ]?\d{4}\.\d{4,5}|doi|Source: none|https?://", re.IGNORECASE)


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    found: Method = registry.get(request.param)
    return found


def source_file(method: Method) -> Path:
    return Path(inspect.getfile(type(method)))


def quick(method: Method) -> list[str]:
    """Return the method's quick settings as ``--set`` texts."""
    settings = getattr(method, "quick", None)
    assert isinstance(settings, dict), f"{method.name}: it needs 'quick', its settings for a run of seconds"
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def test_the_methods_of_this_version_are_there() -> None:
    assert {"sft", "prompting", "best-of-n", "ric", "mo-odpo"} <= set(METHODS)


def test_it_keeps_the_contract(method: Method) -> None:
    assert isinstance(method, Method)
    assert method.name in METHODS
    assert isinstance(method.capabilities, Capabilities)
    assert issubclass(method.Config, Strict)
    assert 10 <= len(method.summary) <= 100
    assert "\n" not in method.summary


def test_it_is_one_short_file_named_after_it(method: Method) -> None:
    path = source_file(method)
    assert path.stem == method.name.replace("-", "_")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_its_file_opens_with_the_source(method: Method) -> None:
    text = inspect.getdoc(sys.modules[type(method).__module__])
    assert text
    assert len(text.splitlines()) >= 3
    if method.capabilities.trains and method.name != "sft":  # plain supervised fine-tuning has no paper to name
        assert SOURCE.search(text), f"{method.name}: its module docstring names no paper"


def test_its_settings_have_valid_defaults_and_refuse_unknown_keys(method: Method) -> None:
    config = method.Config()
    assert method.Config.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValueError, match="no_such_setting"):
        method.Config.model_validate({"no_such_setting": 1})


def test_importing_it_imports_no_engine(method: Method) -> None:
    """Heavy imports stand inside functions: ``ls`` and ``show`` must stay quick."""
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "accelerate"}
    tree = ast.parse(source_file(method).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    assert not found & heavy


def test_it_trains_is_found_again_and_answers_any_preference_it_claims_to(method: Method, tmp_path: Path) -> None:
    request = TrainRequest(method=method.name, overrides=(*SMALL_TASK, *quick(method)), results=tmp_path)
    run, was_there = train.train(train.plan(request))
    assert (was_there, run.record.status) == (False, "done")
    assert run.record.seconds > 0
    if method.capabilities.trains:
        assert run.record.cost.tokens_trained > 0
        assert list(run.path.glob("adapter*/*.safetensors"))
    assert not [path for path in run.path.rglob("*") if path.suffix in {".bin", ".pt", ".pkl", ".pth"}]

    again, was_there = train.train(train.plan(request))
    assert (was_there, again.path) == (True, run.path)

    context = train.context_of(again, tmp_path)[1]
    result = evaluate.evaluate(method, context)
    assert result.scores.shape == (16, len(result.result.points), 2)
    assert np.isfinite(result.scores).all()
    assert result.result.optimal_share >= 0  # above 1 is possible: on a coarse grid a point may lie between optima

    unseen = (0.35, 0.65)
    if method.capabilities.steerable:
        answers = method.policy(context, unseen).respond(context.task.eval_prompts[:2], context.task.sampling(0))
        assert len(answers) == 2
        assert all(isinstance(answer, str) for answer in answers)
    else:
        with pytest.raises(RequestError, match="preference"):
            evaluate.evaluate(method, context, [unseen])

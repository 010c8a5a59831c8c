"""Samples of a stage that are kept part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from moalign.lm.generator import ModelGenerator
from moalign.policies import kept_samples
from moalign.policies import policy as policies
from moalign.policies.policy import Policy
from moalign.training.job import Job


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    return make_job("sft")


def test_parts_are_those_of_one_piece_and_outlive_an_interruption(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight prompts in parts of four, batches of one: interrupted in the second part, the first is not drawn again."""
    monkeypatch.setattr(kept_samples, "AT_LEAST", 3)
    sampling = replace(job.task.sampling(7, 1.0), batch_size=1)
    policy = Policy(ModelGenerator(job.task.language_model, "policy"), job.task.renderer.plain)
    prompts = (job.task.prompts["train"] * 9)[:9]
    whole = policies.respond_all([policy], prompts, sampling)
    respond_all, asked = policies.respond_all, []

    def counted(*given: Any, **more: Any) -> Any:
        asked.append(len(given[1]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return respond_all(*given, **more)

    monkeypatch.setattr(policies, "respond_all", counted)
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        kept_samples.sampled(job, "drawn", policy, prompts, sampling, told.append)
    assert asked == [4, 4] and sum(told) == 4
    kept = pd.read_parquet(job.run.path / "drawn-part-0.parquet")
    assert kept.attrs["seconds"] > 0
    kept.attrs.update({"seconds": 1000.0, "peak_memory_bytes": 2**50})  # as if it had been slow, and large
    kept.to_parquet(job.run.path / "drawn-part-0.parquet", index=False)
    before = job.meter.seconds
    responses, tokens = kept_samples.sampled(job, "drawn", policy, prompts, sampling, told.append)
    assert 1000 < job.meter.seconds - before < 1100 and job.meter.peak_memory_bytes == 2**50
    assert asked == [4, 4, 4, 1], "what is kept is not asked for"
    assert (responses, tokens) == (whole.records(0), whole.tokens)
    assert sum(told) == 4 + 9
    assert len({response.text for response in responses}) > 1
    kept_samples.forget(job, "drawn")
    assert not list(job.run.path.glob("drawn*"))

"""Stages of a training: the cost that a resumed job goes on from is that of the furthest one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moalign.runs.meter import Meter
from moalign.training.job import Job


def test_asking_for_an_earlier_stage_does_not_take_back_the_cost_of_a_later_one(make_job: Callable[..., Job]) -> None:
    """RiC asks for round 1, whose weights it goes on from, and then for the samples that round 1 was made of."""
    job = make_job("mo-odpo")
    job.meter.add_tokens_generated(10)
    job.notes["samples"] = 4
    job.finish_stage("sampling-1")
    job.meter.add_tokens_trained(1000)
    job.notes["samples"] = 7
    job.finish_stage("round-1")
    again = replace(job, meter=Meter(), notes={}, finished_here=set())
    assert again.stage_done("round-1") and again.stage_done("sampling-1") and not again.stage_done("round-2")
    assert (again.meter.tokens_generated, again.meter.tokens_trained) == (10, 1000)
    assert again.notes["samples"] == 7
    forwards = replace(job, meter=Meter(), notes={}, finished_here=set())
    assert forwards.stage_done("sampling-1") and forwards.meter.tokens_trained == 0
    assert forwards.stage_done("round-1") and forwards.meter.tokens_trained == 1000

"""What an online training logs: means over the rows that they are of, to the reference that the step had."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moalign.methods import mo_odpo
from moalign.training.job import Job
from moalign.training.means import Means, Some

MakeJob = Callable[..., Job]


def train(job: Job) -> None:
    mo_odpo.learn_from_pairs(job, job.task.language_model, job.config)


def test_means_by_hand() -> None:
    """Parts of a half and two quarters; of one kind of rows the first part has 3, the second none, the third 1."""
    means = Means()
    for share, loss, some in ((0.5, 2.0, Some(6.0, 3)), (0.25, 4.0, Some(0.0, 0)), (0.25, 0.0, Some(10.0, 1))):
        means.add({"loss": loss, "of some": some, "of none": Some(0.0, 0)}, share)
    assert means.taken(()) == {"loss": 2.0, "of some": 4.0}
    assert means.taken(()) == {}, "it has begun anew"


def test_entropies_by_objective_do_not_depend_on_the_micro_batch(make_job: MakeJob) -> None:
    """Means over the rows whose preference leans to the objective, of which a small part may have none."""
    lines = []
    for where, size in (("a", 64), ("b", 2)):
        job = make_job("mo-odpo", "batch=24", "steps=1", "log_every=1", f"micro_batch={size}", where=where)
        train(job)
        lines.append({k: v for k, v in job.run.metrics()[0].items() if k.startswith("entropy/")})
    assert lines[0].keys() == {f"entropy/{name}" for name in job.task.names}, "a seed at which both lead somewhere"
    assert lines[1] == pytest.approx(lines[0], abs=1e-5)


def test_the_kl_that_is_logged_is_to_the_reference_that_the_step_had(make_job: MakeJob) -> None:
    logged = []
    for where, sync in (("a", "null"), ("b", "2")):
        job = make_job(
            "mo-odpo", "batch=4", "samples=4", "steps=2", "lr=0.05", "log_every=2", "reference=start",
            f"ref_sync_steps={sync}", where=where,
        )  # fmt: skip
        train(job)
        logged.append(job.run.metrics()[0]["kl"])
    assert abs(logged[0]) > 0.01 and logged[1] == pytest.approx(logged[0])

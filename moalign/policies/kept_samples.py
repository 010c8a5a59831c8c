"""Samples that a stage draws in parts and keeps as they come: an interruption costs the part that was being drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moalign.core import processes
from moalign.core.records import Response
from moalign.tasks.responses import columns, from_columns

if TYPE_CHECKING:
    from moalign.lm.sampler import Sampling
    from moalign.policies.policy import Policy
    from moalign.training.job import Job

AT_LEAST = 2048
"""Samples of a part: few enough to lose, and a whole number of what a generator reads at once."""


def sampled(
    job: Job, name: str, policy: Policy, prompts: Sequence[str], sampling: Sampling, progress: Callable[[int], None]
) -> tuple[list[Response], int]:
    """Return a response to each prompt, and how many tokens were sampled; parts drawn before are read.

    The responses are those of ``respond_all([policy], prompts, sampling)``, of a policy that draws one sample a prompt.
    ``name`` tells them from others of the run; ``progress`` gets numbers of responses. Seconds and peak memory of parts
    that are read are counted by the job's meter; tokens are for the caller to count.
    """
    import pandas as pd

    from moalign.policies.policy import respond_all

    size = -(-AT_LEAST // (4 * sampling.batch_size)) * 4 * sampling.batch_size
    parts = {f"{name}-part-{start // size}": start for start in range(0, len(prompts), size)}
    kept = processes.agree([part for part in parts if _path(job, part).is_file()])
    responses: list[Response] = []
    tokens = 0
    for part, start in parts.items():
        own = prompts[start : start + size]
        if part in kept:
            table = job.run.read_table(part)
            responses, tokens = responses + from_columns(table), tokens + int(table.attrs["tokens"])
            job.meter.add_earlier(table.attrs["seconds"], table.attrs["peak_memory_bytes"])
            progress(len(own))
            continue
        started = time.monotonic()
        answers = respond_all([policy], own, sampling, progress, job.task.engine, first=start)
        table = pd.DataFrame(columns(answers.records(0)))
        cost = {"seconds": time.monotonic() - started, "peak_memory_bytes": job.meter.peak_memory_bytes}
        table.attrs.update({"tokens": answers.tokens, **cost})
        job.run.write_table(part, table)
        responses, tokens = responses + answers.records(0), tokens + answers.tokens
    return responses, tokens


def _path(job: Job, part: str) -> Path:
    return job.run.path / f"{part}.parquet"


def forget(job: Job, name: str) -> None:
    """Remove the parts of ``name``: what was made of them is in the run."""
    for part in job.run.path.glob(f"{name}-part-*.parquet"):
        part.unlink(missing_ok=True)

"""The answers of an evaluation: sampled once, and kept with their KL to base until all of them are judged.

So a judge that fails, or an interruption while scores are waited for, costs no answer: the same command goes on with
those that are there.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label
from moalign.core.progress import Progress, counted, silent
from moalign.core.text import visible
from moalign.evaluation import divergence
from moalign.evaluation.divergence import KlToBase
from moalign.methods.base import Method, policies_of
from moalign.tasks.responses import columns
from moalign.training.job import RunContext

if TYPE_CHECKING:
    import pandas as pd

UNJUDGED = "unjudged-"
"""Before the name of a table of answers while they are not judged."""


@dataclass
class Answered:
    """Answers to every evaluation prompt at every preference, in this order: preference, prompt, sample."""

    table: pd.DataFrame
    """Columns prompt, preference, those of :func:`~moalign.tasks.responses.columns`; once judged, each objective."""
    divergences: list[KlToBase]
    """How far the policy of each preference has moved from the base."""
    tokens_generated: int
    reward_calls: int
    """Scores by which the policies chose their answers."""
    seconds: float
    peak_memory_bytes: int | None
    """Of a GPU; None without one."""


def respond(
    method: Method,
    context: RunContext,
    preferences: Sequence[Preference],
    samples: int,
    name: str,
    progress: Progress = silent,
) -> Answered:
    """Answer every evaluation prompt at every preference ``samples`` times, and add one raw score per objective.

    ``name`` is that of the table of answers in the run, which says for which preferences and samples it is: those that
    wait under it to be judged are taken over.
    """
    import torch

    from moalign.runs.meter import device_peak_bytes, fresh_device_peak

    fresh_device_peak()  # training's is in its run's record
    answered = _waiting(context, name)
    if answered is None:
        answered = _sample(method, context, preferences, samples, progress)
        _keep(context, name, answered)
    table, started = answered.table, time.monotonic()
    # Loading a scorer may draw weights: the states of the global generators are restored afterwards.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        scoring = partial(progress, "scoring")
        raw = context.task.judge_panel.score(list(table["prompt"]), list(table["response"]), scoring, gaps=True)
    return replace(
        answered,
        table=table.assign(**{name: raw[:, column] for column, name in enumerate(context.task.names)}),
        seconds=answered.seconds + time.monotonic() - started,
        peak_memory_bytes=max(answered.peak_memory_bytes or 0, device_peak_bytes()) or None,
    )


def judged(context: RunContext, name: str) -> None:
    """Forget the answers that waited to be judged, if any do: their evaluation is there."""
    with contextlib.suppress(OSError):  # of a folder that is read-only by now
        (context.run.path / f"{UNJUDGED}{name}.parquet").unlink(missing_ok=True)


def _sample(
    method: Method, context: RunContext, preferences: Sequence[Preference], samples: int, progress: Progress
) -> Answered:
    import pandas as pd
    import torch

    from moalign.policies.policy import respond_all
    from moalign.runs.meter import Meter, device_peak_bytes

    prompts = [prompt for prompt in context.task.eval_prompts for _ in range(samples)]
    started, meter = time.monotonic(), Meter()
    # Scores by which a policy chooses its answer are a cost of answering; those of the evaluation are not.
    metered = replace(context, panel=context.panel.with_meter(meter))
    answered = counted(progress, "answering", len(prompts) * len(preferences))
    # Loading an adapter draws its initial weights: the states of the global generators are restored afterwards.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        policies = policies_of(method, metered, preferences)
        sampling = context.task.sampling(context.task.card.evaluation.seed)
        answers = respond_all(policies, prompts, sampling, answered, context.task.engine)
        divergences = divergence.from_base(context.task, policies, prompts, answers, sampling, progress)
    records = [response for k in range(len(preferences)) for response in answers.records(k)]
    table = pd.DataFrame(
        {
            "prompt": prompts * len(preferences),
            "preference": [label(w) for w in preferences for _ in prompts],
            **columns(records),
        }
    )
    seconds = time.monotonic() - started
    return Answered(table, divergences, answers.tokens, meter.reward_calls, seconds, device_peak_bytes() or None)


def _made_by(context: RunContext) -> dict[str, Any]:
    return {"card": context.task.hash, "engine": None if context.task.engine is None else "vllm"}


def _keep(context: RunContext, name: str, answered: Answered) -> None:
    table = answered.table.copy()
    notes: dict[str, Any] = {
        **_made_by(context),
        "kl": [[kl.nats, kl.bound] for kl in answered.divergences],
        "tokens_generated": answered.tokens_generated,
        "reward_calls": answered.reward_calls,
        "seconds": answered.seconds,
        "peak_memory_bytes": answered.peak_memory_bytes,
    }
    table.attrs.update(notes)
    context.run.write_table(f"{UNJUDGED}{name}", table)


def _waiting(context: RunContext, name: str) -> Answered | None:
    """Return answers that wait to be judged; None for none, and for those of another card or engine.

    None, too, for damaged ones, or those of another version, which are named on stderr.
    """
    path = context.run.path / f"{UNJUDGED}{name}.parquet"
    if not path.is_file():
        return None
    try:
        table = context.run.read_table(path.stem)
        notes: dict[str, Any] = {str(key): value for key, value in table.attrs.items()}
        made_by = {key: notes.pop(key, "") for key in ("card", "engine")}
        if made_by != _made_by(context):
            return None
        divergences = [KlToBase(nats, bound) for nats, bound in notes.pop("kl")]
        table.attrs = {}
        return Answered(table, divergences, **notes)
    except (RequestError, LookupError, TypeError, ValueError) as error:
        print(visible(f"warning: {path}: damaged, so these answers are sampled again ({error})"), file=sys.stderr)
        return None

"""How many responses a task has for its runs, before any is sampled or scored: what the cost of a run depends on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """Responses that a run asks its task for."""

    rows: int = 0
    """Responses, each scored on every objective."""
    sampled: int = 0
    """Of them sampled from the base; the others are the data's own."""

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.rows + other.rows, self.sampled + other.sampled)


@dataclass(frozen=True)
class SplitAmount:
    """The responses of one split."""

    of_prompts: tuple[int, ...] = ()
    """How many each prompt has."""
    by_base: bool = False
    """They are to be sampled from the base; else the data's own."""

    def first(self, per_prompt: int | None = None) -> Amount:
        """Return how many these are with at most ``per_prompt`` of each prompt; None: all."""
        rows = sum(count if per_prompt is None else min(count, per_prompt) for count in self.of_prompts)
        return Amount(rows, rows if self.by_base else 0)


@dataclass(frozen=True)
class Amounts:
    """The responses of a task; see :meth:`moalign.tasks.task.Task.amounts`."""

    objectives: int
    prompts: int | None = None
    """Different prompts to train on; None: not known."""
    train: SplitAmount = SplitAmount()
    calibration: SplitAmount = SplitAmount()
    labelled: tuple[int, ...] = ()
    """Pairs that the data labels for each objective."""
    for_scale: Amount = Amount()
    """What the normaliser is fitted on and short answers are told by: made once, for all runs."""

    def scored(self, per_prompt: int | None = None) -> Amount:
        """Return what :meth:`moalign.training.job.Job.scored` will give."""
        return self.train.first(per_prompt)

"""``moalign generate``: ask a finished run for answers at one preference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moalign.errors import RequestError
from moalign.methods.base import Method, RunContext
from moalign.preferences import Preference
from moalign.tasks.task import Say, silent
from moalign.workflow.evaluate import preferences_for

SHOWN = 3
"""Evaluation prompts answered when none is given."""


@dataclass(frozen=True)
class Answer:
    """One prompt, its answer, and what the task's panel says about it."""

    prompt: str
    response: str
    raw: dict[str, float]
    """Objective -> raw score, larger is better."""
    normalised: dict[str, float]
    """Objective -> score in normalised units."""

    def told(self) -> dict[str, Any]:
        """Return the answer for ``--json``."""
        return {"prompt": self.prompt, "response": self.response, "raw": self.raw, "normalised": self.normalised}


def generate(
    method: Method,
    context: RunContext,
    preference: Preference,
    prompts: Sequence[str] | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    say: Say = silent,
) -> list[Answer]:
    """Answer prompts at one preference and score the answers.

    Args:
        prompts: bare prompts; None takes the first evaluation prompts of the task.
        temperature: None takes the card's; 0 is greedy.
        seed: of sampling; None takes the evaluation's, so that its first answers come out again.

    Raises:
        RequestError: an empty prompt, or a preference that the method cannot serve.
    """
    preferences_for(method, context, [preference])
    if prompts is None:
        prompts = context.task.eval_prompts[:SHOWN]
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt.strip()), None)
    if empty is not None or not prompts:
        raise RequestError(f"PROMPT: prompt {empty} is empty; a text is needed" if empty else "PROMPT: no prompt given")
    context.task.say = say
    sampling = context.task.sampling(context.task.card.evaluation.seed if seed is None else seed, temperature)
    say("answering", 0, len(prompts))
    responses = method.policy(context, preference).respond(prompts, sampling)
    say("answering", len(prompts), len(prompts))
    raw = context.panel.score(prompts, responses, lambda done, total: say("scoring", done, total))
    unit = context.panel.unit(raw)
    names = context.task.names
    return [
        Answer(
            prompt,
            response,
            dict(zip(names, raw_row.tolist(), strict=True)),
            dict(zip(names, unit_row.tolist(), strict=True)),
        )
        for prompt, response, raw_row, unit_row in zip(prompts, responses, raw, unit, strict=True)
    ]

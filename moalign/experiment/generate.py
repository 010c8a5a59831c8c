"""``moalign generate``: ask a finished run for answers at one preference or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.evaluation.evaluate import preferences_for
from moalign.methods.base import Method
from moalign.training.job import RunContext

if TYPE_CHECKING:
    from moalign.policies.policy import Policy

SHOWN = 3
"""Evaluation prompts answered when none is given."""


@dataclass(frozen=True)
class Answer:
    """One prompt, its answer, and what the task's panel says about it."""

    prompt: str
    response: str
    preference: Preference
    raw: dict[str, float]
    """Objective -> raw score, larger is better."""
    normalised: dict[str, float]
    """Objective -> score in normalised units."""
    words: str | None = None
    """The card's words for the preference, where the policy read them."""

    def as_dict(self) -> dict[str, Any]:
        """Return the answer for ``--json``."""
        return {"prompt": self.prompt, "response": self.response, "raw": self.raw, "normalised": self.normalised}


def generate(
    method: Method,
    context: RunContext,
    wanted: Sequence[Preference],
    prompts: Sequence[str] | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> list[list[Answer]]:
    """Answer prompts at every preference wanted, in batched passes, and score the answers ``[preferences][prompts]``.

    A prompt draws from the same random numbers at every preference, those that it has when asked for one alone.

    Args:
        prompts: bare prompts; None takes the first evaluation prompts of the task.
        temperature: None takes the card's; 0 is greedy.
        seed: of sampling; None takes the evaluation's, so that its first answers come out again.

    Raises:
        RequestError: an empty prompt, or a preference that the method cannot serve.
    """
    from moalign.policies.policy import respond_all

    preferences_for(method, context, wanted)
    prompts = checked(context.task.eval_prompts[:SHOWN] if prompts is None else prompts)
    context.task.progress = progress
    sampling = context.task.sampling(context.task.card.evaluation.seed if seed is None else seed, temperature)
    progress("answering", 0, len(prompts))
    policies = [method.policy(context, w) for w in wanted]
    responses = respond_all(policies, prompts, sampling).responses
    progress("answering", len(prompts), len(prompts))
    asked, flat = [*prompts] * len(wanted), [text for row in responses for text in row]
    raw = context.panel.score(asked, flat, lambda done, total: progress("scoring", done, total))
    unit = context.panel.unit(raw)
    names, each = context.task.names, [w for w in wanted for _ in prompts]
    words = [
        _words(context, policy, w, prompt) for policy, w in zip(policies, wanted, strict=True) for prompt in prompts
    ]
    answers = [
        Answer(
            prompt,
            response,
            preference,
            dict(zip(names, raw_row.tolist(), strict=True)),
            dict(zip(names, unit_row.tolist(), strict=True)),
            text,
        )
        for prompt, response, preference, raw_row, unit_row, text in zip(
            asked, flat, each, raw, unit, words, strict=True
        )
    ]
    return [answers[start : start + len(prompts)] for start in range(0, len(answers), len(prompts))]


def checked(prompts: str | Sequence[str]) -> list[str]:
    """Return the prompts (a single text is one); raises RequestError for an empty one, or none at all."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    empty = next((number for number, text in enumerate(texts, start=1) if not text.strip()), None)
    if empty is not None or not texts:
        raise RequestError(f"PROMPT: prompt {empty} is empty; a text is needed" if empty else "PROMPT: no prompt given")
    return texts


def _words(context: RunContext, policy: Policy, preference: Preference, prompt: str) -> str | None:
    """Return the card's words for a preference if the policy reads them beside the prompt; else None."""
    if not context.task.card.template.words:
        return None
    renderer = context.task.renderer
    read = policy.render(prompt) == renderer.preference(prompt, preference)
    return renderer.preference_text(preference) if read else None

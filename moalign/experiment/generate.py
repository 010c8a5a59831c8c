"""``moalign generate``: ask a finished run for answers at one preference or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moalign.config.card import SourceSpec
from moalign.core.errors import RequestError, placed
from moalign.core.preferences import Preference
from moalign.core.progress import Progress, silent
from moalign.data.load import load_grouped_pairs
from moalign.data.readers import check_text
from moalign.evaluation.evaluate import preferences_for
from moalign.experiment.arguments import require_texts
from moalign.methods import registry
from moalign.methods.base import Infers, Method, policies_of, require_as_trained
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
    """Objective -> raw score, larger is better; NaN where an LLM judge left it out."""
    normalised: dict[str, float]
    """Objective -> score in normalised units."""
    words: str | None = None
    """The card's words for the preference, where the policy read them."""
    cut_tokens: int = 0
    """How many tokens the prompt lost at its beginning, since it is longer than the card's limit."""

    def as_dict(self) -> dict[str, Any]:
        """Return the answer for ``--json``."""
        return {name: getattr(self, name) for name in ("prompt", "response", "raw", "normalised", "cut_tokens")}


def generate(
    method: Method,
    context: RunContext,
    wanted: Sequence[Preference],
    prompts: str | Sequence[str] | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    progress: Progress = silent,
) -> list[Answer]:
    """Answer prompts in batched passes and score the answers: all at the first preference, then all at the next.

    A prompt draws from the same random numbers at every preference, those that it has when asked for one alone.

    Args:
        prompts: bare prompts; None takes the first evaluation prompts of the task.
        temperature: None takes the card's; 0 is greedy.
        seed: of sampling; None takes the evaluation's, so that its first answers come out again.

    Raises:
        RequestError: an empty prompt, or a preference that the method cannot serve.
    """
    from moalign.policies.policy import respond_all

    wanted = preferences_for(method, context, wanted)
    task = context.task
    texts = checked(task.eval_prompts[:SHOWN] if prompts is None else prompts)
    task.progress = progress
    sampling = task.sampling(task.card.evaluation.seed if seed is None else seed, temperature)
    progress("answering", 0, len(texts))
    policies = policies_of(method, context, wanted)
    responses = respond_all(policies, texts, sampling).responses
    progress("answering", len(texts), len(texts))
    rows = [
        (w, policy, prompt, response)
        for w, policy, of_policy in zip(wanted, policies, responses, strict=True)
        for prompt, response in zip(texts, of_policy, strict=True)
    ]
    raw = context.panel.score(
        [prompt for _, _, prompt, _ in rows],
        [response for *_, response in rows],
        partial(progress, "scoring"),
        gaps=True,
    )
    unit = context.panel.unit(raw)
    return [
        Answer(
            prompt,
            response,
            w,
            raw=dict(zip(task.names, raw[row].tolist(), strict=True)),
            normalised=dict(zip(task.names, unit[row].tolist(), strict=True)),
            words=_words(context, policy, w, prompt),
            cut_tokens=getattr(policy.render(prompt), "cut", 0),
        )
        for row, (w, policy, prompt, response) in enumerate(rows)
    ]


def infer(method: Method, context: RunContext, user: Path, progress: Progress = silent) -> Preference:
    """Return the preference that the pairs in a user's file show.

    Raises RequestError where the method reads none off pairs, and for a file that does not hold pairs of one user.
    """
    if not method.capabilities.infers:
        able = ", ".join(name for name in registry.names() if registry.get(name).capabilities.infers)
        raise RequestError(
            f"--user {user}: {method.name} reads no preference off pairs; allowed: methods that do ({able}); name it "
            "with --prefs"
        )
    if not user.is_file():
        raise RequestError(f"--user {user}: no such file; allowed: a file of pairs (prompt, chosen, rejected)")
    with placed("--user"):
        grouped = list(load_grouped_pairs(SourceSpec(path=str(user))))
    groups = list(dict.fromkeys(str(group) for group, _ in grouped))
    if len(groups) > 1:
        names = ", ".join(groups[:3])
        raise RequestError(f"--user {user}: found pairs of {len(groups)} users (group: {names}); allowed: those of one")
    for number, (_, pair) in enumerate(grouped, start=1):
        for name in ("chosen", "rejected"):
            if not getattr(pair, name).strip():
                raise RequestError(f"--user {user}: pair {number}: {name} is empty; a text is needed")
    require_as_trained(context)
    context.task.progress = progress
    return cast(Infers, method).infer(context, [pair for _, pair in grouped])


def checked(prompts: str | Sequence[str]) -> list[str]:
    """Return the prompts (a single text is one); RequestError for an empty one, one that is no text, or none at all."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    require_texts("PROMPT: prompt", texts)
    empty = next((number for number, text in enumerate(texts, start=1) if not text.strip()), None)
    if empty is not None or not texts:
        raise RequestError(f"PROMPT: prompt {empty} is empty; a text is needed" if empty else "PROMPT: no prompt given")
    for number, text in enumerate(texts, start=1):
        check_text(text, f"PROMPT: prompt {number}")
    return texts


def _words(context: RunContext, policy: Policy, preference: Preference, prompt: str) -> str | None:
    """Return the card's words for a preference if the policy reads them beside the prompt; else None."""
    if not context.task.card.template.words:
        return None
    renderer = context.task.renderer
    read = str(policy.render(prompt)) == str(renderer.preference(prompt, preference))
    return renderer.preference_text(preference) if read else None

"""The three kinds of record that tasks are made of: prompts, scored responses and preference pairs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def prompt_id(text: str) -> str:
    """Return the name of a prompt: the first 16 hex digits of the sha256 of its UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its id; :meth:`of` computes the id."""

    text: str
    id: str

    @classmethod
    def of(cls, text: str) -> Prompt:
        """Return the prompt with this text."""
        return cls(text, prompt_id(text))


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response to a prompt, with raw scores ``[objectives]`` as the data gives them.

    ``scores`` is None when the data scores nothing; a single None stands for an objective without a
    score. The direction (``maximise``) is not applied: that is the reward layer's work.
    """

    prompt: str
    response: str
    scores: tuple[float | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, of which people preferred ``chosen``."""

    prompt: str
    chosen: str
    rejected: str

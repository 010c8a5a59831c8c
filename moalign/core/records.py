"""Typed records of a task's data: prompts, responses, logged responses and preference pairs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Labels = Literal["order", "bradley-terry"]
"""How pairs built from scores are labelled: the higher score always wins, or with its Bradley-Terry probability."""


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
class LoggedResponse:
    """A response to a prompt that the data holds. Scores are the task's scorers' own, whatever else the data has."""

    prompt: str
    response: str
    finished: bool = True
    """False: a limit cut the response off (a column ``finished`` of the file says so)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, of which people preferred ``chosen``."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Response:
    """A response to one prompt: text from a file, or a sample with the tokens that it was sampled as."""

    text: str
    """From a file: as it stands there, a space before it included. Sampled: without white space around it."""
    ids: tuple[int, ...] | None = None
    """Token ids as sampled, the tokens that ended the response included; None: the text is not tokenised yet."""
    finished: bool = True
    """False: a limit cut the response off before its end."""

    @classmethod
    def of(cls, response: str | Response) -> Response:
        """Return a finished response for a bare text, a response as it is."""
        return cls(response) if isinstance(response, str) else response

    @property
    def shown(self) -> str:
        """The text that scorers and people read: without white space around it."""
        return self.text.strip()

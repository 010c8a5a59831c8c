r"""Dialogues in the form of HH-RLHF: turns that begin with ``\n\nHuman:`` and ``\n\nAssistant:``.

A preference pair of that data set is two whole dialogues that share a beginning. :func:`split_pair`
takes them apart so that ``prompt + reply`` is the dialogue again, character by character: the space
after ``Assistant:`` belongs to the reply, and nothing is stripped.
"""

from __future__ import annotations

from moalign.core.errors import RequestError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"


def split_pair(chosen: str, rejected: str, where: str = "pair") -> tuple[str, str, str]:
    """Split two dialogues into (shared prompt, chosen reply, rejected reply).

    The prompt ends with the last ``Assistant:`` marker that both dialogues share. A reply may hold
    further turns when the dialogues part before their last turn (rare in HH-RLHF); they are kept.
    Raises RequestError, beginning with ``where``, when the dialogues share no such marker.
    """
    parting = (index for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right)
    shared = chosen[: next(parting, min(len(chosen), len(rejected)))]
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise RequestError(
            f"{where}: chosen and rejected share no turn {ASSISTANT!r}, so their prompt is unknown; give a column "
            f"prompt or whole dialogues that begin alike; found {shorten(chosen)} and {shorten(rejected)}"
        )
    prompt = shared[: start + len(ASSISTANT)]
    return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)


def shorten(value: object, width: int = 60) -> str:
    """Return ``repr(value)`` cut to ``width`` characters, for messages."""
    # A huge text is cut before it is quoted, so that the message costs nothing.
    text = repr(value[: width + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= width + 2 else f"{text[:width]}..."

"""``moalign preview``: what a policy reads, token by token, what ends its answer, and what it is trained on.

Only the tokenizer and the generation config are loaded; nothing is sampled, trained or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moalign.config import load
from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.data.readers import check_text
from moalign.tasks.load import make_task

if TYPE_CHECKING:
    from moalign.lm.chat import Codec

STAND_IN = "This is an answer."
"""The response of the training row where none is given and the data has none for the prompt."""

Origin = Literal["given", "data", "stand-in"]


@dataclass(frozen=True)
class Preview:
    """One prompt and one training row."""

    task: str
    model: str
    objectives: list[str]
    prefs: list[float] | None
    prompt: str
    """The user's text, whole."""
    kept: str
    """What of it is read."""
    text: str
    """As rendered, special tokens included."""
    ids: list[int]
    tokens: list[str]
    """The tokenizer's own names of the ids."""
    cut_tokens: int
    """How many tokens of the user's text were left out."""
    max_prompt_tokens: int
    overlong: Literal["cut", "drop"]
    stop_ids: list[int]
    """All tokens that end a response."""
    stop_texts: list[str]
    response: str
    response_from: Origin
    row_ids: list[int]
    """Prompt and response."""
    loss: list[int]
    """1 where the loss counts the token, else 0; as long as ``row_ids``."""
    notes: list[str]
    """What is not wrong but worth knowing of the chat template."""

    def as_dict(self) -> dict[str, Any]:
        """Return everything for ``--json``."""
        grouped = {"stop_ids", "stop_texts", "row_ids", "loss", "max_prompt_tokens"}
        return {
            **{key: value for key, value in vars(self).items() if key not in grouped},
            "stop": {"ids": self.stop_ids, "texts": self.stop_texts},
            "row": {"ids": self.row_ids, "loss": self.loss},
        }


@dataclass(frozen=True)
class Seen:
    """A preview with the codec that made it, which tells what single tokens look like."""

    preview: Preview
    codec: Codec

    def pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Return (text, whether it is special) of each token; of a part of a character the tokenizer's name."""
        tokenizer = self.codec.tokenizer
        special = {*tokenizer.all_special_ids, *(tokenizer.get_added_vocab().values())}
        shown = []
        for token, name in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
            text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if "\ufffd" in text or not text:
                text = name
            elif name[:1] in "Ġ▁" and not text.startswith(" "):
                text = f" {text}"  # some tokenizers drop the space before what they take for the beginning of a text
            shown.append((text, token in special))
        return shown


def preview(
    task: str,
    prompt: str | None = None,
    prefs: str | None = None,
    response: str | None = None,
    overrides: Sequence[str] = (),
) -> Seen:
    """Return what a task's policy reads for a prompt, and one training row.

    Args:
        task: a task's name, a card file or its folder.
        prompt: the user's text; None: the task's first prompt.
        prefs: the preference beside it; None: rendered plain.
        response: the training row's; None: the data's own for this prompt, else a stand-in.
        overrides: ``--set`` texts for the card.

    Raises:
        RequestError: card, tokenizer, preference or prompt cannot be used, or a response that is no stand-in no row.
    """
    from moalign.lm.chat import Renderer

    card = load.load_card(task, overrides)
    weights = None if prefs is None else preferences.parse(prefs, card.objective_names)
    for name, text in (("PROMPT", prompt), ("--response", response)):
        if text is not None and not text.strip():
            raise RequestError(f"{name}: found an empty text; give one, or leave it out")
        check_text(text or "", name)
    of_card = make_task(card, Path("results"))
    codec = of_card.untrained_codec()
    prompt = of_card.all_prompts()[0] if prompt is None else prompt
    known = of_card.known_response(prompt) if response is None else Response(response)
    answer = known or Response(STAND_IN)
    origin: Origin = "given" if response is not None else "stand-in" if known is None else "data"
    limit = card.generation.max_prompt_tokens
    renderer = Renderer(card.template, tuple(card.objective_names), codec, limit)
    rendered = renderer.plain(prompt) if weights is None else renderer.preference(prompt, weights)
    (ids,) = codec.prompt_ids([rendered])
    tail, notes = _response(codec, rendered, answer, ids, origin)
    shown = Preview(
        task=card.name,
        model=codec.source,
        objectives=card.objective_names,
        prefs=None if weights is None else list(weights),
        prompt=prompt,
        kept=rendered.prompt,
        text=_with_special(codec, rendered, ids),
        ids=ids,
        tokens=codec.tokenizer.convert_ids_to_tokens(ids),
        cut_tokens=rendered.cut,
        max_prompt_tokens=limit,
        overlong=card.overlong or "cut",
        stop_ids=sorted(codec.ends.ids),
        stop_texts=list(codec.ends.texts),
        response=answer.text,
        response_from=origin,
        row_ids=[*ids, *tail],
        loss=[*[0] * len(ids), *[1] * len(tail)],
        notes=notes,
    )
    return Seen(shown, codec)


def _response(
    codec: Codec, rendered: str, answer: Response, ids: list[int], origin: Origin
) -> tuple[list[int], list[str]]:
    """Return the response's tokens and notes on the chat template; none of a stand-in that cannot be trained on."""
    notes = [codec.caution] if codec.caution else []
    try:
        return codec.response_ids(rendered, answer, ids), notes
    except RequestError as error:
        if origin != "stand-in":
            raise
        return [], [*notes, *error.problems]


def _with_special(codec: Codec, rendered: str, ids: Sequence[int]) -> str:
    """Return the text with the special tokens that the tokenizer puts before it: plain text does not hold them."""
    special = set(codec.tokenizer.all_special_ids)
    head = next((at for at, token in enumerate(ids) if token not in special), len(ids))
    if codec.template.chat or head == 0:
        return str(rendered)
    # A plain text may begin with special tokens of its own; only what is not its own is put before it.
    own = codec.tokenizer(str(rendered), add_special_tokens=False, verbose=False)["input_ids"]
    added = len(ids) - len(own)
    return "".join(codec.tokenizer.convert_ids_to_tokens(list(ids[: max(0, added)]))) + str(rendered)

"""From text to tokens, in one place: what a policy reads, where a response begins, and what ends it.

* :class:`Renderer` writes a prompt the way a task's card asks for (preference, score tags, chat turns). A prompt that
  is too long loses the beginning of the user's own text and nothing else.
* :class:`Codec` turns rendered prompts and responses into token ids. A chat prompt has exactly the ids of the
  tokenizer's own chat template, a plain one those of the tokenizer with its own special tokens. Sampled responses keep
  the ids they were sampled with; only text that comes from files is tokenised, together with its prompt, and stands
  there as the chat template writes a reply: a thought or a channel that it opens first is part of the response.
* :class:`Ends` is what ends a response: the tokenizer's end token, those of the generation config, the token with which
  the chat template closes an assistant's turn, and the card's stop texts.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moalign.config.card import TemplateSpec
from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.records import Response

DATE = "2024-07-26"
"""The day that chat templates take for today when the card names none (as Llama 3.1's own template does)."""

Ids = list[int]

REMEMBERED = 4096
"""Rendered prompts whose fitting is remembered; where preferences are drawn anew every one is another."""


_USER, _REPLY = "moalign prompt", "moalign reply"
_LAST_TAG = re.compile(r"<([^<>/\s]+)>\s*\Z")
"""An opening tag at the end of a text, such as ``<think>``, with the white space after it."""


class Turn(NamedTuple):
    """How a chat template writes an assistant's turn."""

    head: str
    """A prompt, as it is sampled from."""
    gap: str
    """What stands between a prompt and the reply; empty where past turns begin in another way than prompts end."""
    thought: str
    """The tag at the end of a prompt that opens a thought; empty where the reply itself follows."""
    trims: bool
    """Whether white space around the reply is stripped."""
    behind: str
    """What stands behind the reply."""
    end: tuple[int, ...]
    """Its token ids up to the first special one; empty without a special one."""


@dataclass(frozen=True)
class Ends:
    """What ends a response."""

    ids: frozenset[int]
    """Any of these tokens ends it, in sampling too; the token belongs to the response."""
    texts: tuple[str, ...]
    """Stop texts that are no single special token: the response is cut at the first one."""
    row: tuple[int, ...]
    """Tokens appended to a finished response in training rows; the loss includes them."""


def generation_ends(config: Any) -> tuple[int, ...]:
    """Return the end tokens of a transformers ``GenerationConfig``, which may name none, one or several."""
    ids = getattr(config, "eos_token_id", None)
    return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


class Codec:
    """Turns texts into token ids and back, for one tokenizer and one card's template."""

    def __init__(
        self,
        tokenizer: Any,
        template: TemplateSpec | None = None,
        ends: Sequence[int] = (),
        source: str = "the model",
    ) -> None:
        """Take a tokenizer, a card's template (None: its defaults) and the end tokens of a model's generation config.

        ``source`` names the model in messages. Raises RequestError for a tokenizer without end token, and for
        ``template.chat`` without a chat template.
        """
        template = TemplateSpec() if template is None else template
        if tokenizer.eos_token_id is None:
            raise RequestError(f"model {source}: its tokenizer has no end token, which responses need")
        if template.chat and not tokenizer.chat_template:
            raise RequestError(
                f"template.chat: true, but the tokenizer of {source} has no chat template; say chat: false and write "
                "the turns into template.plain and template.preference"
            )
        self.tokenizer, self.template, self.source = tokenizer, template, source
        self._model_ends = tuple(int(i) for i in ends)
        self._special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}

    def turns(self, text: str, reply: str | None = None) -> str:
        """Return the chat template's text for a user's turn, ready for the reply or with it.

        Raises RequestError when the template refuses, for example a system prompt that it does not know.
        """
        messages = [{"role": "user", "content": text}]
        if self.template.system:
            messages.insert(0, {"role": "system", "content": self.template.system})
        if reply is not None:
            messages.append({"role": "assistant", "content": reply})
        options = {"add_generation_prompt": reply is None, "chat_template": self._dated_template}
        given = self.template.chat_kwargs or {}
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **given))
        except Exception as error:  # jinja's own errors, and whatever a template raises
            why = str(error).strip().split("\n")[0] or type(error).__name__
            hint = "; template.system: null leaves the system prompt out" if self.template.system else ""
            raise RequestError(f"the chat template of {self.source} refuses: {why}{hint}") from None

    @functools.cached_property
    def _dated_template(self) -> str | None:
        """The chat template with ``strftime_now`` made a macro that knows the card's day; None: it asks for no day.

        The macro goes before transformers' own function, which cannot be given as an argument: those are plain data.
        """
        template = self.tokenizer.get_chat_template()
        if "strftime_now" not in template:
            return None
        day = datetime.date.fromisoformat(self.template.date or DATE)
        formats = dict.fromkeys(re.findall(r"""strftime_now\(\s*["']([^"']*)["']\s*\)""", template))
        cases = "".join(
            f"{{%- if format == {form!r} -%}}{{{{ {day.strftime(form)!r} }}}}{{%- endif -%}}" for form in formats
        )
        return f"{{%- macro strftime_now(format) -%}}{cases}{{%- endmacro -%}}{template}"

    @functools.cached_property
    def _turn(self) -> Turn:
        """How the chat template writes a reply behind a prompt; RequestError when it leaves its text out."""
        conversation, head = self.turns(_USER, _REPLY), self.turns(_USER)
        before, found, behind = conversation.rpartition(_REPLY)
        if not found:
            raise RequestError(
                f"the chat template of {self.source} leaves out the text of a reply, as those of models for images do; "
                "say template.chat: false and write the turns into template.plain and template.preference"
            )
        thought = ""
        if before.rstrip() != head.rstrip():
            head += self.template.marker  # it may hold what the template writes here, or end the thought
            tag = _LAST_TAG.search(head)
            thought = tag[0] if tag and f"</{tag[1]}>" in self.tokenizer.get_chat_template() else ""
        gap = before.removeprefix(head) if before.startswith(head) else ""
        trims = f" {_REPLY} " not in self.turns(_USER, f" {_REPLY} ")
        ids = self._ids_after(behind) if behind else []
        first = next((at for at, token in enumerate(ids) if token in self._special), None)
        return Turn(head, gap, thought, trims, behind, () if first is None else tuple(ids[: first + 1]))

    @functools.cached_property
    def caution(self) -> str | None:
        """What to know of answers sampled by a chat template that lets the model think first; None: nothing."""
        if not self.template.chat or not (self._turn.thought or self._turn.gap.strip()):
            return None
        return (
            f"the chat template of {self.source} {self._opening}: a thought that is sampled there is scored with the "
            f"answer and counts towards generation.max_new_tokens; {self._remedy}"
        )

    @property
    def _opening(self) -> str:
        _, gap, thought, *_ = self._turn
        return f"ends a prompt inside a thought ({thought!r})" if thought else f"writes {gap!r} before a reply"

    @property
    def _remedy(self) -> str:
        """How a card has the policy answer at once."""
        given = (self.template.chat_kwargs or {}).get("enable_thinking")
        if "enable_thinking" in self.tokenizer.get_chat_template() and given is not False:
            return "template.chat_kwargs: {enable_thinking: false} switches that off"
        marker = self._turn.gap or f"{self._closing}\n\n"
        return f"template.marker: {json.dumps(marker, ensure_ascii=False)} has every prompt go on to the reply"

    @property
    def _closing(self) -> str:
        """The tag that closes a prompt's open thought."""
        return self._turn.thought.strip().replace("<", "</")

    def prompt_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Return the token ids of rendered prompts: exactly those that the tokenizer itself gives.

        Chat text holds its special tokens; plain text gets those that the tokenizer puts around a text, less a final
        end token, after which the model would not continue.
        """
        if self.template.chat:
            return self._plain_ids(texts)
        rows = self.tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        closes = eos != bos and self.tokenizer("")["input_ids"][-1:] == [eos]
        return [list(row[:-1] if closes else row) for row in rows]

    def _plain_ids(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of texts alone, without special tokens around them."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [list(row) for row in rows]

    @functools.cached_property
    def ends(self) -> Ends:
        """What ends a response."""
        eos = int(self.tokenizer.eos_token_id)
        turn: tuple[int, ...] = ()
        if self.tokenizer.chat_template:
            try:
                turn = self._turn.end
            except RequestError:
                if self.template.chat:
                    raise
        ids, texts = {eos, *self._model_ends, *turn[-1:]}, []
        for text in self.template.stop:
            alone = self._plain_ids([text])[0]
            if len(alone) == 1 and alone[0] in self._special:
                ids.add(alone[0])
            else:
                texts.append(text)
        if self.template.end is not None:
            row = tuple(self._ids_after(self.template.end))
        else:
            row = turn if self.template.chat and turn else (eos,)
        return Ends(frozenset(ids), tuple(texts), row)

    def response_ids(self, prompt: str, response: Response, prompt_ids: Ids | None = None) -> Ids:
        """Return the ids of a response to a rendered prompt, with :attr:`Ends.row` appended if it is finished.

        A text is tokenised together with its prompt: where the prompt's own ids are the beginning of that, the rest is
        the response. Where a token spans the boundary, which the sampler can never produce, the response is tokenised
        after a character that merges with nothing.
        """
        if response.ids is not None:
            return list(response.ids)
        text = self._behind_prompt(response.text) if self.template.chat else response.text
        if not text:
            return []
        head = self.prompt_ids([prompt])[0] if prompt_ids is None else prompt_ids
        both = self.prompt_ids([prompt + text])[0]
        continues = both[: len(head)] == head
        if self.template.chat and self._turn.thought and not (continues and self._closing in text):
            raise RequestError(
                f"the chat template of {self.source} {self._opening}, in which a response given as text would be "
                f"trained; {self._remedy}; or give responses that hold their thought, with {self._closing} behind it"
            )
        ids = both[len(head) :] if continues else self._ids_after(text)
        return [*ids, *self.ends.row] if response.finished and ids else ids

    def _behind_prompt(self, text: str) -> str:
        """Return a reply as it stands behind a chat prompt: where a thought or a channel comes first, as the template
        itself writes this reply there, unless it begins that in another way than the prompt ends."""
        head, gap, thought, trims, behind, _ = self._turn
        text = text.strip() if trims else text
        if not thought and not gap.strip():
            return text if text.startswith(gap) else gap + text
        if not text.strip():
            return ""
        own = self.turns(_USER, text).removesuffix(behind)
        if own.startswith(head):
            return own.removeprefix(head)
        return text.lstrip().removeprefix(thought.strip()).lstrip()

    def _ids_after(self, text: str) -> Ids:
        """Return the tokens of a text that follows other text: alone, it may get a word boundary in front."""
        for anchor in ("\n", "a", ":", "."):
            alone, both = self._plain_ids([anchor, anchor + text])
            if both[: len(alone)] == alone and len(both) > len(alone):
                return both[len(alone) :]
        return self._plain_ids([text])[0]

    def decode(self, rows: Sequence[Iterable[int]]) -> list[str]:
        """Return the texts of response tokens without special tokens, the token that ended them, and what the chat
        template writes before a reply; white space stays, as a stop text may begin with it."""
        cut, count = [], len(self._before)
        for row in rows:
            ids = list(row)
            if ids and ids[-1] in self.ends.ids:
                del ids[-1]
            cut.append(ids[count:] if ids[:count] == self._before[: len(ids)] else ids)
        texts: list[str] = self.tokenizer.batch_decode(
            cut, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    @functools.cached_property
    def _before(self) -> Ids:
        """The tokens that the chat template writes between a prompt and the reply, white space alone left out."""
        return self._ids_after(self._turn.gap) if self.template.chat and self._turn.gap.strip() else []

    def fit(self, prompt: str, build: Callable[[str], str], limit: int, where: str) -> Rendered:
        """Return ``build(prompt)`` with as much of the end of ``prompt`` as ``limit`` tokens hold, cut between tokens.

        What ``build`` puts around the text is never cut: RequestError when that alone is longer than the limit, naming
        ``where``, the setting that it comes from.
        """
        whole = Rendered(build(prompt), prompt, build)
        # Every token covers at least one byte, except the few special ones around a text.
        if len(whole.encode(errors="surrogatepass")) + 8 <= limit:
            return whole

        def size(text: str) -> int:
            return len(self.prompt_ids([build(text)])[0])

        excess = size(prompt) - limit
        if excess <= 0:
            return whole
        starts = self._starts(prompt)
        first = 0
        while excess > 0 and first < len(starts):
            first += excess
            while first < len(starts) and starts[first] <= starts[first - 1]:
                first += 1  # the bytes of one character share its start
            excess = size(prompt[starts[first] :] if first < len(starts) else "") - limit
        if first >= len(starts):
            raise RequestError(
                f"{where}: {limit} tokens do not hold what the template writes around a prompt "
                f"({size('')} tokens) and a token of the prompt; raise it, or shorten the template"
            )
        # After other text there may be fewer tokens than in the text alone: keep what still fits.
        while first > 1 and size(prompt[starts[first - 1] :]) <= limit:
            first -= 1
        kept = prompt[starts[first] :]
        own, left = self._plain_ids([prompt, kept])
        return Rendered(build(kept), kept, build, len(own) - len(left))

    def _starts(self, text: str) -> list[int]:
        """Return the character at which each token of a text begins; every one if the tokenizer has no offsets."""
        if not self.tokenizer.is_fast:
            return list(range(len(text)))
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [int(start) for start, _ in coded["offset_mapping"]]


class Rendered(str):
    """The text that a policy reads, cut to the card's limit; it keeps the user's own text, to be cut again."""

    prompt: str
    """What is left of the user's text."""
    build: Callable[[str], str]
    """Renders a user's text."""
    cut: int
    """How many tokens of the user's text were left out."""

    def __new__(cls, text: str, prompt: str = "", build: Callable[[str], str] = str, cut: int = 0) -> Rendered:
        """Return ``build(prompt)``, which is ``text``."""
        rendered = super().__new__(cls, text)
        rendered.prompt, rendered.build, rendered.cut = prompt, build, cut
        return rendered

    @classmethod
    def from_text(cls, text: str) -> Rendered:
        """Return rendered text as it is; a plain string (a method's own rendering) is all the user's text."""
        return text if isinstance(text, Rendered) else cls(text, text)


@dataclass(frozen=True)
class Renderer:
    """Renders prompts for one task: preference text, score tags, response marker, chat turns."""

    template: TemplateSpec
    objectives: tuple[str, ...]
    codec: Codec | None = None
    """Needed for chat templates and limits."""
    max_tokens: int | None = None
    """Longest prompt; the user's text is cut to it."""
    _fitted: dict[str, Rendered] = field(default_factory=dict, repr=False, compare=False)

    def plain(self, prompt: str) -> Rendered:
        """Return the prompt without any preference."""
        return self._finish(prompt, self.template.plain)

    def preference(self, prompt: str, weights: Sequence[float], style: str = "percent") -> Rendered:
        """Return the prompt with its preference written beside it."""
        return self.beside(prompt, self.preference_text(weights, style))

    def preference_text(self, weights: Sequence[float], style: str = "percent") -> str:
        """Return a preference as the policy reads it: in the card's words, else in numbers."""
        if not self.template.words:
            return preferences.to_text(weights, self.objectives, style)
        chosen = []
        for name, phrases in self.template.words.items():
            # The grid's weights are floats: .1 + .2 belongs to "up to .3".
            weight = weights[self.objectives.index(name)] - preferences.TOLERANCE
            chosen.append(next(phrase.text for phrase in phrases if weight <= phrase.up_to))
        return " ".join(filter(None, chosen))

    def beside(self, prompt: str, text: str) -> Rendered:
        """Return the prompt with a text in the place of its preference."""
        return self._finish(prompt, self.template.preference, preference=text)

    def scores(self, prompt: str, scores: Sequence[float]) -> Rendered:
        """Return the prompt with reward tags (RiC): ``<rm1_score> 1.2 <rm2_score> -0.3``, one decimal."""
        tags = " ".join(f"<rm{i}_score> {score:z.1f}" for i, score in enumerate(scores, start=1))
        return self._finish(prompt, self.template.scores, scores=tags)

    def _finish(self, prompt: str, template: str, **fields: str) -> Rendered:
        names = re.compile("{(" + "|".join(["prompt", *fields]) + ")}")

        def build(text: str) -> str:
            # In the template alone: a prompt that itself holds "{prompt}" stays as it is.
            filled = names.sub(lambda match: text if match[1] == "prompt" else fields[match[1]], template)
            if self.template.chat:
                if self.codec is None:
                    raise ValueError("a chat template needs a tokenizer")
                filled = self.codec.turns(filled)
            return filled + self.template.marker

        rendered = Rendered(build(prompt), prompt, build)
        if self.codec is None or self.max_tokens is None:
            return rendered
        if rendered not in self._fitted:
            if len(self._fitted) >= REMEMBERED:
                self._fitted.clear()
            self._fitted[rendered] = self.codec.fit(prompt, build, self.max_tokens, "generation.max_prompt_tokens")
        return self._fitted[rendered]


def training_row(codec: Codec, rendered: str, response: Response, max_tokens: int) -> tuple[Ids, Ids]:
    """Return (prompt ids, response ids) of a training row; see :func:`pair_row`."""
    return pair_row(codec, rendered, [response], max_tokens)[0]


def pair_row(codec: Codec, rendered: str, responses: Sequence[Response], max_tokens: int) -> list[tuple[Ids, Ids]]:
    """Return (prompt ids, response ids) of responses that share one prompt, each at most ``max_tokens`` in all.

    The responses go first: a prompt that does not fit beside the longest loses the beginning of the user's text. A
    response that is longer than the row by itself is cut off at its end, and so has no ending.

    Raises RequestError when the template leaves no room for a response.
    """
    head = codec.prompt_ids([rendered])[0]
    tails = [codec.response_ids(rendered, response, head) for response in responses]
    longest = max(map(len, tails))
    if len(head) + longest > max_tokens:
        prompt = Rendered.from_text(rendered)
        fixed = codec.prompt_ids([prompt.build("")])[0]
        # Keep at least one token of the user's text, if it has any.
        room = min(longest, max_tokens - len(fixed) - (1 if len(fixed) < len(head) else 0))
        if room < 1:
            raise RequestError(
                f"max_tokens: {max_tokens} tokens do not hold the prompt's template ({len(fixed)} tokens) and a "
                "response; raise it"
            )
        tails = [tail[:room] for tail in tails]
        if len(head) + room > max_tokens:
            head = codec.prompt_ids([codec.fit(prompt.prompt, prompt.build, max_tokens - room, "max_tokens")])[0]
    return [(head, tail) for tail in tails]

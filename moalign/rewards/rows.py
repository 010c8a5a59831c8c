"""From a prompt and a response to the token row that a classifier reads; the same rows for training and for scoring.

A text longer than the model reads loses the start of its *prompt*, never the answer (unless the answer alone is too
long: then its end is cut, as if generation had stopped there).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from moalign.core.errors import RequestError, did_you_mean

_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")

Row = dict[str, list[int]]
"""One tokenised text: ``input_ids`` and, for models that read pairs, ``token_type_ids``."""


def check_templates(template: str, pair_template: str | None, where: str) -> None:
    """Raise RequestError for an unknown field, or when no template has the field ``{response}``."""
    templates = {"template": template, "pair_template": pair_template or ""}
    for key, text in templates.items():
        for field in _FIELD.findall(text):
            if field not in ("prompt", "response"):
                raise RequestError(
                    f"{where}: {key} has the unknown field {{{field}}}; allowed: {{prompt}}, {{response}}"
                    + did_you_mean(field, ["prompt", "response"])
                )
    if not any("{response}" in text for text in templates.values()):
        raise RequestError(f"{where}: neither template nor pair_template has the field {{response}}")


def render(template: str, prompt: str, response: str) -> str:
    """Fill a template in one pass, so that a prompt that itself holds ``{response}`` stays as it is."""
    values = {"prompt": prompt, "response": response}
    return _FIELD.sub(lambda match: values[match.group(1)], template)


def longest(model: Any, tokenizer: Any, max_length: int) -> int:
    """Return how many tokens a model can read, special tokens included: the least of ``max_length``, the tokenizer's
    limit and the model's positions."""
    limits = [max_length, int(tokenizer.model_max_length)]
    limits.append(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa numbers its positions from padding_idx + 1.
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - start)
    return min(limit for limit in limits if limit > 0)


class RowEncoder:
    """Tokenises (prompt, response) texts for one model."""

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        pair_template: str | None,
        max_length: int,
        vocabulary: int,
        where: str,
    ) -> None:
        """Take a tokenizer and its limits.

        Args:
            template, pair_template: texts with ``{prompt}`` and ``{response}``; the second for models that read pairs.
            max_length: most tokens of a row, special tokens included.
            vocabulary: tokens that the model knows.
            where: how messages name the place.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.pair_template = pair_template
        self.max_length = max_length
        self.vocabulary = vocabulary
        self.where = where
        self.shortened = 0
        """Rows so far that were longer than the model reads."""

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Return one row per (prompt, response), none longer than ``max_length`` and none empty.

        Raises RequestError when the template alone is too long, or the tokenizer belongs to another model.
        """
        if not pairs:
            return []
        rows = self._encode([self._render(*pair) for pair in pairs])
        for at, (prompt, response) in enumerate(pairs):
            if len(rows[at]["input_ids"]) > self.max_length:
                rows[at] = self._shortened(prompt, response, len(rows[at]["input_ids"]) - self.max_length)
                self.shortened += 1
            if not rows[at]["input_ids"]:
                rows[at] = {key: [self._any_token()] if key == "input_ids" else [0] for key in rows[at]}
        return rows

    def _render(self, prompt: str, response: str) -> tuple[str, str | None]:
        pair = self.pair_template
        return render(self.template, prompt, response), None if pair is None else render(pair, prompt, response)

    def _encode(self, texts: Sequence[tuple[str, str | None]]) -> list[Row]:
        firsts, seconds = [first for first, _ in texts], [second for _, second in texts]
        columns = [firsts] if self.pair_template is None else [firsts, seconds]
        coded = self.tokenizer(
            *columns,
            add_special_tokens=True,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )
        keys = [key for key in ("input_ids", "token_type_ids") if key in coded]
        rows = [{key: list(coded[key][at]) for key in keys} for at in range(len(texts))]
        largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
        if largest >= self.vocabulary:
            raise RequestError(
                f"{self.where}: the tokenizer gives token {largest}, but the model knows {self.vocabulary} tokens: "
                "tokenizer and weights do not belong together"
            )
        return rows

    def _shortened(self, prompt: str, response: str, excess: int) -> Row:
        """Return the row with as much of the prompt's end as fits, else of the response's start, without a prompt."""

        def from_end(count: int) -> Row:
            return self._encode([self._render(prompt[len(prompt) - count :], response)])[0]

        def from_start(count: int) -> Row:
            return self._encode([self._render("", response[:count])])[0]

        guess = len(prompt) - self._start_of_token(prompt, excess)
        row = self._longest(from_end, len(prompt), guess) or self._longest(from_start, len(response), len(response))
        if row is None:
            raise RequestError(
                f"{self.where}: the template alone is longer than {self.max_length} tokens; raise max_length or "
                "shorten the template"
            )
        return row

    def _start_of_token(self, prompt: str, number: int) -> int:
        """Return the character at which the prompt's token ``number`` begins, its length when it has fewer."""
        if not self.tokenizer.is_fast:
            return len(prompt) // 2
        coded = self.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = coded["offset_mapping"]
        return int(offsets[number][0]) if number < len(offsets) else len(prompt)

    def _longest(self, encode: Callable[[int], Row], most: int, guess: int) -> Row | None:
        """Return ``encode(count)`` for the largest ``count`` that fits, None when even 0 does not.

        The search widens from the guess, which is nearly always right, and then halves.
        """
        rows: dict[int, Row] = {}

        def fits(count: int) -> bool:
            rows[count] = encode(count)
            return len(rows[count]["input_ids"]) <= self.max_length

        low, high, step = -1, most + 1, 1  # low fits, high does not
        at = min(max(guess, 0), most)
        while low < at < high:
            if fits(at):
                low, at = at, min(at + step, most)
            else:
                high, at = at, max(at - step, 0)
            if low >= 0 and high <= most:
                break
            step *= 4
        while high - low > 1 and high > 0:
            middle = (low + high) // 2
            if fits(middle):
                low = middle
            else:
                high = middle
        return rows[low] if low >= 0 else None

    def _any_token(self) -> int:
        """Return a token that stands for an empty text, which no model can read."""
        tokenizer = self.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id)
        return next((token for token in named if token is not None), 0)

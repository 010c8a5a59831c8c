"""From a prompt and a response to the token row that a classifier reads; the same rows for training and for scoring.

A text longer than the model reads loses the start of its *prompt*, never the answer (unless the answer alone is too
long: then its end is cut, as if generation had stopped there).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [max_length, int(tokenizer.model_max_length), positions]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            # RoBERTa numbers its positions from padding_idx + 1.
            start = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - start)
    return min(limit for limit in limits if limit > 0)


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def require_known(token: int, vocabulary: int, where: str) -> None:
    """Raise RequestError when the tokenizer gives a token that the model lacks."""
    if token >= vocabulary:
        raise RequestError(
            f"{where}: the tokenizer gives token {token}, but the model knows {vocabulary} tokens: "
            "tokenizer and weights do not belong together"
        )


@dataclass
class RowEncoder:
    """Tokenises (prompt, response) texts for one model."""

    tokenizer: Any
    template: str
    """A text with ``{prompt}`` and ``{response}``."""
    pair_template: str | None
    """The second text, for models that read pairs."""
    max_length: int
    """Most tokens of a row, special tokens included."""
    vocabulary: int
    where: str
    """How messages name the place."""
    shortened: int = 0
    """Rows so far that were longer than the model reads."""

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, template: str, pair_template: str | None, max_length: int, where: str
    ) -> RowEncoder:
        """Return the encoder for a model that may read less than ``max_length``."""
        most = longest(model, tokenizer, max_length)
        return cls(tokenizer, template, pair_template, most, vocabulary_of(model), where)

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """Return one row per (prompt, response), none longer than ``max_length`` and none empty.

        Raises RequestError when the template alone is too long, or the tokenizer belongs to another model.
        """
        rows = self._encode(pairs) if pairs else []
        for at, (prompt, response) in enumerate(pairs):
            excess = len(rows[at]["input_ids"]) - self.max_length
            if excess > 0:
                rows[at] = self._cut(prompt, response, excess)
                self.shortened += 1
            if not rows[at]["input_ids"]:
                # No model can read an empty text: a token stands for it.
                tokenizer = self.tokenizer
                tokens = (
                    tokenizer.bos_token_id,
                    tokenizer.eos_token_id,
                    tokenizer.cls_token_id,
                    tokenizer.unk_token_id,
                )
                stand_in = next((token for token in tokens if token is not None), 0)
                rows[at] = {key: [stand_in] if key == "input_ids" else [0] for key in rows[at]}
        return rows

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        templates = [self.template] if self.pair_template is None else [self.template, self.pair_template]
        coded = self.tokenizer(
            *([render(template, *pair) for pair in pairs] for template in templates),
            add_special_tokens=True,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            verbose=False,
        )
        keys = [key for key in ("input_ids", "token_type_ids") if key in coded]
        rows = [{key: list(coded[key][at]) for key in keys} for at in range(len(pairs))]
        largest = max((max(row["input_ids"], default=0) for row in rows), default=0)
        require_known(largest, self.vocabulary, self.where)
        return rows

    def _cut(self, prompt: str, response: str, excess: int) -> Row:
        """Return the row with as much of the prompt's end as fits, else of the response's start, without a prompt."""

        def from_end(count: int) -> Row:
            return self._encode([(prompt[len(prompt) - count :], response)])[0]

        def from_start(count: int) -> Row:
            return self._encode([("", response[:count])])[0]

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
        best: Row | None = None
        low, high, step = -1, most + 1, 1  # low fits, high does not
        at = min(max(guess, 0), most)
        while high - low > 1:
            row = encode(at)
            if len(row["input_ids"]) <= self.max_length:
                best, low, at = row, at, min(at + step, most)
            else:
                high, at = at, max(at - step, 0)
            step *= 4
            if low >= 0 and high <= most:
                at = (low + high) // 2
        return best

"""Objectives that are a log-likelihood under a frozen causal language model, in nats per token.

* ``fluency``: the mean over the response's tokens of log p(token | prompt and the tokens before it). What ends a
  response is not counted, as a response that the limit cut off has no end. A response without tokens is as likely as a
  guess at random: ``-log(vocabulary)``.
* ``relevance``: the mean over the *prompt's* tokens of log p(token | response), less the same without the response.
  It is 0 where the response says nothing about the prompt, and exactly 0 for an empty one. It cannot be raised by
  plain words alone, as fluency can.

Tokens are those that a sampler would have written: the text that comes first is tokenised as it stands in the
template, and the scored text's tokens are what follows when both are tokenised together, unless a token would cover the
boundary; then both are tokenised apart. The two terms of a relevance are over the same tokens.

Rows are deduplicated, sorted and padded on the right, where nothing that comes later can change a causal model's
answer, into batches bounded by tokens and by the logits that they give: logits are taken at scored positions only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from moalign.config.card import TemplateSpec
from moalign.config.objectives import LmObjective
from moalign.core.errors import RequestError
from moalign.lm.chat import Codec
from moalign.rewards.model_scorer import CACHE_LIMIT, ModelScorer
from moalign.rewards.rows import longest, require_known, vocabulary_of

ASK = "{response}\n\nWhat question or request is this a reply to?"
"""The user's turn to which the prompt is the assistant's answer, for relevance in a chat template."""
JOIN = " "
"""Between two texts without white space where they meet, in the plain template."""
_VERSION = 1
"""Raise it when a score's meaning changes: it is part of the revision."""
_MOST_LOGITS = 2**26
"""Numbers; a batch's logits are at most this many (256 MiB in float32), one row's at least."""


class Line(NamedTuple):
    """One row of tokens; those from ``start`` on are scored."""

    ids: tuple[int, ...]
    start: int


class LmScorer(ModelScorer[LmObjective]):
    """An ``lm`` objective."""

    auto_class = "AutoModelForCausalLM"
    noun = "causal language model"

    def __init__(self, spec: LmObjective, base_dir: Path) -> None:
        """Check what :class:`ModelScorer` does."""
        super().__init__(spec, base_dir)
        self.rows_shortened = 0
        """Texts so far that were longer than ``max_length``."""
        self._bare_means: dict[Line, float] = {}
        """Likelihoods of prompts without a response, kept for later calls."""

    def _identity(self, content: str) -> list[Any]:
        settings = self.spec.model_dump(include={"score", "template", "max_length", "dtype"})
        return [_VERSION, content, settings | self._few_bits(), ASK, JOIN]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return nats per token of each (prompt, response), ``[samples]``, in the order given."""
        pairs = list(zip(prompts, responses, strict=True))
        if self.spec.score == "fluency":
            lines = [self._line(response, prompt, "", "start") for prompt, response in pairs]
            means = self._means(lines)
            return [means[line] if len(line.ids) > line.start else -math.log(self._vocabulary) for line in lines]
        conditioned = [self._line(prompt, response, ASK, "end") for prompt, response in pairs]
        bare = self._tokens(self._prefix("", ASK))
        bare_lines = [Line((*bare, *line.ids[line.start :]), len(bare)) for line in conditioned]
        if len(self._bare_means) > CACHE_LIMIT:
            self._bare_means.clear()
        unknown = [line for line in bare_lines if line not in self._bare_means]
        means = self._means([*conditioned, *unknown])
        self._bare_means.update({line: means[line] for line in unknown})
        return [
            means[line] - self._bare_means[bare_line] if response and len(line.ids) > line.start else 0.0
            for line, bare_line, (_, response) in zip(conditioned, bare_lines, pairs, strict=True)
        ]

    # --- from texts to tokens

    def _line(self, scored: str, before: str, ask: str, side: str) -> Line:
        """Return the tokens of a text after another one, at most ``max_length`` of them.

        What comes first is cut on ``side`` where both do not fit, down to nothing; a scored text that is too long by
        itself is cut too: a response loses its end, a prompt its start (its last half stays).
        """
        first = self._prefix(before, ask)
        prefix = self._tokens(first)
        ids = self._follow(first, scored, prefix)
        room = self._longest - (0 if side == "start" else self._longest // 2)
        fixed = len(self._tokens(self._prefix("", ask)))
        if fixed + 1 > room:
            raise RequestError(f"{self.where}: the template alone takes {fixed} tokens; raise max_length")
        if len(prefix) + len(ids) > self._longest:
            self.rows_shortened += 1
            ids = ids[: room - fixed] if side == "start" else ids[-room:]
            while before and len(prefix) + len(ids) > self._longest:
                before = self._cut(before, len(prefix) + len(ids) - self._longest, side)
                prefix = self._tokens(self._prefix(before, ask))
        return Line((*prefix, *ids), len(prefix))

    def _prefix(self, before: str, ask: str) -> str:
        """Return the text that comes before the scored one."""
        if not self._chat:
            return before
        return self._codec.turns((ask.replace("{response}", before) if ask else before).strip())

    def _tokens(self, prefix: str) -> list[int]:
        """Return a prefix's tokens; an empty one is the token that begins a text."""
        tokenizer = self._tokenizer
        ids: list[int] = self._coded(prefix, not self._chat)
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if not ids and begin is None:
            raise RequestError(f"{self.where}: the tokenizer has no begin or end token, which a text must start from")
        return ids or [int(begin)]

    def _follow(self, prefix: str, text: str, before: list[int]) -> list[int]:
        """Return the tokens of ``text`` after ``prefix``."""
        if not text:
            return []
        if not self._chat and prefix and not prefix[-1].isspace() and not text[0].isspace():
            text = JOIN + text
        joint = self._coded(prefix + text, not self._chat) if prefix else []
        if prefix and joint[: len(before)] == before and len(joint) > len(before):
            return joint[len(before) :]
        return self._coded(text, False)

    def _coded(self, text: str, special: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        require_known(max(ids, default=0), self._vocabulary, self.where)
        return ids

    def _cut(self, text: str, tokens: int, side: str) -> str:
        """Return a text without its first (or last) tokens, shorter by a character at least."""
        if not self._tokenizer.is_fast:
            length = max(0, len(text) - 2 * tokens)
            return text[len(text) - length :] if side == "start" else text[:length]
        coded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = [span for span in coded["offset_mapping"] if span[1] > span[0]]
        if tokens >= len(spans):
            return ""
        if side == "start":
            return text[max(1, spans[tokens][0]) :]
        return text[: min(len(text) - 1, spans[-tokens][0])]

    # --- from tokens to scores

    def _means(self, lines: Sequence[Line]) -> dict[Line, float]:
        """Return the mean log-probability of each line's scored tokens; 0 for a line without any."""
        means = {line: 0.0 for line in lines}
        work = [line for line in means if len(line.ids) > line.start]
        for batch in self._batches(work):
            means.update(zip(batch, self._batch_means(batch), strict=True))
        return means

    def _batches(self, lines: Sequence[Line]) -> Iterator[list[Line]]:
        """Yield batches of lines of similar length, each within ``batch_tokens`` and ``_MOST_LOGITS``."""

        def too_many_logits(batch: list[Line], line: Line) -> bool:
            scored = len(batch[0].ids) - min(other.start for other in [*batch, line]) + 1
            return (len(batch) + 1) * scored * self._vocabulary > _MOST_LOGITS

        longest_first = sorted(lines, key=lambda line: (-len(line.ids), -line.start))
        return self._bounded(longest_first, lambda line: len(line.ids), too_many_logits)

    def _batch_means(self, batch: Sequence[Line]) -> list[float]:
        """Return the mean log-probability of each line's scored tokens."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        model, first = self._model, min(line.start for line in batch) - 1  # logits are those of the next token
        ids = pad_sequence([torch.tensor(line.ids) for line in batch], batch_first=True).to(model.device)
        lengths = torch.tensor([[len(line.ids)] for line in batch], device=model.device)
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        if keeps:
            inputs["logits_to_keep"] = torch.arange(first, ids.shape[1], device=model.device)
        means = []
        with torch.inference_mode():
            logits = model(**inputs).logits
            for row, line in zip(logits if keeps else logits[:, first:], batch, strict=True):
                scored = row[line.start - 1 - first : len(line.ids) - 1 - first].float()
                goal = torch.tensor(line.ids[line.start :], device=model.device)
                picked = scored.gather(1, goal[:, None])[:, 0] - scored.logsumexp(dim=-1)
                means.append(float(picked.double().mean()))
        return means

    # --- the model

    def _settle(self, model: Any) -> None:
        """Refuse a model that looks ahead, such as BERT: it would see the tokens that it is to predict."""
        import torch

        rows = torch.tensor([[0, 1, 2], [0, 1, 3]], device=model.device) % vocabulary_of(model)
        with torch.inference_mode():
            logits = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, 0].float()
        if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3):
            raise RequestError(
                f"{self.where}: the model ({type(model).__name__}) reads ahead; a causal language model is needed"
            )

    @cached_property
    def _chat(self) -> bool:
        has = bool(self._tokenizer.chat_template)
        if self.spec.template == "chat" and not has:
            raise RequestError(f"{self.where}: template: chat, but the model {self.spec.model} has no chat template")
        return has if self.spec.template is None else self.spec.template == "chat"

    @cached_property
    def _codec(self) -> Codec:
        """The model's chat turns, to the token as a policy's are."""
        return Codec(self._tokenizer, TemplateSpec(chat=True), source=self.spec.model)

    @cached_property
    def _longest(self) -> int:
        return longest(self._model, self._tokenizer, self.spec.max_length)

"""Sampling from a language model: one plain loop that returns log-probabilities as it samples.

Every row is drawn by inverting its cumulative distribution at given uniform numbers: two policies that are given the
same numbers differ only where their distributions do (common random numbers), and no sample depends on its batch.

The sampler draws from the full distribution: no minimum length, no top-k; ``top_p`` is for evaluation and RiC's own
samples only. Truncating while training on full log-probabilities lets a policy drift where the sampler never looks.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from moalign.lm.language_model import TINY, LanguageModel
from moalign.lm.log_probs import positions

KEEP_ABOVE = 0.9
"""Ended rows leave the batch once at most this share of its rows is alive; each time, the cache is copied."""

SAVED = 128
"""Tokens that reading the beginning of all prompts once must save."""

COLDEST = 1e-6
"""Below this temperature sampling is greedy: logits divided by less are no numbers any more."""

CHUNK = 256
"""Tokens that are summed at once to find where in a large vocabulary a draw falls."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``seed`` and the row numbers fix every random number."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 256
    max_prompt_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclass
class Samples:
    """Sampled responses, aligned for training: prompts padded on the left, responses on the right."""

    input_ids: Tensor
    """``[rows, prompt + T]``."""
    attention_mask: Tensor
    """``[rows, prompt + T]``; 0 on padding of either side."""
    response_mask: Tensor
    """Bool ``[rows, T]`` over the last T columns; True on response tokens, the end token included."""
    logps: Tensor
    """log pi of each sampled token, ``[rows, T]``, 0 outside the mask; see :func:`draw`."""
    finished: Tensor
    """Bool ``[rows]``: the response ended at an end id or a stop text (:func:`trim`), not by the limit."""
    hidden: Tensor | None = None
    """Last hidden state before each token, ``[rows, T, width]``, 0 outside the mask; if requested."""

    @property
    def tokens(self) -> int:
        """Number of sampled tokens."""
        return int(self.response_mask.sum())


@dataclass(eq=False)
class Traces:
    """The tokens of responses, in the responses' order, and their log-probability under the policy."""

    vocabulary: Any
    """The tokenizer that the ids belong to."""
    ids: list[NDArray[np.int64]]
    """Token ids of each response, ``[length >= 1]``, up to and with its end token or the token that completes its first
    stop text."""
    logps: list[float]
    """log pi of those tokens together, in nats; see :func:`draw`."""
    finished: list[bool]
    """Whether each response ended at an end id or a stop text; the limit cut off the others."""

    def at(self, places: Sequence[int]) -> Traces:
        """Return those of the responses at ``places``."""
        ids, logps = [self.ids[place] for place in places], [self.logps[place] for place in places]
        return Traces(self.vocabulary, ids, logps, [self.finished[place] for place in places])

    @classmethod
    def joined(cls, parts: Sequence[Traces | None]) -> Traces | None:
        """Return the parts, all of one vocabulary, as one; None where a part is not known."""
        known = [part for part in parts if part is not None]
        if not known or len(known) < len(parts):
            return None
        whole = cls(known[0].vocabulary, [], [], [])
        for part in known:
            whole.ids += part.ids
            whole.logps += part.logps
            whole.finished += part.finished
        return whole


@dataclass(eq=False)
class Generated:
    """What a generator returns."""

    responses: list[str]
    """One for each text."""
    tokens: int
    """Number of tokens sampled, those after a stop text included."""
    traces: Traces | None = None
    """The tokens of the responses; None where the generator does not know them."""


def uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """Return uniform numbers ``[rows, length]``; row ``r`` depends on ``(seed, r)`` alone."""
    drawn = {row: np.random.default_rng([seed, row]).random(length) for row in set(rows)}
    return torch.from_numpy(np.stack([drawn[row] for row in rows]))


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``(input_ids, attention_mask)``, both ``[rows, longest]``, padded on the left."""
    ids = pad_sequence(
        [torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=pad, padding_side="left"
    )
    padding = ids.shape[1] - torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) >= padding.unsqueeze(-1)).long()
    return ids.to(device), mask.to(device)


@contextmanager
def last_states(model: Any, keep: bool = True) -> Iterator[list[Tensor]]:
    """Yield a list that holds, if ``keep``, the last hidden states of the newest pass, ``[rows, tokens, width]``.

    They are what reaches the output layer, which then makes the logits of the last token alone: a body may be called in
    parts, and ``output_hidden_states`` would hold the states of every layer, too.
    """
    states: list[Tensor] = []

    def note(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        states[:] = [inputs[0]]
        return (inputs[0][:, -1:],)

    handle = model.get_output_embeddings().register_forward_pre_hook(note) if keep else None
    try:
        yield states
    finally:
        if handle is not None:
            handle.remove()


def state_width(model: Any) -> int:
    """Return the width of :func:`last_states`; a config may keep it in a part of its own, and OPT's has two."""
    return int(model.get_output_embeddings().weight.shape[1])


class NextToken:
    """Next-token distributions of a model as it stands: it reads tokens and remembers those that it has read.

    One object serves one batch. A mixture of models is a subclass; the sampling loop stays the same.
    """

    state: Tensor | None = None
    """The hidden state of the token read last, ``[rows, width]``, where it is kept."""

    def __init__(self, model: Any, hidden: bool = False) -> None:
        """Begin a batch; nothing is read yet. ``hidden`` keeps each token's hidden state in ``state``."""
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.hidden = hidden
        self._numbers = torch.arange(0)

    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Read tokens ``[rows, new]`` at positions ``place``; ``mask`` covers all read so far, ``[rows, total]``.

        Returns logits of the token after the last, ``[rows, vocabulary]``, up to a constant of each row.
        """
        self._numbers = torch.arange(len(ids), device=ids.device)
        with last_states(self.model, self.hidden) as last:
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=place,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if self.hidden:
            self.state = last[0][:, -1]
        logits: Tensor = output.logits[:, -1]
        return logits

    def repeat(self, times: int) -> None:
        """Make ``times`` consecutive rows of each row read so far."""
        self.keep(self._numbers.repeat_interleave(times))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but those numbered ``rows``, int ``[kept]``, which continue in this order."""
        self.cache.reorder_cache(rows)  # the one way that every kind of layer has, recurrent ones too
        self._numbers = torch.arange(len(rows), device=rows.device)
        self.state = None if self.state is None else self.state[rows]


@torch.no_grad()
def sample(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    numbers: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repeat: int = 1,
    hidden: bool = False,
    source: NextToken | None = None,
) -> Samples:
    """Sample ``repeat`` responses for each tokenised prompt in one batch; prompts are read once.

    What all of them begin with is read once for all where that pays.

    Row ``i * repeat + j`` of the result is response ``j`` to prompt ``i``. A row ends at any of ``lm.end_ids``.

    Args:
        numbers: uniform numbers ``[rows, max_new_tokens]``; column ``t`` draws token ``t``.
        temperature: 0 is greedy.
        top_p: nucleus; 1 draws from the whole distribution.
        hidden: keep the hidden state that each token was drawn from.
        source: where next-token distributions come from, fresh for this batch; None: the model as it stands.
    """
    common = _common(lm, prompts) if source is None else 0
    source = NextToken(lm.model, hidden) if source is None else source
    ids, mask = pad_left(prompts, lm.pad, lm.device)
    logits, seen = _read(source, prompts, ids, mask, common)
    if repeat > 1:
        source.repeat(repeat)
        ids, mask, seen, logits = (each.repeat_interleave(repeat, dim=0) for each in (ids, mask, seen, logits))
    ends = torch.tensor(sorted(lm.end_ids), device=lm.device)
    tokens, logps, response, states = _continue(
        source, logits, seen, numbers.to(lm.device), ends, partial(draw, temperature=temperature, top_p=top_p)
    )
    return Samples(
        input_ids=torch.cat([ids, tokens.masked_fill(~response, lm.pad)], dim=1),
        attention_mask=torch.cat([mask, response.to(mask.dtype)], dim=1),
        response_mask=response,
        logps=logps.masked_fill(~response, 0.0),
        finished=(torch.isin(tokens, ends) & response).any(-1),
        hidden=None if states is None else states.masked_fill(~response.unsqueeze(-1), 0.0),
    )


def _common(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, a system prompt mostly, if it pays to read them once for all.

    It does not for tiny models, whose samples so stay what they were, bit for bit. 0 too where a window of tokens, or a
    state, is all that a layer remembers: what follows is read with padding between, in several tokens at once.
    """
    rows = [list(prompt) for prompt in prompts]
    first, last = min(rows), max(rows)  # all others lie between
    alike = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    alike = min(alike, *(len(row) - 1 for row in rows))
    if alike * (len(prompts) - 1) < SAVED or lm.model.num_parameters() <= TINY:
        return 0
    whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.model.config).layers)
    return alike if whole else 0


def _read(
    source: NextToken, prompts: Sequence[Sequence[int]], ids: Tensor, mask: Tensor, common: int
) -> tuple[Tensor, Tensor]:
    """Read prompts, of which the first ``common`` tokens are the same, into a fresh source.

    Returns logits of what follows each, and the mask of what was read, ``[rows, prompt]``: the source's memory has the
    padding after the tokens in common, where ``ids`` and ``mask`` have it before.
    """
    if not common:
        return source.read(ids, mask, positions(mask)), mask
    head = ids[:1, -len(prompts[0]) :][:, :common]
    one = torch.ones_like(head)
    source.read(head, one, positions(one))
    source.repeat(len(prompts))
    padding = ids.shape[1] - mask.sum(-1, keepdim=True)
    rest = torch.arange(ids.shape[1] - common, device=ids.device) >= padding
    seen = torch.cat([one.expand(len(prompts), -1), rest.long()], dim=1)
    return source.read(ids[:, common:], seen, positions(seen)[:, common:]), seen


def _continue(
    source: NextToken,
    logits: Tensor,
    mask: Tensor,
    numbers: Tensor,
    ends: Tensor,
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sample until all rows have ended, beginning with the ``logits`` of their first token.

    Rows that have ended leave the batch in groups, which changes nothing for the others. ``mask`` is that of what was
    read, ``[rows, prompt]``.

    Returns tokens, log-probabilities, which of them belong to a response, all ``[rows, T]``, and
    the states they were drawn from; outside a response anything may stand.
    """
    (count, steps), prompt = numbers.shape, mask.shape[1]
    tokens = torch.zeros((count, steps), dtype=torch.long, device=mask.device)
    logps = torch.zeros((count, steps), dtype=torch.float32, device=mask.device)
    response = torch.zeros((count, steps), dtype=torch.bool, device=mask.device)
    states: Tensor | None = None
    # From here on of the rows that are still read. The whole mask is made once, and each step sees more of it.
    rows, alive = torch.arange(count, device=mask.device), torch.ones(count, dtype=torch.bool, device=mask.device)
    seen, place = torch.cat([mask, mask.new_zeros(count, steps)], dim=1), positions(mask)[:, -1:]
    for step in range(steps):
        if step:
            place = place + 1
            logits = source.read(tokens[rows, step - 1 : step], seen[:, : prompt + step], place)
        chosen, logp = choose(logits, numbers[rows, step])
        tokens[rows, step], logps[rows, step], response[rows, step] = chosen, logp, alive
        if source.state is not None:
            states = source.state.new_zeros(count, steps, source.state.shape[-1]) if states is None else states
            states[rows, step] = source.state
        seen[:, prompt + step] = alive.to(seen.dtype)
        alive = alive & ~torch.isin(chosen, ends)
        live = int(alive.sum())
        if live == 0:
            break
        if live <= KEEP_ABOVE * len(rows):
            kept = alive.nonzero().squeeze(-1)
            source.keep(kept)
            rows, alive, seen, place = rows[kept], alive[kept], seen[kept], place[kept]
    used = int(response.sum(-1).max())
    return tokens[:, :used], logps[:, :used], response[:, :used], None if states is None else states[:, :used]


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse cumulative distribution; returns (token, log-probability), ``[rows]`` each.

    The log-probability is that of the policy at ``temperature`` (greedy: at 1), whatever the nucleus: renormalised, it
    would depend on how much was cut off, and two policies that cut differently could not be compared by it.
    """
    logits = logits.float()
    if temperature < COLDEST:
        best = logits.argmax(-1)
        return best, torch.log_softmax(logits, -1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    probs = log_probs.exp()
    if top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the most likely one always does.
        ranked = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, torch.zeros_like(ranked))
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
        probs = probs / probs.sum(-1, keepdim=True)
    token = _invert(probs, numbers.double().unsqueeze(-1))
    return token, log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _invert(probs: Tensor, numbers: Tensor) -> Tensor:
    """Return the first token of each row whose cumulative share is above its number ``[rows, 1]``, int ``[rows]``.

    Double precision keeps the last token reachable, and the first from being drawn at u = 0 by rounding. Over a large
    vocabulary it would cost more than the softmax: the chunk is searched first, then the token within it.
    """
    rows, size = probs.shape
    if size <= CHUNK:
        cumulative = probs.double().cumsum(-1)
        return (cumulative <= numbers * cumulative[:, -1:]).sum(-1).clamp_max(size - 1)
    full_chunks = size // CHUNK
    full = probs[:, : full_chunks * CHUNK].reshape(rows, full_chunks, CHUNK).sum(-1)
    sums = torch.cat([full, probs[:, full_chunks * CHUNK :].sum(-1, keepdim=True)], dim=-1).double()
    cumulative = sums.cumsum(-1)
    target = numbers * cumulative[:, -1:]
    chunk = (cumulative <= target).sum(-1, keepdim=True).clamp_max(full_chunks)
    # A chunk's sum and the sum of its cumulative shares differ by rounding: never before the chunk's first token with
    # mass, nor after its last.
    within = (target - (cumulative - sums).gather(-1, chunk)).clamp_min(0)
    places = chunk * CHUNK + torch.arange(CHUNK, device=probs.device)
    masses = probs.gather(-1, places.clamp_max(size - 1)).double().masked_fill(places >= size, 0.0)
    inner = masses.cumsum(-1)
    last = (inner < inner[:, -1:]).sum(-1)
    return chunk.squeeze(-1) * CHUNK + (inner <= within).sum(-1).minimum(last)


def responses(lm: LanguageModel, samples: Samples, stop: Sequence[str] = ()) -> list[str]:
    """Return the text of each sampled response, cut at the first stop text, without white space around it."""
    return [cut(text, stop) for text in lm.decode(_tokens(samples))]


def _tokens(samples: Samples) -> list[NDArray[np.int64]]:
    """Return the token ids of each response, ``[length]``, the end token included."""
    ids = samples.input_ids[:, -samples.response_mask.shape[1] :].cpu().numpy()
    lengths = samples.response_mask.sum(-1).tolist()
    return [row[:count] for row, count in zip(ids, lengths, strict=True)]


def cut(text: str, stop: Sequence[str]) -> str:
    """Return ``text`` up to the first stop text (for example the next turn marker), without white space around it.

    That is stripped last: a stop text may begin with white space, and stand where the text begins.
    """
    return min((text.partition(marker)[0] for marker in stop), key=len, default=text).strip()


def trim(lm: LanguageModel, samples: Samples, stop: Sequence[str]) -> Samples:
    """Return the samples with each response ending, finished, at the token that completes its first stop text, if any.

    The judge never sees what follows a stop text; a loss that sums over those tokens would learn from noise.
    """
    if not stop:
        return samples
    width = samples.response_mask.shape[1]
    rows = [row.tolist() for row in _tokens(samples)]
    stopped = _holds(lm, rows, stop)
    kept = [_length(lm, row, stop) if has_stop else len(row) for row, has_stop in zip(rows, stopped, strict=True)]
    inside = torch.arange(width)[None, :] < torch.tensor(kept)[:, None]
    mask = samples.response_mask & inside.to(samples.response_mask.device)
    attention, input_ids = samples.attention_mask.clone(), samples.input_ids.clone()
    attention[:, -width:] = mask.to(attention.dtype)
    input_ids[:, -width:] = torch.where(mask, input_ids[:, -width:], lm.pad)
    return replace(
        samples,
        input_ids=input_ids,
        attention_mask=attention,
        response_mask=mask,
        logps=torch.where(mask, samples.logps, torch.zeros_like(samples.logps)),
        finished=samples.finished | torch.tensor(stopped, device=samples.finished.device),
    )


def _holds(lm: LanguageModel, rows: Sequence[Sequence[int]], stop: Sequence[str]) -> list[bool]:
    """Return which rows' text holds a stop text."""
    return [any(marker in text for marker in stop) for text in lm.decode(rows)]


def _length(lm: LanguageModel, row: Sequence[int], stop: Sequence[str]) -> int:
    """Return after how many tokens the first stop text of a row that holds one is complete (and stays so)."""
    return 1 + bisect.bisect_left(range(1, len(row)), True, key=lambda count: _holds(lm, [row[:count]], stop)[0])


def generate(
    lm: LanguageModel,
    texts: Sequence[str],
    rows: Sequence[int],
    sampling: Sampling,
    source: Callable[[Sequence[int]], NextToken] | None = None,
) -> Generated:
    """Sample a response for every rendered prompt in length-sorted batches; returned in the order of ``texts``.

    ``rows`` fix each response's randomness (see :func:`uniforms`); ``source(places)`` makes the next-token
    distributions of a batch of ``texts[places]``, None: those of the model as it stands.
    """
    lm.model.eval()
    encoded, count = lm.encode(texts, sampling.max_prompt_tokens), len(texts)
    order = sorted(range(count), key=lambda i: len(encoded[i]))
    generated = unknown(lm, count)
    for start in range(0, count, sampling.batch_size):
        part = order[start : start + sampling.batch_size]
        drawn = sample(
            lm,
            [encoded[i] for i in part],
            uniforms(sampling.seed, [rows[i] for i in part], sampling.max_new_tokens),
            sampling.temperature,
            sampling.top_p,
            source=None if source is None else source(part),
        )
        keep(lm, drawn, generated, part, sampling.stop)
    return generated


def keep(lm: LanguageModel, drawn: Samples, generated: Generated, places: Sequence[int], stop: Sequence[str]) -> None:
    """Put samples into ``generated``, whose traces are known, at ``places``; a text is cut at its first stop text."""
    traces = generated.traces
    assert traces is not None
    generated.tokens += drawn.tokens
    drawn = trim(lm, drawn, stop)
    rows, logps, finished = _tokens(drawn), drawn.logps.cpu().double().numpy(), drawn.finished.tolist()
    for i, row, logp, end, text in zip(places, rows, logps, finished, responses(lm, drawn, stop), strict=True):
        generated.responses[i] = text
        # A copy: a view of one row would keep the whole batch in memory.
        traces.ids[i], traces.logps[i] = row.copy(), float(logp[: len(row)].sum())
        traces.finished[i] = end


def unknown(lm: LanguageModel, count: int) -> Generated:
    """Return ``count`` empty responses, for :func:`keep`."""
    traces = Traces(lm.tokenizer, [np.empty(0, dtype=np.int64)] * count, [0.0] * count, [False] * count)
    return Generated([""] * count, 0, traces)

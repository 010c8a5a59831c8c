"""A mixture of experts as a source of next tokens: n frozen adapters of one base, weighed anew at every token.

In probability space (PCM, arXiv 2407.04181): ``pi(v) = sum_i a_i pi_i(v)``. In logit space (MOD, arXiv 2406.18853):
``log pi(v) = sum_i a_i log pi_i(v) + const``. Experts are black boxes: nothing of them is read but their probabilities.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from moalign.lm.log_probs import positions, token_outputs
from moalign.lm.sampler import NextToken, Samples
from moalign.lm.side_by_side import SideBySide

Space = Literal["probability", "logit"]


def mix(log_probs: Tensor, weights: Tensor, space: Space) -> Tensor:
    """Return the log of the mixture, ``[..., vocabulary]``; in logit space up to a constant of each row.

    Of p1 = (.7, .2, .1) and p2 = (.1, .2, .7) at weights (.5, .5) probability space makes (.4, .2, .4) and logit space
    (.3629, .2743, .3629). An expert of weight 0 has no say, also where it gives a token no probability at all.

    Args:
        log_probs: log-probabilities of each expert, ``[n, ..., vocabulary]``.
        weights: on the simplex, ``[..., n]``.
    """
    by_expert = weights.movedim(-1, 0).unsqueeze(-1).to(log_probs.dtype)
    if space == "probability":
        return torch.logsumexp(log_probs + by_expert.log(), dim=0)
    return torch.where(by_expert == 0, torch.zeros_like(log_probs), by_expert * log_probs).sum(0)


class Weights(Protocol):
    """What weighs the experts: it reads the tokens that the mixture reads."""

    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Return the weights of the token after the last, ``[rows, n]``; arguments as :meth:`.NextToken.read` has."""
        ...

    def repeat(self, times: int) -> None:
        """See :class:`.NextToken`."""
        ...

    def keep(self, rows: Tensor) -> None:
        """See :class:`.NextToken`."""
        ...


class Constant:
    """The same weights at every token; a preference of its own in every row. See :class:`Weights`."""

    def __init__(self, weights: Tensor) -> None:
        """Weigh by ``weights``, ``[rows, n]``."""
        self.weights = weights

    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """See :class:`Weights`."""
        return self.weights

    def repeat(self, times: int) -> None:
        """See :class:`.NextToken`."""
        self.weights = self.weights.repeat_interleave(times, dim=0)

    def keep(self, rows: Tensor) -> None:
        """See :class:`.NextToken`."""
        self.weights = self.weights[rows]


class Mixture(NextToken):
    """The next token as n experts see it together. See :class:`~.sampler.NextToken`.

    ``source`` reads n equal parts of rows, one an expert: one pass, and one cache, which is what memory grows by.
    """

    def __init__(self, source: NextToken, experts: int, weights: Weights, space: Space = "probability") -> None:
        """Begin a batch of a mixture of so many experts."""
        self.source, self.experts, self.weights, self.space = source, experts, weights, space
        self._rows = 0

    @property
    def state(self) -> Tensor | None:  # type: ignore[override]
        """The hidden state of what weighs the experts, where it keeps it."""
        return getattr(self.weights, "state", None)

    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """Return the log of the mixture, ``[rows, vocabulary]``."""
        n, self._rows = self.experts, len(ids)
        logits = self.source.read(ids.repeat(n, 1), mask.repeat(n, 1), place.repeat(n, 1))
        log_probs = torch.log_softmax(logits.float(), dim=-1).view(n, len(ids), -1)
        return mix(log_probs, self.weights.read(ids, mask, place), self.space)

    def repeat(self, times: int) -> None:
        self.source.repeat(times)
        self.weights.repeat(times)
        self._rows *= times

    def keep(self, rows: Tensor) -> None:
        self.source.keep(torch.cat([rows + part * self._rows for part in range(self.experts)]))
        self.weights.keep(rows)
        self._rows = len(rows)


class OwnPrompt(NextToken):
    """A source that reads prompts of its own in place of the sampler's. See :class:`~.sampler.NextToken`."""

    def __init__(self, source: NextToken, ids: Tensor, mask: Tensor) -> None:
        """Let ``source`` read the prompts ``ids`` with ``mask``, ``[rows, length]``, padded on the left."""
        self.source, self._ids, self._mask = source, ids, mask
        self._others: int | None = None

    @property
    def state(self) -> Tensor | None:  # type: ignore[override]
        return self.source.state

    def read(self, ids: Tensor, mask: Tensor, place: Tensor) -> Tensor:
        """See :meth:`.NextToken.read`; what follows the prompt is read as it is given."""
        if self._others is None:
            self._others = mask.shape[1]
            return self.source.read(self._ids, self._mask, positions(self._mask))
        whole = torch.cat([self._mask, mask[:, self._others :]], dim=1)
        return self.source.read(ids, whole, positions(whole)[:, -ids.shape[1] :])

    def repeat(self, times: int) -> None:
        self.source.repeat(times)
        self._mask = self._mask.repeat_interleave(times, dim=0)

    def keep(self, rows: Tensor) -> None:
        self.source.keep(rows)
        self._mask = self._mask[rows]


@torch.no_grad()
def expert_log_probs(
    experts: SideBySide, prompts: tuple[Tensor, Tensor], samples: Samples, rows: Tensor, space: Space
) -> Tensor:
    """Return what each expert makes of sampled responses, as much of it as the mixture's log-probabilities need.

    In probability space that is the log-probability of each sampled token, ``[rows, T, n]``, 0 outside responses; in
    logit space that of every token of the vocabulary at each place, ``[rows, T, n, vocabulary]``.

    Args:
        prompts: ids and mask of what the experts read, one a row of ``samples``.
        rows: which of the samples; all are read at once.
    """
    n, width = len(experts.names), samples.response_mask.shape[1]
    ids = torch.cat([prompts[0], samples.input_ids[:, -width:]], dim=1)[rows]
    mask = torch.cat([prompts[1], samples.attention_mask[:, -width:]], dim=1)[rows]
    tokens, read, inside = (tensor.repeat(n, 1) for tensor in (ids, mask, samples.response_mask[rows]))
    if space == "probability":
        with experts.on():
            logps = token_outputs(experts.lm.model, tokens, read, inside).logps
        return logps.view(n, len(ids), width).permute(1, 2, 0)
    known = {"attention_mask": read, "position_ids": positions(read), "logits_to_keep": width + 1}
    logits = experts(input_ids=tokens, use_cache=False, **known).logits[:, :-1]
    return torch.log_softmax(logits.float(), dim=-1).view(n, len(ids), width, -1).permute(1, 2, 0, 3)


def mixture_logps(expert_logps: Tensor, log_weights: Tensor) -> Tensor:
    """Return ``ln sum_i a_i q_i`` of each token, in probability space, ``[rows, T]``.

    Args:
        expert_logps: ln q of each token under each expert, ``[rows, T, n]``.
        log_weights: ln a, ``[rows, T, n]``; -inf for an expert that has no say.
    """
    return torch.logsumexp(expert_logps + log_weights, dim=-1)


def logit_mixture_logps(log_probs: Tensor, log_weights: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each of the ``tokens`` in logit space, ``[rows, T]``.

    Args:
        log_probs: of every token of the vocabulary under each expert, ``[rows, T, n, vocabulary]``.
        log_weights: as :func:`mixture_logps` has them.
        tokens: ids, ``[rows, T]``.
    """
    mixed = mix(log_probs.movedim(2, 0), log_weights.exp(), "logit")
    return mixed.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - mixed.logsumexp(-1)

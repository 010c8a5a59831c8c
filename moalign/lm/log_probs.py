"""Log-probabilities of marked tokens without the logits of all others.

The logits of a batch are by far its largest tensor: 4,096 tokens of 49,152 words take 800 MB, and a plain log-softmax
with its gradient holds several such. Here only hidden states that predict marked tokens reach the model's head, and
where they are many, a chunk at a time, forward and backward.

Where several rows begin with one prompt, it may be read once for all of them (``share_prompts``): into a cache, under
autograd, which is then repeated for the rows, and only their responses are read on top of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from moalign.core.errors import RequestError

AT_ONCE = 2**23
"""Logits held at a time (32 MB in single precision); with no more than these in all, the plain formula is used."""

_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a head alone makes its model's logits, as far as tested; see :func:`_is_linear`."""


def positions(attention_mask: Tensor) -> Tensor:
    """Return position ids that do not count padding, on either side; int ``[batch, length]``."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def without_padding(ids: Tensor, mask: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments of :func:`token_outputs` without the columns that no row uses, on either side.

    At least one column is left of both prompts and responses.
    """
    start, used = ids.shape[1] - response_mask.shape[1], mask.any(0).nonzero()
    first, end = min(int(used[0]), start - 1), max(int(used[-1]), start) + 1
    return ids[:, first:end], mask[:, first:end], response_mask[:, : end - start]


@dataclass
class TokenOutputs:
    """What one forward pass gives for the last ``T`` tokens of each row; 0 outside the mask."""

    logps: Tensor
    """log pi of each token, ``[batch, T]``."""
    entropy: Tensor
    """Entropy of the distribution each token was drawn from, in nats, ``[batch, T]``; no gradient."""
    hidden: Tensor | None = None
    """Last hidden state before each token, ``[batch, T, width]``, if requested."""

    def padded(self, width: int) -> TokenOutputs:
        """Return the same with zeros on the right, so that T is ``width``."""
        more = width - self.logps.shape[1]
        hidden = None if self.hidden is None else nn.functional.pad(self.hidden, (0, 0, 0, more))
        return TokenOutputs(
            nn.functional.pad(self.logps, (0, more)), nn.functional.pad(self.entropy, (0, more)), hidden
        )


def token_outputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    hidden: bool = False,
    share_prompts: bool = False,
) -> TokenOutputs:
    """Log-probabilities of the tokens that ``response_mask`` marks, padding on either side; in single precision.

    The head's input is tapped, so that the model itself makes the logits of the marked places, softcapping, scaling
    and adapters included. Where the head is a frozen linear map and nothing follows it, they are made in chunks.

    Args:
        response_mask: bool ``[batch, T]`` over the last T columns; True on response tokens, the end token included.
        temperature: the sampler's; log-probabilities are of the very distribution sampled from.
        hidden: also return the hidden states that predicted the tokens (for value heads).
        share_prompts: read what several rows have before the last T columns, padding on the left, once for all of
            them; for models of :func:`moalign.lm.shared_prompts.require`.
    """
    width = response_mask.shape[1]
    chosen = input_ids[:, -width:][response_mask]
    reading = _on_prompts(model, input_ids, attention_mask, width) if share_prompts else None
    inputs, predicting = reading or _whole(input_ids, attention_mask, width, hidden)
    head = _head(model)
    frozen = type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    chunked = frozen and len(chosen) * head.out_features > AT_ONCE and _linear.get(head, True)
    tapped: list[Tensor] = []  # states that predict the tokens, [rows, T, width]; of marked ones; what the head reads

    def tap(states: Tensor) -> Tensor:
        whole = predicting(states)
        marked = whole[response_mask]
        # Chunks are made later; now a probe will do. It is long: a softcap, nearly linear around 0, shows.
        tapped[:] = whole, marked, (100.0 * marked[:1].detach() if chunked else marked).unsqueeze(0)
        return tapped[2]

    with _tapped(head, tap):
        output = model(**inputs)
    if not tapped:  # this model's head is not called as a module
        logps, entropy = _plain(predicting(output.logits)[response_mask], chosen, temperature)
    elif not chunked:
        logps, entropy = _plain(output.logits[0], chosen, temperature)
    elif _is_linear(head, tapped[2], output.logits):
        logps, entropy = _in_chunks(head, tapped[1], chosen, temperature)
    else:  # now known not to be linear
        return token_outputs(model, input_ids, attention_mask, response_mask, temperature, hidden, share_prompts)
    zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=logps.device)
    states = (tapped[0] if reading else predicting(output.hidden_states[-1])) if hidden else None
    return TokenOutputs(
        zeros.masked_scatter(response_mask, logps), zeros.masked_scatter(response_mask, entropy), states
    )


Reading = tuple[dict[str, Any], Callable[[Tensor], Tensor]]
"""A model's inputs, and what makes of its outputs ``[rows, columns, ...]`` those that predict the last T tokens."""


def _whole(ids: Tensor, mask: Tensor, width: int, hidden: bool) -> Reading:
    """Read whole rows ``[rows, columns]``, of which the last ``width`` tokens are predicted."""
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions(mask),
        "output_hidden_states": hidden,
        "use_cache": False,
        "logits_to_keep": width + 1,
    }
    return inputs, lambda outputs: outputs[:, -(width + 1) : -1]


def _on_prompts(model: Any, ids: Tensor, mask: Tensor, width: int) -> Reading | None:
    """Read each prompt once, now, and the ``width`` tokens after it on top of that; None where no two rows share one.

    The state after a prompt predicts the first token of all its responses.
    """
    prompts = torch.where(mask[:, :-width].bool(), ids[:, :-width], -1)
    distinct, which = torch.unique(prompts, dim=0, return_inverse=True)
    if len(distinct) == len(ids):
        return None
    cache = DynamicCache(config=model.config)
    last = _states_after(model, distinct.clamp_min(0), (distinct >= 0).long(), cache).index_select(0, which)
    if cache.get_seq_length() != prompts.shape[1]:
        raise RequestError(
            "share_prompts: the model kept no cache of the prompts that it read, as with gradient checkpointing; "
            "switch off one of the two"
        )
    cache.reorder_cache(which)  # every kind of layer has it
    begin, end = prompts.shape[1], ids.shape[1] - (1 if width > 1 else 0)  # nothing follows the last token
    inputs = {
        "input_ids": ids[:, begin:end],
        "attention_mask": mask[:, :end],
        "position_ids": positions(mask)[:, begin:end],
        "past_key_values": cache,
        "use_cache": True,
    }
    return inputs, lambda states: torch.cat([last.unsqueeze(1), states], dim=1)[:, :width]


def _states_after(model: Any, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Read rows padded on the left into a cache; return what the head would read of the last tokens, ``[rows, width]``.

    Raises TypeError when the model does not call its head as a module.
    """
    kept: list[Tensor] = []

    def keep(states: Tensor) -> Tensor:
        kept[:] = [states[:, -1]]
        return states[:1, -1:]

    with _tapped(_head(model), keep):
        known = {"attention_mask": mask, "position_ids": positions(mask), "past_key_values": cache}
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **known)
    if not kept:
        raise TypeError("its output layer is no module of its own")
    return kept[0]


def _head(model: Any) -> Any:
    """Return the layer that makes a model's logits, None where it has no such layer."""
    return getattr(model, "get_output_embeddings", lambda: None)()


@contextlib.contextmanager
def _tapped(head: Any, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block the head reads what ``change`` makes of the states that reach it."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (change(inputs[0]), *inputs[1:]) if inputs else None

    handle = None if head is None else head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _as_read(head: nn.Linear, states: Tensor) -> Tensor:
    """Return states in the precision in which the head reads them, where autocast does not see to it.

    accelerate has autocast on within the model's forward pass alone; on a GPU a LayerNorm's output leaves it in single
    precision, whatever the head's.
    """
    return states if torch.is_autocast_enabled(states.device.type) else states.to(head.weight.dtype)


@torch.no_grad()
def _is_linear(head: nn.Linear, sent: Tensor, logits: Tensor) -> bool:
    """Whether the model makes the head's own logits of ``sent``: no softcap or the like follows. Tested once a head."""
    if head not in _linear:
        own = nn.functional.linear(_as_read(head, sent), head.weight, head.bias).float()
        _linear[head] = bool((own - logits.float()).abs().max() <= 0.01 * own.abs().max())
    return _linear[head]


def _plain(logits: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the ``chosen`` tokens and entropies, ``[marked]``, of logits ``[marked, words]``."""
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    log_probs = torch.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
    return log_probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1), entropy


def _in_chunks(head: nn.Linear, states: Tensor, chosen: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return what :func:`_plain` does of the head's logits of ``states`` ``[marked, width]``."""
    states = _as_read(head, states)
    learns = torch.is_grad_enabled() and states.requires_grad
    apply: Any = _ChunkedLogProbs.apply
    logps, entropy = apply(states, head.weight, head.bias, chosen, temperature, learns)
    return logps, entropy


class _ChunkedLogProbs(torch.autograd.Function):
    """Log-probabilities under a frozen linear head, a chunk of positions at a time.

    ``log p_y`` of a place depends on its own state alone, with the gradient ``(W_y - sum_v p_v W_v) / temperature``:
    ``[marked, width]`` in all, made while the logits are there, so that nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, temperature: float, learns: bool
    ) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(states.device.type):  # once, not once a chunk
            weight = weight.to(torch.get_autocast_dtype(states.device.type))
        size = max(1, AT_ONCE // len(weight))
        logps = torch.empty(len(states), dtype=torch.float32, device=states.device)
        entropy, slopes = torch.empty_like(logps), torch.empty_like(states) if learns else None
        for first in range(0, len(states), size):
            part = slice(first, first + size)
            logits = nn.functional.linear(states[part], weight, bias).float().div_(temperature)
            log_total = torch.logsumexp(logits, dim=-1)
            picked = logits.gather(-1, chosen[part, None]).squeeze(-1)
            logps[part] = picked - log_total
            probs = torch.exp(logits - log_total.unsqueeze(-1))
            # entr() and not a product with the logits: a word ruled out has 0 * -inf.
            entropy[part] = torch.special.entr(probs).sum(-1)
            if slopes is not None:
                mean = probs.to(weight.dtype) @ weight
                slopes[part] = ((weight[chosen[part]] - mean) / temperature).to(slopes.dtype)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(slopes)
        return logps, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad.unsqueeze(-1).to(slopes.dtype) * slopes, None, None, None, None, None

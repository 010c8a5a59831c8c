"""Log-probabilities of marked tokens without the logits of all others.

The logits of a batch are by far its largest tensor: 4,096 tokens of 49,152 words take 800 MB, and a plain log-softmax
with its gradient holds several such. Here only hidden states that predict marked tokens reach the model's head, and
where they are many, a chunk at a time, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

AT_ONCE = 2**23
"""Logits held at a time (32 MB in single precision); with no more than these in all, the plain formula is used."""

_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a head alone makes its model's logits, as far as tested; see :func:`_is_linear`."""


def positions(attention_mask: Tensor) -> Tensor:
    """Return position ids that do not count padding, on either side; int ``[batch, length]``."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


@dataclass
class TokenOutputs:
    """What one forward pass gives for the last ``T`` tokens of each row; 0 outside the mask."""

    logps: Tensor
    """log pi of each token, ``[batch, T]``."""
    entropy: Tensor
    """Entropy of the distribution each token was drawn from, in nats, ``[batch, T]``; no gradient."""
    hidden: Tensor | None = None
    """Last hidden state before each token, ``[batch, T, width]``, if requested."""


def token_outputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    hidden: bool = False,
) -> TokenOutputs:
    """Log-probabilities of the tokens that ``response_mask`` marks, padding on either side; in single precision.

    The head's input is tapped, so that the model itself makes the logits of the marked places, softcapping, scaling
    and adapters included. Where the head is a frozen linear map and nothing follows it, they are made in chunks.

    Args:
        response_mask: bool ``[batch, T]`` over the last T columns; True on response tokens, the end token included.
        temperature: the sampler's; log-probabilities are of the very distribution sampled from.
        hidden: also return the hidden states that predicted the tokens (for value heads).
    """
    width = response_mask.shape[1]
    before, chosen = slice(-(width + 1), -1), input_ids[:, -width:][response_mask]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    frozen = type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())
    chunked = frozen and len(chosen) * head.out_features > AT_ONCE and _linear.get(head, True)
    tapped: list[Tensor] = []  # the states that predict the marked tokens, [marked, width], and what the head reads

    def tap(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not inputs:
            return None
        states = inputs[0][:, before][response_mask]
        # Chunks are made later; now a probe will do. It is long: a softcap, nearly linear around 0, shows.
        tapped[:] = states, (100.0 * states[:1].detach() if chunked else states).unsqueeze(0)
        return (tapped[1], *inputs[1:])

    handle = None if head is None else head.register_forward_pre_hook(tap)
    try:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask),
            output_hidden_states=hidden,
            use_cache=False,
            logits_to_keep=width + 1,
        )
    finally:
        if handle is not None:
            handle.remove()
    if not tapped:  # this model's head is not called as a module
        logps, entropy = _plain(output.logits[:, before][response_mask], chosen, temperature)
    elif not chunked:
        logps, entropy = _plain(output.logits[0], chosen, temperature)
    elif _is_linear(head, tapped[1], output.logits):
        logps, entropy = _in_chunks(head, tapped[0], chosen, temperature)
    else:  # now known not to be linear
        return token_outputs(model, input_ids, attention_mask, response_mask, temperature, hidden)
    zeros = torch.zeros(response_mask.shape, dtype=torch.float32, device=logps.device)
    states = output.hidden_states[-1][:, before] if hidden else None
    return TokenOutputs(
        zeros.masked_scatter(response_mask, logps), zeros.masked_scatter(response_mask, entropy), states
    )


@torch.no_grad()
def _is_linear(head: nn.Linear, sent: Tensor, logits: Tensor) -> bool:
    """Whether the model makes the head's own logits of ``sent``: no softcap or the like follows. Tested once a head."""
    if head not in _linear:
        own = nn.functional.linear(sent, head.weight, head.bias).float()
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

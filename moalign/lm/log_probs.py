"""Log-probabilities of marked tokens without the logits of all others.

The logits of a batch are by far its largest tensor: 4,096 tokens of 49,152 words take 800 MB, and a plain log-softmax
with its gradient holds several such. Here only hidden states that predict marked tokens reach the model's head, and
where they are many, a chunk at a time, forward and backward.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

AT_ONCE = 2**23
"""Logits held at a time (32 MB in single precision); with no more than these in all, the plain formula is used."""

_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a head alone makes its model's logits, as far as tested; see :func:`_is_linear`."""


def token_log_probs(
    model: Any, mask: Tensor, tokens: Tensor, temperature: float, **inputs: Any
) -> tuple[Tensor, Tensor, Any]:
    """Run ``model`` and return (log pi, entropy) of the tokens that ``mask`` marks, ``[marked]`` each, and its output.

    Both are of the distribution at ``temperature``, in single precision; the entropy has no gradient. The output's
    logits are not to be read.

    The head's input is tapped, so that the model itself makes the logits of the marked places, softcapping, scaling
    and adapters included. Where the head is a frozen linear map and nothing follows it, they are made in chunks.

    Args:
        mask: bool ``[batch, T]`` over the last T of the columns of ``inputs``.
        tokens: ``[batch, T]``.
        inputs: what the model is called with.
    """
    chosen = tokens[mask]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    chunked = (
        type(head) is nn.Linear
        and len(chosen) * head.out_features > AT_ONCE
        and not any(parameter.requires_grad for parameter in head.parameters())
        and _linear.get(head, True)
    )
    tap = _Tap(mask, probe=chunked)
    handle = None if head is None else head.register_forward_pre_hook(tap)
    try:
        output = model(**inputs, logits_to_keep=mask.shape[1] + 1)
    finally:
        if handle is not None:
            handle.remove()
    if tap.states is None:  # this model's head is not called as a module
        logits = output.logits[:, -(mask.shape[1] + 1) : -1][mask]
    elif not chunked:
        logits = output.logits[0]
    elif _is_linear(head, tap, output.logits):
        return *_in_chunks(head, tap.states, chosen, temperature), output
    else:
        return token_log_probs(model, mask, tokens, temperature, **inputs)  # now known not to be linear
    return *_plain(logits, chosen, temperature), output


class _Tap:
    """A hook on the head's input: keeps the states of the marked places, and lets through these or a probe alone."""

    def __init__(self, mask: Tensor, probe: bool) -> None:
        self._mask, self._probe = mask, probe
        self.states: Tensor | None = None
        """Hidden states that predict the marked tokens, ``[marked, width]``."""
        self.sent: Tensor
        """What the head reads instead, ``[1, places, width]``."""

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not inputs:
            return None
        self.states = inputs[0][:, -(self._mask.shape[1] + 1) : -1][self._mask]
        # The probe is long: a softcap, nearly linear around 0, shows.
        self.sent = (100.0 * self.states[:1].detach() if self._probe else self.states).unsqueeze(0)
        return (self.sent, *inputs[1:])


@torch.no_grad()
def _is_linear(head: nn.Linear, tap: _Tap, logits: Tensor) -> bool:
    """Whether the model's logits are the head's own: no scale, softcap or the like follows it. Tested once per head."""
    if head not in _linear:
        own = nn.functional.linear(tap.sent, head.weight, head.bias).float()
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

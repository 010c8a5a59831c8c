"""Whether a model can read a prompt once for several responses: it is tried, since every kind of cache has its own way.

Attention over all tokens can. The state of a recurrent layer is mostly made for one token at a time, and some layers
write into it in place, which no gradient survives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moalign.core.errors import RequestError
from moalign.lm.language_model import LanguageModel
from moalign.lm.loading import first_line
from moalign.lm.log_probs import token_outputs

FAR = {torch.float32: 0.01, torch.float64: 0.01}
"""How far, as a share of the largest, log-probabilities and gradients may be from those of whole rows."""
FAR_IN_HALF = 0.2


def require(lm: LanguageModel, checkpointing: bool = False) -> None:
    """Raise RequestError unless ``lm``, as it stands, gives the same whether a shared prompt is read once or each time.

    Two prompts with two and three responses are read both ways, with the gradients of what is trained. Refused without
    a try where layers will be computed again for the gradient (``checkpointing``), or are set to be.
    """
    kind = type(lm.model.get_base_model() if hasattr(lm.model, "get_base_model") else lm.model).__name__
    where = f"share_prompts: {lm.source} ({kind})"
    if checkpointing or any(getattr(module, "gradient_checkpointing", False) for module in lm.model.modules()):
        raise RequestError(
            f"{where}: gradient checkpointing keeps no cache, so a prompt cannot be read once for several responses; "
            "switch off one of the two"
        )
    trained, training = [p for p in lm.model.parameters() if p.requires_grad], lm.model.training
    lm.model.eval()
    try:
        once, each_time = (_read(lm, trained, share) for share in (True, False))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # caches refuse in many ways
        raise RequestError(_cannot(where, f"{type(error).__name__}: {first_line(error)}")) from None
    finally:
        lm.model.train(training)
    allowed = FAR.get(lm.model.dtype, FAR_IN_HALF)
    for what, left, right in zip(("log-probabilities", "gradients"), once, each_time, strict=True):
        apart, largest = float((left - right).abs().max()), float(right.abs().max())
        if not apart <= allowed * largest:
            raise RequestError(_cannot(where, f"{what} differ by {apart:.2g}, of {largest:.2g} at most"))


def _cannot(where: str, why: str) -> str:
    return f"{where}: a prompt that was read once cannot be continued by several responses ({why}); set it to false"


def _read(lm: LanguageModel, trained: list[torch.nn.Parameter], share: bool) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of made-up responses, and the gradient of their sum, both flat."""
    words = int(lm.model.get_input_embeddings().weight.shape[0])
    prompt, width = 6, 5
    ids = (torch.arange(5 * (prompt + width)).reshape(5, -1) * 31 + 7) % words
    mask = torch.ones_like(ids)
    ids[1], ids[3:, :prompt] = torch.where(torch.arange(prompt + width) < prompt, ids[0], ids[1]), ids[2, :prompt]
    mask[2:, :2] = 0  # padding on the left, and below on the right
    for row, length in enumerate((5, 2, 4, 5, 1)):
        mask[row, prompt + length :] = 0
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    logps = token_outputs(lm.model, ids, mask, mask[:, prompt:].bool(), share_prompts=share).logps
    if not trained:
        return logps.detach(), torch.ones(1)
    found = torch.autograd.grad(logps.sum(), trained, allow_unused=True)
    return logps.detach(), torch.cat([grad.float().flatten() for grad in found if grad is not None])

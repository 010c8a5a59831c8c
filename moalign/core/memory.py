"""Memory that nothing refers to any more, given back at once: one model may be most of a machine's."""

from __future__ import annotations

import gc
import sys


def release() -> None:
    """Collect what is in cycles (models are), and give back what torch keeps of a GPU for later.

    Call it where no local variable holds a model any more. Another process finds the GPU's memory free then.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

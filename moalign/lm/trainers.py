"""Helpers for the trainers of transformers and trl: no printing of their own, and names that differ by version."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moalign.core.errors import RequestError
from moalign.lm.loading import first_line, quiet


def checkpointing_option() -> str:
    """Return what the installed transformers calls gradient checkpointing among a trainer's arguments.

    5.17 knows the old name only, 5.23 warns of it.
    """
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"


def on_one_gpu(options: Any) -> Any:
    """Return a trainer's arguments for one GPU, also where there are several.

    transformers would make each batch as many times larger and spread it over copies of the model, past our losses.
    """
    options._n_gpu = min(options.n_gpu, 1)
    return options


@contextlib.contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Within the block, if ``on``, a causal model's layers keep only their inputs, and compute again for the gradient.

    The recomputation is torch's non-reentrant one: it finds the adapters' parameters by itself, so that the
    embeddings' output, which transformers would make require a gradient, need not. A layer does it in training mode
    alone. Raises RequestError for a model that cannot.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = checkpointing_option()  # the model's methods have the same two names
    if on:
        try:
            getattr(base, f"{kind}_enable")({"use_reentrant": False})
        except ValueError as error:
            raise RequestError(f"policy.gradient_checkpointing: {first_line(error)}") from None
        base.disable_input_require_grads()
    try:
        yield
    finally:
        if on:
            getattr(base, f"{kind}_disable")()


@contextlib.contextmanager
def own_precision(parameters: Sequence[Any]) -> Iterator[None]:
    """Within the block a trainer is made; afterwards the parameters are what they were.

    On a base in 4 bits trl's trainers round all that is trained to bfloat16, in which small updates are lost.
    """
    before = [parameter.data for parameter in parameters]
    yield
    for parameter, data in zip(parameters, before, strict=True):
        if parameter.dtype != data.dtype:
            parameter.data = data


def run_trainer(trainer: Any, watch: Callable[[str, float], Any], complete: Callable[[], None] = lambda: None) -> None:
    """Train without the library's own printing.

    Before every update ``complete()`` is called, once the gradients of the step are there, then, when they are clipped,
    ``watch("gradient norm", norm)``; what these raise ends the training.
    """
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    clip = trainer.accelerator.clip_grad_norm_  # no callback is given the norm, and the log has that of some steps only

    def watched(*arguments: Any, **options: Any) -> Any:
        complete()
        norm = clip(*arguments, **options)
        watch("gradient norm", float(norm))
        return norm

    trainer.accelerator.clip_grad_norm_ = watched
    try:
        trainer.train()
    finally:
        del trainer.accelerator.clip_grad_norm_  # a cycle that would hold model and optimizer


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and notices of libraries: moalign has its own."""
    import datasets

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets.disable_progress_bars()
    accelerate = logging.getLogger("accelerate")
    level = accelerate.level
    accelerate.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        accelerate.setLevel(level)

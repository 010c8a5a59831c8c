"""Log-probabilities of fixed responses under the reference, computed once and stored for training.

They are stored by content (the model's weights and the tokens): in the task's folder for the base, shared by every
preference, seed and method that trains on the same rows; in the run's folder for a trained start. An evaluation calls
:func:`log_probs`, which stores nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moalign.core.records import Response
from moalign.lm.chat import training_row

if TYPE_CHECKING:
    import torch

    from moalign.lm.language_model import LanguageModel
    from moalign.training.job import Job

FOLDER = "reference"
BATCH_TOKENS = 4096
"""Padded tokens in one forward pass."""

Row = tuple[list[int], int]
"""Token ids of prompt and response, and how many of them are the response."""


def rows_of(lm: LanguageModel, texts: Iterable[str], responses: Iterable[Response | str], max_tokens: int) -> list[Row]:
    """Return rendered prompts with their responses as rows of at most ``max_tokens``; of an empty response 0 tokens."""
    pairs = zip(texts, responses, strict=True)
    cut = [training_row(lm.codec, text, Response.of(response), max_tokens) for text, response in pairs]
    return [(head + tail, len(tail)) for head, tail in cut]


def reference_log_probs(job: Job, lm: LanguageModel, rows: Sequence[Row], own: bool = False) -> NDArray[np.float32]:
    """Return ``log pi_ref`` of each row's response, ``[rows]``, computed now or read from the store.

    The reference is the base, or with ``own`` the active adapter of ``lm`` as it is now.
    """
    from filelock import FileLock

    from moalign.runs import atomic, checkpoint

    folder = (job.run.path if own else job.task.folder) / FOLDER
    path = folder / f"{_content(lm, rows, own)}.safetensors"
    with atomic.refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(path) + ".lock")
        lock.acquire()
    try:
        if not path.is_file():
            checkpoint.save_tensors(path, {"logps": _compute(job, lm, rows, own)})
        return np.asarray(checkpoint.load_tensors(path)["logps"].numpy())
    finally:
        lock.release()


def distinct_log_probs(job: Job, lm: LanguageModel, rows: Sequence[Row], own: bool = False) -> NDArray[np.float32]:
    """Return :func:`reference_log_probs`; a row that comes several times is read once."""
    keys = [(tuple(ids), length) for ids, length in rows]
    places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    logps = reference_log_probs(job, lm, [(list(ids), length) for ids, length in places], own)
    return logps[[places[key] for key in keys]]


def _content(lm: LanguageModel, rows: Sequence[Row], own: bool) -> str:
    """Return 16 hex digits over all that the log-probabilities depend on."""
    from moalign.lm import adapters

    held = f"{lm.model.dtype} 4-bit" if lm.in_4bit else lm.model.dtype
    digest = hashlib.sha256(f"{lm.fingerprint} {held} {lm.device.type}".encode())
    if own:
        for name, value in adapters.tensors(lm).items():
            digest.update(name.encode() + value.float().numpy().tobytes())
    for ids, length in rows:
        digest.update(np.asarray([len(ids), length, *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def _compute(job: Job, lm: LanguageModel, rows: Sequence[Row], own: bool) -> torch.Tensor:
    half = lm.device.type != "cpu"  # as in training
    return log_probs(lm, rows, own, half=half, progress=lambda done, total: job.progress("reference", done, total))


def log_probs(
    lm: LanguageModel,
    rows: Sequence[Row],
    own: bool = False,
    temperature: float = 1.0,
    half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return ``log pi`` of each row's response in nats, ``[rows]`` on the CPU; batches of about equal length.

    By the base, or with ``own`` by the active adapter of ``lm`` as it is now; of the distribution that a sampler would
    draw from at a ``temperature`` above 0; with ``half`` in bfloat16 where the model's operations allow it.
    ``progress(done, total)`` is called after every batch.
    """
    return _of_tokens(lm, rows, lambda tokens: tokens.sum(-1), own, temperature, half, progress)


def least_log_probs(lm: LanguageModel, rows: Sequence[Row], temperature: float = 1.0) -> torch.Tensor:
    """Return the log-probability, to the base, of the least likely token of each row's response, ``[rows]``."""
    return _of_tokens(lm, rows, lambda tokens: tokens.amin(-1), temperature=temperature)  # outside the mask it is 0


def mean_states(
    lm: LanguageModel, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Return the base's last hidden states, averaged over the tokens of each row's response, ``[rows, width]``."""
    import torch

    def mean(chosen: Sequence[Row]) -> torch.Tensor:
        batch = pad_rows(chosen, lm.pad, lm.device)
        inside = batch.pop("completion_mask").unsqueeze(-1)
        states = lm.model(**batch, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states[-1]
        return torch.where(inside.bool(), states.float(), 0.0).sum(1) / inside.sum(1)

    return _in_batches(lm, rows, mean, half=lm.device.type != "cpu", progress=progress)


def _of_tokens(
    lm: LanguageModel,
    rows: Sequence[Row],
    reduce: Callable[[torch.Tensor], torch.Tensor],
    own: bool = False,
    temperature: float = 1.0,
    half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return ``reduce`` of the log-probabilities of each row's tokens ``[batch, T]``; see :func:`log_probs`."""
    from moalign.lm.log_probs import token_outputs

    def reduced(chosen: Sequence[Row]) -> torch.Tensor:
        batch = pad_rows(chosen, lm.pad, lm.device)
        width = batch["input_ids"].shape[1] - min(len(ids) - length for ids, length in chosen)
        response = batch["completion_mask"][:, -width:].bool()
        return reduce(token_outputs(lm.model, batch["input_ids"], batch["attention_mask"], response, temperature).logps)

    return _in_batches(lm, rows, reduced, own, half, progress)


def _in_batches(
    lm: LanguageModel,
    rows: Sequence[Row],
    read: Callable[[Sequence[Row]], torch.Tensor],
    own: bool = False,
    half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Return what ``read`` makes of rows, ``[rows, ...]`` on the CPU, in batches of about equal length."""
    import torch

    from moalign.lm.language_model import reference_mode

    lm.model.eval()
    found: list[torch.Tensor] = []
    longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row][0]))
    precision = torch.autocast(lm.device.type, torch.bfloat16, enabled=half)
    done = 0
    with torch.no_grad(), contextlib.nullcontext() if own else reference_mode(lm), precision:
        while done < len(rows):
            part = longest_first[done : done + max(1, BATCH_TOKENS // len(rows[longest_first[done]][0]))]
            found.append(read([rows[number] for number in part]).float().cpu())
            done += len(part)
            if progress is not None:
                progress(done, len(rows))
    return torch.cat(found)[torch.tensor(longest_first).argsort()] if rows else torch.zeros(0)


def pad_rows(rows: Sequence[Row], pad: int, device: Any = None) -> dict[str, torch.Tensor]:
    """Return rows as tensors padded on the right: ``input_ids``, ``attention_mask``, ``completion_mask``."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask, response = torch.zeros_like(ids), torch.zeros_like(ids)
    for number, (tokens, length) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens)
        mask[number, : len(tokens)] = 1
        response[number, len(tokens) - length : len(tokens)] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": response}
    return batch if device is None else {name: value.to(device) for name, value in batch.items()}


def pad_around(rows: Sequence[Row], pad: int) -> dict[str, torch.Tensor]:
    """Return rows as tensors, prompts padded on the left and responses on the right.

    ``input_ids`` and ``attention_mask`` ``[rows, prompt + T]``, ``completion_mask`` ``[rows, T]``.
    """
    import torch

    before = max(len(ids) - length for ids, length in rows)
    width = max(length for _, length in rows)
    ids = torch.full((len(rows), before + width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, (tokens, length) in enumerate(rows):
        place = slice(before - (len(tokens) - length), before + length)
        ids[number, place] = torch.tensor(tokens)
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask[:, before:]}

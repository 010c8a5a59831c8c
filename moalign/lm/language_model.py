"""A causal language model with its tokenizer, loaded safely."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from moalign.config.card import TemplateSpec
from moalign.core.errors import MoalignError, RequestError
from moalign.lm import backends, loading, model_folder
from moalign.lm.chat import Codec, Rendered, generation_ends
from moalign.lm.loading import first_line
from moalign.runs.environment import usable_cpus

WHERE = "task.model"
"""How messages name the place of the policy's model; ``--set task.model=FOLDER`` sets it."""

_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's malloc.h."""

TINY = 20_000_000
"""Models below this many parameters run on one thread: two are up to ten times slower on a busy machine."""


@dataclass
class LanguageModel:
    """A loaded model. ``model`` may be wrapped by peft; the base weights are frozen and shared."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    device: torch.device
    codec: Codec
    """From text to the model's tokens and back."""
    end_ids: frozenset[int]
    """Ids that end a response when they are sampled."""
    in_4bit: bool = False
    """Whether the base's linear layers are 4-bit: what is folded into them is rounded away."""
    in_reference: bool = False
    """Whether a :func:`reference_mode` block is open, so that an inner one does not end it."""

    @property
    def eos(self) -> int:
        """The id of the end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """The id used for padding (always masked)."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """Return the token ids of rendered prompts (:meth:`moalign.lm.chat.Codec.prompt_ids`).

        A text longer than ``max_tokens`` loses the beginning of the user's part (all of a plain string is the user's).
        """
        rows = self.codec.prompt_ids(texts)
        for at, row in enumerate(rows):
            if max_tokens is not None and len(row) > max_tokens:
                prompt = Rendered.from_text(texts[at])
                fitted = self.codec.fit(prompt.prompt, prompt.build, max_tokens, "generation.max_prompt_tokens")
                rows[at] = self.codec.prompt_ids([fitted])[0]
        return rows

    def decode(self, rows: Sequence[Iterable[int]]) -> list[str]:
        """Return the text of response tokens without special tokens; see :meth:`Codec.decode`."""
        return self.codec.decode(rows)


def load_codec(source: str, revision: str | None = None, template: TemplateSpec | None = None) -> Codec:
    """Load what turns text into a model's tokens: its tokenizer and generation config, no weights.

    ``template`` is a card's; None: its defaults. Raises RequestError for a tokenizer that cannot be loaded or does not
    suit the template.
    """
    path = model_folder.resolve(source, revision, WHERE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # of damaged files the library raises whatever it stumbles over
        why = f"{type(error).__name__}: {first_line(error)}"
        raise RequestError(f"model {path}: its tokenizer cannot be loaded ({why})") from None
    try:
        limits = GenerationConfig.from_pretrained(path)
    except Exception:  # a folder need not have one; the model's own config names end tokens, too
        try:
            limits = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
        except Exception as error:
            raise RequestError(f"model {path}: its config cannot be used ({first_line(error)})") from None
    return Codec(tokenizer, template, generation_ends(limits), source)


def load(
    source: str,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    codec: Codec | None = None,
    attention: str | None = None,
    in_4bit: bool = False,
) -> LanguageModel:
    """Load a causal language model from a folder or hub id (safetensors only, no remote code).

    ``codec`` is the model's own, for a card's template; None: that of :func:`load_codec` without a template.
    ``attention`` and ``in_4bit`` are a recipe's and a card's (:class:`~moalign.config.recipe.PolicySpec`).

    Raises RequestError for a folder without tokenizer or whole safetensors weights, for weights that are not those of
    the model, for a hub id that cannot be reached, for attention that the model does not have, and for a model that
    cannot be sampled (:func:`moalign.lm.step_by_step.require`).
    """
    from moalign.lm import step_by_step

    transformers_logging.disable_progress_bar()  # moalign shows its own
    path = model_folder.resolve(source, revision, WHERE)
    codec = load_codec(source, revision) if codec is None else codec
    place = _device(device)
    try:
        how = backends.options(dtype, attention, in_4bit, place)
        model = loading.from_folder(AutoModelForCausalLM, path, f"model {path}", **how)
    except (MoalignError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RequestError(
            f"model {path}: it cannot be loaded as a causal language model ({first_line(error)})"
        ) from None
    give_memory_back(model.num_parameters())
    lm = wrap(model, codec.tokenizer, source, model_folder.fingerprint(path, WHERE), device, codec)
    step_by_step.require(model, f"model {path}")
    return lm


def _device(device: str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def wrap(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    fingerprint: str,
    device: str | None = None,
    codec: Codec | None = None,
) -> LanguageModel:
    """Freeze a model, set its padding token and put it on its device."""
    if codec is None:
        codec = Codec(tokenizer, ends=generation_ends(getattr(model, "generation_config", None)), source=source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    place, in_4bit = _device(device), bool(getattr(model, "is_loaded_in_4bit", False))
    if not in_4bit:  # such a model was loaded where it is
        model.to(place)
    model.eval().requires_grad_(False)
    return LanguageModel(model, tokenizer, source, fingerprint, place, codec, codec.ends.ids, in_4bit)


def give_memory_back(parameters: int) -> None:
    """Make glibc return the memory of large tensors as they are freed; of small models they are not large.

    It would keep it, and as tensors are aligned seldom use it again: a step of MO-ODPO on the task assistant took
    3.2 GB where 2.4 are in use. The environment's MALLOC_MMAP_THRESHOLD_ wins.
    """
    if parameters < TINY or not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def set_threads(parameters: int) -> int:
    """Choose the number of CPU threads by model size and return it; OMP_NUM_THREADS or MOALIGN_THREADS wins.

    Raises RequestError for a MOALIGN_THREADS that is not a positive number.
    """
    own = os.environ.get("MOALIGN_THREADS", "")
    if own and not (own.isdecimal() and int(own) > 0):
        raise RequestError(f"MOALIGN_THREADS={own}: allowed: 1 or more")
    setting = own or os.environ.get("OMP_NUM_THREADS", "")
    threads = int(setting) if setting.isdecimal() else 0
    threads = threads or (1 if parameters < TINY else usable_cpus())
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


@contextlib.contextmanager
def reference_mode(lm: LanguageModel) -> Iterator[None]:
    """Within the block adapters are off, so that the base answers (no second copy of it).

    The layers are switched directly: peft's own context manager walks the whole model twice, which costs
    more than a forward pass of a tiny model.
    """
    tuner: Any = getattr(lm.model, "base_model", None)
    if lm.in_reference or not hasattr(tuner, "disable_adapter_layers"):
        yield
        return
    tuner.disable_adapter_layers()
    lm.in_reference = True
    try:
        yield
    finally:
        lm.in_reference = False
        tuner.enable_adapter_layers()

"""What objectives scored by a frozen model share: checks of the folder, loading, batches, one copy for several of them.

Only safetensors weights are loaded, and no code from a model folder is ever run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from moalign.config.objectives import ModelObjective, Quantised
from moalign.core.errors import RequestError
from moalign.lm import backends, model_folder
from moalign.lm.loading import explained, few, quiet
from moalign.rewards.rows import vocabulary_of
from moalign.rewards.scorer import digest

CACHE_LIMIT = 100_000
"""Texts whose results a scorer keeps in memory for its next calls."""

_Spec = TypeVar("_Spec", bound=ModelObjective)
_Row = TypeVar("_Row")


class ModelScorer(ABC, Generic[_Spec]):
    """A scorer whose model is loaded at the first score and kept."""

    auto_class: ClassVar[str]
    """The class of transformers that loads the model."""
    noun: ClassVar[str]
    """What messages call the model."""
    head: ClassVar[list[str] | None] = None
    """Layers that are never of few bits (``load_in_4bit``), by the last part of their names; None: the output layer."""

    def __init__(self, spec: _Spec, base_dir: Path) -> None:
        """Check what can be checked without torch; ``base_dir`` is the task card's folder.

        Raises RequestError for a folder, hub id or built-in model that does not exist, and missing or damaged weights.
        """
        self.spec = spec
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = spec.store is False
        self.where = f"objective {spec.name!r}"
        self._leader: ModelScorer[_Spec] = self
        """The scorer whose model is used: another one where both name the same model (:func:`share`)."""
        self._leads = False
        """Whether other scorers use this one's model."""
        self._resting = False
        """Whether the model was taken off the GPU."""
        self._folder = model_folder.local_folder(spec.model, base_dir, self.where)
        if self._folder is not None:
            model_folder.require_complete(self._folder, self.where)
        self._config_folder = self._folder or model_folder.fetch(
            spec.model, spec.revision, self.where, config_only=True
        )

    @cached_property
    def folder(self) -> Path:
        """The model's folder; a hub model is fetched here and its files checked."""
        return self._folder or model_folder.resolve(self.spec.model, self.spec.revision, self.where)

    @cached_property
    def revision(self) -> str:
        """Hash of the model's files (a hub model: its commit) and of every setting that changes a score."""
        # The hub's cache names a snapshot's folder by its commit, which spares reading gigabytes.
        content = model_folder.fingerprint(self.folder, self.where) if self._folder else self.folder.name
        return f"{self.spec.kind}:{digest(*self._identity(content))}"

    def prepare(self) -> None:
        """Load the model now, so that problems of its files show before other work begins."""
        _ = self._model

    def rest(self) -> None:
        """Take the model off the GPU, if it is there, until it is used again."""
        leader = self._leader
        if "_loaded" in leader.__dict__ and not leader._resting:
            _move(leader._loaded[0], "cpu")
            leader._resting = True

    # --- what a kind of model adds

    @abstractmethod
    def _identity(self, content: str) -> list[Any]:
        """Return what the revision is the hash of; ``content`` identifies the model."""

    def _loading(self) -> dict[str, Any]:
        """Return further arguments of ``from_pretrained``."""
        return {}

    def _settle(self, model: Any) -> None:
        """Check or complete a model that was just loaded."""

    # --- for kinds of model to use

    def _few_bits(self) -> dict[str, Any]:
        """Return what identifies scores of a model of few bits; nothing where it has all of them."""
        return self.spec.model_dump(include=set(Quantised.model_fields), exclude_defaults=True)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        import transformers

        # The generators are put back: when a model is loaded must not change what is sampled afterwards.
        with explained(self.where, self.folder), quiet(), torch.random.fork_rng(devices=[]):
            local = {"local_files_only": True, "trust_remote_code": False}
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, **local)
            model, info = getattr(transformers, self.auto_class).from_pretrained(
                self.folder,
                use_safetensors=True,
                dtype=getattr(torch, self.spec.dtype),
                output_loading_info=True,
                **local,
                **self._loading(),
                **(backends.few_bits(bits, self.spec.dtype, _place(), self.head) if (bits := self.spec.bits) else {}),
            )
            if info["missing_keys"]:
                # The library would fill them with random numbers and only warn.
                raise RequestError(
                    f"{self.where}: model folder {self.folder} is not a whole {self.noun}: its weights lack "
                    f"{few(info['missing_keys'])}; a folder saved from {self.auto_class} is needed"
                )
            model.eval().requires_grad_(False)
            model.to(_place())
            self._settle(model)
        return model, tokenizer

    @property
    def _model(self) -> Any:
        leader = self._leader
        if leader._resting:
            _move(leader._loaded[0], _place())
            leader._resting = False
        return leader._loaded[0]

    @property
    def _tokenizer(self) -> Any:
        return self._leader._loaded[1]

    @cached_property
    def _vocabulary(self) -> int:
        return vocabulary_of(self._model)

    def _bounded(
        self, rows: Iterable[_Row], size: Callable[[_Row], int], splits: Callable[[list[_Row], _Row], bool]
    ) -> Iterator[list[_Row]]:
        """Batch rows that come longest first, such that rows x longest row <= batch_tokens (at least one row).

        ``splits(batch, row)`` says that a row does not go with the batch for another reason.
        """
        batch: list[_Row] = []
        for row in rows:
            if batch and ((len(batch) + 1) * size(batch[0]) > self.spec.batch_tokens or splits(batch, row)):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch


def _move(model: Any, place: str) -> None:
    """Move a model, with what bitsandbytes keeps of 8-bit layers beside their parameters once they were used."""
    model.to(place)
    for layer in model.modules():
        state: Any = getattr(layer, "state", None)
        if getattr(state, "CB", None) is not None:
            state.CB, state.SCB = state.CB.to(place), state.SCB.to(place)
            layer.weight.data = state.CB  # as the layer itself has it: one copy


def _place() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def share(scorers: Sequence[ModelScorer[Any]], keep: bool = False) -> None:
    """Make objectives that read one model in the same way use one copy of it.

    What it reads is kept in memory where others use it, too, and with ``keep``.
    """
    first: dict[tuple[object, ...], ModelScorer[Any]] = {}
    for scorer in scorers:
        scorer._leader = first.setdefault((scorer.spec.kind, *scorer.spec.reading), scorer)
        scorer._leader._leads |= keep or scorer._leader is not scorer

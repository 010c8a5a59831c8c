"""Objectives that are a sequence classifier or reward model: any ``AutoModelForSequenceClassification``.

Rows are deduplicated, sorted by length and padded into batches bounded by tokens; the scores equal those of
scoring one text at a time. Texts longer than the model reads lose the start of their *prompt*, never the answer
(unless the answer alone is too long: then its end is cut, as if generation had stopped there).
Only safetensors weights are loaded and no code from a model folder is ever run. Objectives that are labels of one
model share it: it is loaded once and reads each text once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError, did_you_mean
from moalign.lm import model_folder
from moalign.lm.loading import explained, few, quiet
from moalign.rewards.rows import Row, RowEncoder, check_templates, longest

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a padded row may be from the same row alone before another way of padding is tried."""

_CACHE_LIMIT = 100_000
"""Texts whose logits are kept for the other labels of a model."""


class ClassifierScorer:
    """A classifier objective. The model is loaded at the first score and kept; see the module docstring."""

    def __init__(self, spec: ClassifierObjective, base_dir: Path) -> None:
        """Check all that can be checked without torch: folder, weights, tokenizer, label, templates.

        Args:
            spec: the objective as in the task card.
            base_dir: the card's folder.

        Raises:
            RequestError: no such folder or hub id, missing or truncated weights, unknown label or template field.
        """
        self.spec = spec
        self.name = spec.name
        self.maximise = spec.maximise
        self.cheap = spec.store is False
        self.where = f"objective {spec.name!r}"
        self.rows_scored = 0
        """Rows given to the model so far: fewer than requested where texts repeat."""
        self._padding: str | None = None
        self._reader = self
        """The scorer whose model reads the texts: another one where both are labels of one model (:func:`share`)."""
        self._cached: dict[tuple[str, str], torch.Tensor] | None = None
        """Logits ``[labels]`` of texts read so far, kept where other objectives use another label of the model."""
        check_templates(spec.template, spec.pair_template, self.where)
        self._folder = model_folder.local_folder(spec.model, base_dir, self.where)
        if self._folder is not None:
            model_folder.require_complete(self._folder, self.where)
        config_folder = self._folder or model_folder.fetch(spec.model, spec.revision, self.where, config_only=True)
        self.labels = _labels(model_folder.read_config(config_folder, self.where), self.where)
        self.index = self._label_index()

    @cached_property
    def folder(self) -> Path:
        """The model's folder; a hub model is fetched here and its files checked."""
        if self._folder is not None:
            return self._folder
        folder = model_folder.fetch(self.spec.model, self.spec.revision, self.where)
        model_folder.require_complete(folder, self.where)
        return folder

    @cached_property
    def revision(self) -> str:
        """Hash of the model's files (a hub model: its commit) and of every setting that changes a score."""
        # The hub's cache names a snapshot's folder by its commit, which spares reading gigabytes.
        content = model_folder.fingerprint(self.folder, self.where) if self._folder else self.folder.name
        settings = self.spec.model_dump(include={"output", "template", "pair_template", "max_length", "dtype"})
        text = json.dumps([content, self.index, settings], sort_keys=True)
        return f"hf-classifier:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the label's logit (or probability) of each pair, ``[samples]``, in the order given."""
        order: dict[tuple[str, str], int] = {}
        slots = [order.setdefault(pair, len(order)) for pair in zip(prompts, responses, strict=True)]
        values = self._values(self._reader.read(list(order)))
        return [values[slot] for slot in slots]

    def read(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Return the logits of all labels, float32 ``[texts, labels]``."""
        import torch

        if self._cached is None:
            return self._read(pairs)
        new = [pair for pair in pairs if pair not in self._cached]
        if new:
            if len(self._cached) + len(new) > _CACHE_LIMIT:  # rows of this call stay: they are read again below
                requested = set(pairs)
                self._cached = {pair: row for pair, row in self._cached.items() if pair in requested}
            self._cached.update(zip(new, self._read(new), strict=True))
        return torch.stack([self._cached[pair] for pair in pairs])

    def _read(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        import torch

        rows = self._encoder.rows(list(pairs))
        logits = torch.empty(len(rows), len(self.labels))
        for batch in self._batches(rows):
            logits[batch] = self._logits([rows[i] for i in batch], self._padding or "right")
        self.rows_scored += len(rows)
        return logits

    def _values(self, logits: torch.Tensor) -> list[float]:
        if self.spec.output == "probability":
            # Several labels that do not exclude each other (and a single output) have a sigmoid each.
            apart = logits.shape[1] == 1 or self._model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if apart else logits.softmax(dim=-1)
        return [float(value) for value in logits[:, self.index].tolist()]

    def prepare(self) -> None:
        """Load the model now, so that problems of its files show before other work begins."""
        _ = self._model

    @property
    def rows_shortened(self) -> int:
        """Rows so far that were longer than the model reads."""
        return self._reader._encoder.shortened

    @cached_property
    def _encoder(self) -> RowEncoder:
        spec, model, tokenizer = self.spec, self._model, self._tokenizer
        most = longest(model, tokenizer, spec.max_length)
        return RowEncoder(tokenizer, spec.template, spec.pair_template, most, self._vocabulary, self.where)

    # --- batches

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Give row numbers, longest rows first, such that rows x longest row <= batch_tokens (at least one row)."""
        lengths = [len(row["input_ids"]) for row in rows]
        batch: list[int] = []
        for at in sorted(range(len(rows)), key=lambda i: -lengths[i]):
            full = batch and lengths[batch[0]] * (len(batch) + 1) > self.spec.batch_tokens
            ragged = batch and lengths[at] != lengths[batch[0]] and self._padding_of(rows, [*batch, at]) == "none"
            if full or ragged:
                yield batch
                batch = []
            batch.append(at)
        if batch:
            yield batch

    def _padding_of(self, rows: Sequence[Row], batch: Sequence[int]) -> str:
        """Return how this model may be padded, determined once: a padded row must score as it does alone.

        Nearly every model reads right-padded rows; a few (XLNet) need left padding. A model that takes neither is given
        rows of equal length only.
        """
        if self._padding is None:
            short, longest = rows[batch[-1]], rows[batch[0]]
            alone = self._logits([short], "right")[0]
            self._padding = "none"
            for side in ("right", "left"):
                padded = self._logits([longest, short], side)[1]
                room = _TOLERANCE[self.spec.dtype] * (1 + alone.abs())
                if bool(((padded - alone).abs() <= room).all()):
                    self._padding = side
                    break
        return self._padding

    def _logits(self, rows: Sequence[Row], side: str) -> torch.Tensor:
        """Return float32 logits ``[rows, labels]`` of rows padded on one side."""
        import torch

        model, tokenizer = self._model, self._tokenizer
        pad = self._pad_token(rows)
        if pad is None:
            return torch.cat([self._logits([row], side) for row in rows])

        def block(lines: Sequence[list[int]], fill: int) -> torch.Tensor:
            width = max(map(len, lines))
            gaps = [[fill] * (width - len(line)) for line in lines]
            padded = [line + gap if side == "right" else gap + line for line, gap in zip(lines, gaps, strict=True)]
            return torch.tensor(padded, device=model.device)

        inputs = {
            "input_ids": block([row["input_ids"] for row in rows], pad),
            "attention_mask": block([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "token_type_ids" in rows[0]:
            inputs["token_type_ids"] = block([row["token_type_ids"] for row in rows], tokenizer.pad_token_type_id)
        with torch.inference_mode():
            logits = model(**inputs).logits
        if logits.ndim != 2 or logits.shape[1] != len(self.labels):
            raise RequestError(
                f"{self.where}: the model gives {list(logits.shape[1:])} outputs per text, but its config names "
                f"{len(self.labels)} labels"
            )
        result: torch.Tensor = logits.float().cpu()
        return result

    def _pad_token(self, rows: Sequence[Row]) -> int | None:
        """Return the token to pad with; None: only single rows are safe.

        A decoder's head reads the last token that is not ``config.pad_token_id``. Where the model names no pad token it
        gets one (the tokenizer's, else end-of-text), but never one that ends a row of the batch: that row would be read
        one token too early.
        """
        if self._own_pad is not None:
            return self._own_pad
        ends = {row["input_ids"][-1] for row in rows}
        candidates = [self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, *range(self._vocabulary)]
        pad = next((token for token in candidates if token is not None and token not in ends), None)
        if pad is None and len(rows) == 1:
            pad = self._vocabulary  # one row is never padded: any number that is no token will do
        if pad is not None:
            for config in (self._model.config, self._model.config.get_text_config()):
                config.pad_token_id = pad
        return pad

    # --- the model

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        info: dict[str, Any]
        config = model_folder.read_config(self.folder, self.where)
        score_model = is_score_model(config)
        # Where the config names no labels, kinds of models differ in how many they assume (BART: 3, others: 2).
        more: dict[str, Any] = {} if config.get("id2label") else {"num_labels": len(self.labels)}
        more |= {"key_mapping": {r"^score_head\.": "score."}} if score_model else {}
        # The generators are put back: when a model is loaded must not change what is sampled afterwards.
        with explained(self.where, self.folder), quiet(), torch.random.fork_rng(devices=[]):
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=getattr(torch, self.spec.dtype),
                output_loading_info=True,
                **more,
            )
            if score_model:
                _add_bias(model, self.folder, self.where)
            if info["missing_keys"]:
                # The library would fill them with random numbers and only warn.
                raise RequestError(
                    f"{self.where}: model folder {self.folder} is not a whole classifier: its weights lack "
                    f"{few(info['missing_keys'])}; a folder saved from AutoModelForSequenceClassification is needed"
                )
            model.eval().requires_grad_(False)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
        return model, tokenizer

    @property
    def _model(self) -> Any:
        return self._reader._loaded[0]

    @property
    def _tokenizer(self) -> Any:
        return self._reader._loaded[1]

    @cached_property
    def _own_pad(self) -> int | None:
        pad = self._model.config.get_text_config().pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self._vocabulary else None

    @cached_property
    def _vocabulary(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    def _label_index(self) -> int:
        label = self.spec.label
        listed = ", ".join(f"{index}: {name}" for index, name in sorted(self.labels.items()))
        if label is None:
            if len(self.labels) == 1:
                return 0
            raise RequestError(
                f"{self.where}: the model has {len(self.labels)} labels ({listed}); say which one is the score with "
                "label: INDEX or label: NAME"
            )
        if isinstance(label, int):
            if label in self.labels:
                return label
            raise RequestError(f"{self.where}: the model has no label {label}; its labels: {listed}")
        matches = [index for index, name in self.labels.items() if name == label]
        if len(matches) == 1:
            return matches[0]
        why = "several labels" if matches else "no label"
        near = "" if matches else did_you_mean(label, list(self.labels.values()))
        raise RequestError(f"{self.where}: the model has {why} {label!r}; its labels: {listed}{near}")


def share(scorers: Sequence[ClassifierScorer]) -> None:
    """Make objectives that are labels of one model, read in the same way, use one copy of it."""
    first: dict[tuple[object, ...], ClassifierScorer] = {}
    for scorer in scorers:
        leader = first.setdefault(scorer.spec.reading, scorer)
        if leader is not scorer:
            scorer._reader = leader
            leader._cached = {}


def is_score_model(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the safe-rlhf library (PKU-Alignment/beaver-*), whose head has names of its own."""
    return any(str(name).endswith("ForScore") for name in config.get("architectures") or [])


def _add_bias(model: Any, folder: Path, where: str) -> None:
    """Give the head of a score model its bias, which plain classifiers lack."""
    import torch
    from safetensors import safe_open

    for path in model_folder.weight_files(folder, where):
        with safe_open(path, framework="pt") as file:
            if "score_head.bias" in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                bias = file.get_tensor("score_head.bias").to(model.score.weight.dtype)
                model.score.bias = torch.nn.Parameter(bias, requires_grad=False)
                return


def _labels(config: dict[str, Any], where: str) -> dict[int, str]:
    """Return label index -> name of a config.json; the library's default is two labels.

    Raises RequestError for a score model that normalises its scores, which is not done here.
    """
    if is_score_model(config):
        if config.get("do_normalize"):
            raise RequestError(
                f"{where}: its config says do_normalize: true, but raw scores are needed (the task normalises them); "
                "set it to false in a copy of the folder"
            )
        return {index: f"SCORE_{index}" for index in range(int(config.get("score_dim") or 1))}
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels and all(str(key).isdigit() for key in labels):
        return {int(key): str(name) for key, name in labels.items()}
    count = config.get("num_labels")
    return {index: f"LABEL_{index}" for index in range(count if isinstance(count, int) and count > 0 else 2)}

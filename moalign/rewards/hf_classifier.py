"""Objectives that are a sequence classifier or reward model: any ``AutoModelForSequenceClassification``.

Rows are deduplicated, sorted by length and padded into batches bounded by tokens; the scores equal those of
scoring one text at a time. Objectives that are labels of one model share it: it is loaded once and reads each text
once. :mod:`moalign.rewards.rows` says how long texts are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError, did_you_mean
from moalign.lm import model_folder
from moalign.rewards.model_scorer import CACHE_LIMIT, ModelScorer
from moalign.rewards.rows import Row, RowEncoder, check_templates

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far a padded row may be from the same row alone before another way of padding is tried."""


class ClassifierScorer(ModelScorer[ClassifierObjective]):
    """A classifier objective: the logit or probability of one label."""

    auto_class = "AutoModelForSequenceClassification"
    noun = "classifier"
    head = ["score", "classifier", "classification_head", "logits_proj"]  # noqa: RUF012 (the last two: BART, XLNet)
    _leader: ClassifierScorer

    def __init__(self, spec: ClassifierObjective, base_dir: Path) -> None:
        """Check label, templates and all that :class:`ModelScorer` does; raises RequestError."""
        check_templates(spec.template, spec.pair_template, f"objective {spec.name!r}")
        super().__init__(spec, base_dir)
        self.rows_scored = 0
        """Rows given to the model so far: fewer than requested where texts repeat."""
        self._padding: str | None = None
        self._cached: dict[tuple[str, str], torch.Tensor] = {}
        """Logits ``[labels]`` of texts read so far, kept where other objectives use another label of the model."""
        self._config = model_folder.read_config(self._config_folder, self.where)
        self.labels = _labels(self._config, self.where)
        self.index = self._label_index()

    def _identity(self, content: str) -> list[Any]:
        included = {"output", "template", "pair_template", "max_length", "dtype"}
        return [content, self.index, self.spec.model_dump(include=included) | self._few_bits()]

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Return the label's logit (or probability) of each pair, ``[samples]``, in the order given."""
        order: dict[tuple[str, str], int] = {}
        slots = [order.setdefault(pair, len(order)) for pair in zip(prompts, responses, strict=True)]
        logits = self._leader.read(list(order))
        if self.spec.output == "probability":
            # Several labels that do not exclude each other (and a single output) have a sigmoid each.
            apart = logits.shape[1] == 1 or self._model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if apart else logits.softmax(dim=-1)
        values: list[float] = logits[:, self.index].tolist()
        return [values[slot] for slot in slots]

    def read(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """Return the logits of all labels, float32 ``[texts, labels]``."""
        import torch

        if not self._leads:
            return self._read(pairs)
        new = [pair for pair in pairs if pair not in self._cached]
        if new and len(self._cached) + len(new) > CACHE_LIMIT:  # rows of this call stay: they are needed below
            requested = set(pairs)
            self._cached = {pair: row for pair, row in self._cached.items() if pair in requested}
        self._cached.update(zip(new, self._read(new), strict=True))
        return torch.stack([self._cached[pair] for pair in pairs])

    def _read(self, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        import torch

        rows = self._encoder.rows(pairs)
        logits = torch.empty(len(rows), len(self.labels))
        for batch in self._batches(rows):
            logits[batch] = self._logits([rows[i] for i in batch], self._padding or "right")
        self.rows_scored += len(rows)
        return logits

    @property
    def rows_shortened(self) -> int:
        """Rows so far that were longer than the model reads."""
        return self._leader._encoder.shortened

    @cached_property
    def _encoder(self) -> RowEncoder:
        spec = self.spec
        texts = spec.template, spec.pair_template
        return RowEncoder(self._model, self._tokenizer, *texts, spec.max_length, self.where)

    # --- batches

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """Yield the row numbers of each batch, longest rows first."""
        lengths = [len(row["input_ids"]) for row in rows]

        def ragged(batch: list[int], at: int) -> bool:
            return lengths[at] != lengths[batch[0]] and self._padding_of(rows[batch[0]], rows[at]) == "none"

        longest_first = sorted(range(len(rows)), key=lambda at: -lengths[at])
        return self._bounded(longest_first, lengths.__getitem__, ragged)

    def _padding_of(self, long: Row, short: Row) -> str:
        """Return how this model may be padded, determined once: a padded row must score as it does alone.

        Nearly every model reads right-padded rows; a few (XLNet) need left padding. A model that takes neither is given
        rows of equal length only.
        """
        if self._padding is None:
            alone = self._logits([short], "right")[0]
            tolerance = _TOLERANCE[self.spec.dtype] * (1 + alone.abs())
            self._padding = "none"
            for side in ("right", "left"):
                if bool(((self._logits([long, short], side)[1] - alone).abs() <= tolerance).all()):
                    self._padding = side
                    break
        return self._padding

    def _logits(self, rows: Sequence[Row], side: str) -> torch.Tensor:
        """Return float32 logits ``[rows, labels]`` of rows padded on one side."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        model = self._model
        pad = self._pad_token(rows)
        if pad is None:
            return torch.cat([self._logits([row], side) for row in rows])

        def block(lines: Sequence[list[int]], fill: int) -> torch.Tensor:
            tensors = [torch.tensor(line) for line in lines]
            padding_side = "left" if side == "left" else "right"  # where it is "none", all lines are equally long
            return pad_sequence(tensors, True, fill, padding_side).to(model.device)

        inputs = {
            "input_ids": block([row["input_ids"] for row in rows], pad),
            "attention_mask": block([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        if "token_type_ids" in rows[0]:
            fill = self._tokenizer.pad_token_type_id
            inputs["token_type_ids"] = block([row["token_type_ids"] for row in rows], fill)
        with torch.inference_mode():
            logits: torch.Tensor = model(**inputs).logits
        if logits.ndim != 2 or logits.shape[1] != len(self.labels):
            raise RequestError(
                f"{self.where}: the model gives {list(logits.shape[1:])} outputs per text, but its config names "
                f"{len(self.labels)} labels"
            )
        return logits.float().cpu()

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

    @cached_property
    def _own_pad(self) -> int | None:
        pad = self._model.config.get_text_config().pad_token_id
        return pad if isinstance(pad, int) and 0 <= pad < self._vocabulary else None

    # --- the model

    def _loading(self) -> dict[str, Any]:
        # Where the config names no labels, kinds of models differ in how many they assume (BART: 3, others: 2).
        count = {} if self._config.get("id2label") else {"num_labels": len(self.labels)}
        return count | ({"key_mapping": {r"^score_head\.": "score."}} if _is_score_model(self._config) else {})

    def _settle(self, model: Any) -> None:
        """Give the head of a score model its bias, which plain classifiers lack."""
        import torch
        from safetensors import safe_open

        if not _is_score_model(self._config):
            return
        for path in model_folder.weight_files(self.folder, self.where):
            with safe_open(path, framework="pt") as file:
                if "score_head.bias" in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated)
                    bias = file.get_tensor("score_head.bias").to(model.score.weight)
                    model.score.bias = torch.nn.Parameter(bias, requires_grad=False)

    def _label_index(self) -> int:
        label, names = self.spec.label, self.labels
        if label is None and len(names) == 1:
            return 0
        listed = ", ".join(f"{index}: {name}" for index, name in sorted(names.items()))
        if label is None:
            raise RequestError(
                f"{self.where}: the model has {len(names)} labels ({listed}); say which one is the score with "
                "label: INDEX or label: NAME"
            )
        matches = [index for index, name in names.items() if label in (index, name)]
        if len(matches) == 1:
            return matches[0]
        why = "several labels" if matches else "no label"
        near = did_you_mean(label, list(names.values())) if isinstance(label, str) and not matches else ""
        raise RequestError(f"{self.where}: the model has {why} {label!r}; its labels: {listed}{near}")


def _is_score_model(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the safe-rlhf library (PKU-Alignment/beaver-*), whose head has names of its own."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForScore") for name in names)


def _labels(config: dict[str, Any], where: str) -> dict[int, str]:
    """Return label index -> name of a config.json; the library's default is two labels.

    Raises RequestError for a score model that normalises its scores, which is not done here.
    """
    if _is_score_model(config):
        if config.get("do_normalize"):
            raise RequestError(
                f"{where}: its config says do_normalize: true, but raw scores are needed (the task normalises them); "
                "set it to false in a copy of the folder"
            )
        count = config.get("score_dim")
        return {index: f"SCORE_{index}" for index in range(count if isinstance(count, int) and count > 0 else 1)}
    labels = config.get("id2label")
    if isinstance(labels, dict) and labels and all(str(key).isdecimal() for key in labels):
        return {int(key): str(name) for key, name in labels.items()}
    count = config.get("num_labels")
    return {index: f"LABEL_{index}" for index in range(count if isinstance(count, int) and count > 0 else 2)}

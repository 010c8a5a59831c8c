"""Tasks on real text: prompts from the card, a file or the hub; a policy given as a model folder or hub id."""

from __future__ import annotations

import functools
from pathlib import Path

from moalign.config.card import DataSpec
from moalign.config.objectives import PythonObjective
from moalign.core.errors import RequestError
from moalign.core.records import Pair, Response
from moalign.data import load, readers, splits
from moalign.rewards import python_scorer
from moalign.tasks.task import Task, fingerprint


class TextTask(Task):
    """A task whose card names a model and data."""

    @property
    def _data(self) -> DataSpec:
        assert self.card.data is not None  # the card's own check
        return self.card.data

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the model, every data file and every scorer file: any change there makes another task."""
        content = {"model": fingerprint(self._model(), self.card.model_revision)}
        for name in ("prompts", "responses", "pairs"):
            source = getattr(self._data, name)
            if isinstance(source, dict):
                content |= {f"{name}.{key}": readers.fingerprint(part) for key, part in sorted(source.items())}
            elif source is not None and not isinstance(source, list):
                content[name] = readers.fingerprint(source)
        for spec in self.card.objectives:
            file = python_scorer.file_of(spec.function, Path.cwd()) if isinstance(spec, PythonObjective) else None
            if file is not None and file.is_file():
                content[f"scorer.{spec.name}"] = python_scorer.fingerprint(file)
        return content

    def _model(self) -> str:
        if self.card.model is None:
            raise RequestError(
                f"task {self.card.name}: it needs a model; give a folder or a hub id: --set task.model=PATH/TO/FOLDER"
            )
        return self.card.model

    def _all_prompts(self) -> list[str]:
        return load.load_prompts(self._data, Path.cwd())

    @functools.cached_property
    def _responses_by_split(self) -> dict[str, tuple[list[str], list[Response]]]:
        parts: dict[str, tuple[list[str], list[Response]]] = {name: ([], []) for name in splits.SPLITS}
        for record in load.load_responses(self._data, self.names, Path.cwd()):
            if self.left_out(record.prompt):
                continue
            prompts, responses = parts[splits.split_of(record.prompt, self.card.splits)]
            prompts.append(record.prompt)
            responses.append(Response(record.response, finished=record.finished))
        return parts

    def _data_responses(self, split: str) -> tuple[list[str], list[Response]] | None:
        if self._data.responses is None:
            return None
        prompts, responses = self._responses_by_split[split]
        return (prompts, responses) if prompts else None

    def _data_pairs(self, objective: int) -> list[Pair] | None:
        pairs, name = self._data.pairs, self.names[objective]
        if not isinstance(pairs, dict) or name not in pairs:
            return None
        return [
            pair
            for pair in load.load_pairs(self._data, Path.cwd(), name)
            if splits.split_of(pair.prompt, self.card.splits) == "train" and not self.left_out(pair.prompt)
        ]

    def base_source(self) -> tuple[str, str | None]:
        """Return the card's model and its revision."""
        return self._model(), self.card.model_revision

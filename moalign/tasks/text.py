"""Tasks on real text: prompts from the card, a file or the hub; a policy given as a model folder or hub id."""

from __future__ import annotations

import functools
from pathlib import Path

from moalign.config.card import DataSpec, SourceSpec
from moalign.core.amounts import Amounts
from moalign.core.errors import RequestError
from moalign.core.records import Pair, Response
from moalign.data import load, readers, splits
from moalign.lm import model_folder
from moalign.rewards import scorer
from moalign.tasks.responses import Responses
from moalign.tasks.task import WHERE, Task, fingerprint


class TextTask(Task):
    """A task whose card names a model and data."""

    @property
    def _data(self) -> DataSpec:
        assert self.card.data is not None  # the card's own check
        return self.card.data

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of the model, every data file, and whatever scores: a change there makes another task."""
        content = {"model": fingerprint(*self.base_source())}
        ends = model_folder.further_ends(model_folder.resolve(*self.base_source(), WHERE), WHERE)
        if ends:  # they decide where an answer is over
            content["ends"] = " ".join(map(str, ends))
        for name in ("prompts", "responses", "pairs"):
            source = getattr(self._data, name)
            if isinstance(source, dict):
                content |= {f"{name}.{key}": readers.fingerprint(part) for key, part in sorted(source.items())}
            elif source is not None and not isinstance(source, list):
                content[name] = readers.fingerprint(source)
        return content | scorer.fingerprints(self.card, Path.cwd())

    def base_source(self) -> tuple[str, str | None]:
        """Return the card's model and its revision."""
        if self.card.model is None:
            raise RequestError(
                f"task {self.card.name}: it needs a model; give a folder or a hub id: --set task.model=PATH/TO/FOLDER"
            )
        return self.card.model, self.card.model_revision

    def all_prompts(self) -> list[str]:
        """Return the prompts of the card's data, each once."""
        return load.load_prompts(self._data, Path.cwd())

    @functools.cached_property
    def _responses_by_split(self) -> dict[str, Responses]:
        parts: dict[str, Responses] = {name: Responses([], []) for name in splits.SPLITS}
        for record in load.load_responses(self._data, Path.cwd()):
            # An empty one has no token to learn from.
            if record.response.strip() and not self.left_out(record.prompt):
                part = parts[splits.split_of(self.home(record.prompt), self.card.splits)]
                part.prompts.append(record.prompt)
                part.responses.append(Response(record.response, finished=record.finished))
        return parts

    def data_responses(self, split: str) -> Responses | None:
        """Return the logged responses to a split's prompts, None when there are none."""
        if self._data.responses is None:
            return None
        part = self._responses_by_split[split]
        return part if part.prompts else None

    def known_response(self, prompt: str) -> Response | None:
        """Return the first logged response to a prompt, else the preferred one of its first pair."""
        if _is_here(self._data.responses):
            for logged in load.load_responses(self._data, Path.cwd()):
                if logged.prompt == prompt and logged.response.strip():
                    return Response(logged.response, finished=logged.finished)
        pairs = self._data.pairs
        for objective, source in (pairs if isinstance(pairs, dict) else {None: pairs}).items():
            if _is_here(source):
                for pair in load.load_pairs(self._data, Path.cwd(), objective):
                    if pair.prompt == prompt and pair.chosen.strip():
                        return Response(pair.chosen)
        return None

    def amounts(self) -> Amounts | None:
        """See :meth:`Task.amounts`."""
        pairs = self._data.pairs if isinstance(self._data.pairs, dict) else {}
        sources = [self._data.prompts, self._data.responses, *pairs.values()]
        if any(isinstance(source, SourceSpec) and not _is_here(source) for source in sources):
            return None
        return super().amounts()

    def data_pairs(self, objective: int) -> list[Pair]:
        """Return the labelled pairs of an objective whose prompt is in the training split; none with an empty reply."""
        return [
            pair
            for pair in load.load_pairs(self._data, Path.cwd(), self.names[objective])
            if splits.split_of(self.home(pair.prompt), self.card.splits) == "train"
            and not self.left_out(pair.prompt)
            and pair.chosen.strip()
            and pair.rejected.strip()
        ]


def _is_here(source: SourceSpec | None) -> bool:
    return source is not None and isinstance(readers.locate(source, Path.cwd()), Path)

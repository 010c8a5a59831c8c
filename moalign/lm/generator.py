"""Text generators: a language model in a given state, called in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from moalign.core import processes
from moalign.core.records import Response
from moalign.lm.adapters import drop, merged
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.sampler import Generated, Sampling, Traces, generate

Advance = Callable[[int], None]


class Generator(Protocol):
    """A source of text: a language model in a given state (adapters on, off, mixed, ...).

    One that is a single model may have ``as_model() -> ModelGenerator`` for ``moalign export``; a RequestError from it
    says why there is none.
    """

    def generate(
        self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling
    ) -> Generated | tuple[list[str], int]:
        """Return one response per text; ``rows`` fix each one's randomness.

        A generator that knows no token ids and log-probabilities may return (responses, number of tokens sampled).
        """
        ...


@dataclass(eq=False)
class ModelGenerator:
    """A language model with one of its adapters, or the bare base (``adapter=None``)."""

    lm: LanguageModel
    adapter: str | None = None

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        """Answer with the adapter, whatever was active on the model before. See :class:`Generator`."""
        if self.adapter is None:
            with reference_mode(self.lm):
                return generate(self.lm, texts, rows, sampling)
        self.lm.model.set_adapter(self.adapter)
        with merged(self.lm):
            return generate(self.lm, texts, rows, sampling)

    def as_model(self) -> ModelGenerator:
        return self


@runtime_checkable
class OneModel(Protocol):
    """A generator whose answers are those of one language model, which :meth:`as_model` puts in place."""

    def as_model(self) -> ModelGenerator: ...


def shared(generator: Generator) -> Generator:
    """Return a generator of whose texts each process of a training samples its share; all of them must call it."""
    return generator if processes.count() == 1 else _Shared(generator)


@dataclass(eq=False)
class _Shared:
    generator: Generator

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        own = self.generator.generate(processes.share(texts), processes.share(rows), sampling)
        assert isinstance(own, Generated) and own.traces is not None
        vocabulary, own.traces.vocabulary = own.traces.vocabulary, None  # each process has it
        parts = processes.gather(own)
        traces = Traces.joined([part.traces for part in parts])
        assert traces is not None
        traces.vocabulary = vocabulary
        return Generated([text for part in parts for text in part.responses], sum(p.tokens for p in parts), traces)


RESIDENT = "resident adapter"
"""Key of a run's cache for the name of the adapter that is on the model."""


@dataclass(eq=False)
class LazyGenerator:
    """A language model whose adapter is put on it at first use, in place of the previous one.

    For runs with an adapter for each preference: memory stays that of one adapter, whatever the number of preferences.
    """

    lm: LanguageModel
    adapter: str
    place: Callable[[], None]
    """Puts the adapter on the model under the name ``adapter``."""
    cache: dict[str, Any]
    """Shared by the generators of a run that take turns."""

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        return self.as_model().generate(texts, rows, sampling)

    def as_model(self) -> ModelGenerator:
        """Return the model with the adapter on it."""
        if self.cache.get(RESIDENT) != self.adapter:
            if RESIDENT in self.cache:
                drop(self.lm, self.cache.pop(RESIDENT))
            self.place()
            self.cache[RESIDENT] = self.adapter
        return ModelGenerator(self.lm, self.adapter)


def in_chunks(
    generator: Generator, requests: Sequence[tuple[str, int]], sampling: Sampling, progress: Advance | None
) -> Generated:
    """Generate in chunks of several batches, so that a progress bar moves and length sorting still pays."""
    chunk = sampling.batch_size * 4
    parts: list[Generated] = []
    for start in range(0, len(requests), chunk):
        part = requests[start : start + chunk]
        generated = generator.generate([text for text, _ in part], [row for _, row in part], sampling)
        parts.append(Generated(*generated) if isinstance(generated, tuple) else generated)
        if progress is not None:
            progress(len(part))
    return Generated(
        [text for part in parts for text in part.responses],
        sum(part.tokens for part in parts),
        Traces.joined([part.traces for part in parts]),
    )


def records(responses: Sequence[str], traces: Traces | None) -> list[Response]:
    """Return responses with the tokens they were sampled as, where these are known."""
    if traces is None:
        return [Response(text) for text in responses]
    return [
        Response(text, tuple(ids.tolist()), finished)
        for text, ids, finished in zip(responses, traces.ids, traces.finished, strict=True)
    ]

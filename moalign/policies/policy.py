"""What a trained method hands back: something that answers prompts for one preference.

Policies that read their preference from the prompt share one :class:`Generator`; :func:`respond_all` therefore
answers a whole preference grid in batched passes instead of one pass per preference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moalign.data.records import Response
from moalign.policies.sampler import Generated, Sampling, Traces, generate

if TYPE_CHECKING:
    from moalign.policies.language_model import LanguageModel

Chooser = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[int]]
"""``choose(prompts, candidates[prompts][samples]) -> indices``: how best-of-n picks its answers."""

Progress = Callable[[int], None]


class Generator(Protocol):
    """A source of text: a language model in a certain state (adapters on or off, mixed, ...).

    One that is a single model may have ``as_model() -> ModelGenerator``, which ``moalign export`` asks for; a
    RequestError from it says why there is none.
    """

    def generate(
        self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling
    ) -> Generated | tuple[list[str], int]:
        """Return one response per text, how many tokens were sampled and, if known, which; ``rows`` fix the randomness.

        A generator that has no token ids and log-probabilities may return the pair (responses, number of tokens).
        """
        ...


@dataclass(eq=False)
class ModelGenerator:
    """A language model with one of its adapters, or the bare base (``adapter=None``)."""

    lm: LanguageModel
    adapter: str | None = None

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        """See :class:`Generator`. The adapter is made active first, whatever ran on the model before."""
        from moalign.policies.adapters import merged
        from moalign.policies.language_model import reference_mode

        if self.adapter is None:
            with reference_mode(self.lm):
                return generate(self.lm, texts, rows, sampling)
        self.lm.model.set_adapter(self.adapter)
        with merged(self.lm):
            return generate(self.lm, texts, rows, sampling)

    def as_model(self) -> ModelGenerator:
        """Return the one model that answers: this one."""
        return self


RESIDENT = "resident adapter"
"""Where a run's cache keeps the name of the adapter that lies on the model."""


@dataclass(eq=False)
class LazyGenerator:
    """A language model with an adapter that is put on it when it is asked for, in the place of the one before.

    For runs with an adapter for each preference: memory stays that of one adapter, whatever the number of preferences.
    """

    lm: LanguageModel
    adapter: str
    place: Callable[[], None]
    """Puts the adapter on the model under the name ``adapter``."""
    cache: dict[str, Any]
    """Shared by the generators of a run that take turns."""

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        """See :class:`Generator`."""
        return self.as_model().generate(texts, rows, sampling)

    def as_model(self) -> ModelGenerator:
        """Return the model with the adapter on it."""
        from moalign.policies.adapters import drop

        before = self.cache.get(RESIDENT)
        if before != self.adapter:
            if before is not None:
                drop(self.lm, before)
                del self.cache[RESIDENT]
            self.place()
            self.cache[RESIDENT] = self.adapter
        return ModelGenerator(self.lm, self.adapter)


@dataclass(eq=False)
class Policy:
    """Answers prompts for one preference.

    ``render`` turns a bare prompt into what the generator reads; with ``samples > 1`` that many candidates are
    drawn and ``choose`` picks one.
    """

    generator: Generator
    render: Callable[[str], str]
    samples: int = 1
    choose: Chooser | None = None

    def respond(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """Return one response for each bare prompt."""
        return respond_all([self], prompts, sampling).responses[0]


@dataclass
class Answers:
    """Responses of several policies to the same prompts."""

    responses: list[list[str]]
    """``[policies][prompts]``."""
    tokens: int
    """Tokens sampled; a text that several policies share is sampled once."""
    traces: list[Traces | None]
    """The tokens of each policy's responses, ``[policies]``; None where its generator does not tell them. A policy
    that chose among samples has those of the sample it chose."""

    def records(self, policy: int) -> list[Response]:
        """Return a policy's responses with the tokens they were sampled as, where its generator tells them."""
        texts, traces = self.responses[policy], self.traces[policy]
        if traces is None:
            return [Response(text) for text in texts]
        return [
            Response(text, tuple(ids.tolist()), finished)
            for text, ids, finished in zip(texts, traces.ids, traces.finished, strict=True)
        ]


def respond_all(
    policies: Sequence[Policy], prompts: Sequence[str], sampling: Sampling, progress: Progress | None = None
) -> Answers:
    """Answer every prompt with every policy in batched passes, one per distinct generator.

    Prompt ``i`` draws from the same random numbers whatever the policy (common random numbers), and policies
    whose rendered prompts agree share the sample: an unsteered policy answers every preference alike.
    """
    wanted: dict[int, dict[tuple[str, int], int]] = {}
    generators: dict[int, Generator] = {}
    for policy in policies:
        requests = wanted.setdefault(id(policy.generator), {})
        generators[id(policy.generator)] = policy.generator
        for i, prompt in enumerate(prompts):
            text = policy.render(prompt)
            for sample in range(policy.samples):
                requests.setdefault((text, i + sample * len(prompts)), len(requests))
    drawn = {key: _in_chunks(generators[key], list(requests), sampling, progress) for key, requests in wanted.items()}
    answers = Answers([], sum(made.tokens for made in drawn.values()), [])
    for policy in policies:
        requests, made = wanted[id(policy.generator)], drawn[id(policy.generator)]
        places = [
            [requests[text, i + sample * len(prompts)] for sample in range(policy.samples)]
            for i, text in enumerate(map(policy.render, prompts))
        ]
        candidates = [[made.responses[place] for place in row] for row in places]
        picked = policy.choose(prompts, candidates) if policy.choose else [0] * len(prompts)
        chosen = [row[index] for row, index in zip(places, picked, strict=True)]
        answers.responses.append([made.responses[place] for place in chosen])
        answers.traces.append(None if made.traces is None else made.traces.at(chosen))
    return answers


def _in_chunks(
    generator: Generator, requests: list[tuple[str, int]], sampling: Sampling, progress: Progress | None
) -> Generated:
    """Generate in chunks of several batches, so that a progress bar moves and length sorting still pays."""
    chunk = sampling.batch_size * 4
    parts: list[Generated] = []
    for start in range(0, len(requests), chunk):
        part = requests[start : start + chunk]
        told = generator.generate([text for text, _ in part], [row for _, row in part], sampling)
        parts.append(Generated(*told) if isinstance(told, tuple) else told)
        if progress is not None:
            progress(len(part))
    return Generated(
        [text for part in parts for text in part.responses],
        sum(part.tokens for part in parts),
        Traces.joined([part.traces for part in parts]),
    )

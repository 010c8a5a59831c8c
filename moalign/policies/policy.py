"""What a trained method hands back: something that answers prompts for one preference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moalign.core.records import Response
from moalign.lm import vllm_engine
from moalign.lm.generator import Advance, Generator, OneModel, in_chunks, records
from moalign.lm.sampler import Generated, Sampling, Traces

if TYPE_CHECKING:
    from moalign.lm.vllm_engine import VllmEngine
    from moalign.training.job import RunContext

Chooser = Callable[[Sequence[str], Sequence[Sequence[str]]], Sequence[int]]
"""``choose(prompts, candidates[prompts][samples]) -> indices``: how best-of-n picks its answers."""


@dataclass(eq=False)
class Policy:
    """Answers prompts for one preference."""

    generator: Generator
    render: Callable[[str], str]
    """Turns a bare prompt into what the generator reads."""
    samples: int = 1
    """Candidates drawn for each prompt, of which ``choose`` picks one."""
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
    """The tokens of each policy's responses, ``[policies]``; None where its generator does not know them."""

    def records(self, policy: int) -> list[Response]:
        """Return a policy's responses with the tokens they were sampled as, where these are known."""
        return records(self.responses[policy], self.traces[policy])


def respond_all(
    policies: Sequence[Policy],
    prompts: Sequence[str],
    sampling: Sampling,
    progress: Advance | None = None,
    engine: VllmEngine | None = None,
    first: int = 0,
) -> Answers:
    """Answer every prompt with every policy; those that share a generator are answered in batches together.

    With an ``engine`` those that are one language model each are, whatever adapters they have.

    Prompt ``i`` draws from the same random numbers whatever the policy (common random numbers), and policies whose
    rendered prompts agree share the sample: an unsteered policy answers every preference alike. ``first`` is the number
    of the first prompt, where they are a part of more, one sample to each.
    """
    texts = [[policy.render(prompt) for prompt in prompts] for policy in policies]
    generators = {id(policy.generator): policy.generator for policy in policies}
    requests: dict[int, dict[tuple[str, int], int]] = {key: {} for key in generators}
    places = []  # of each policy's samples among its generator's requests, [policies][prompts][samples]
    for policy, rendered in zip(policies, texts, strict=True):
        known = requests[id(policy.generator)]
        numbered = enumerate(rendered, start=first)
        rows = [[(text, i + n * len(prompts)) for n in range(policy.samples)] for i, text in numbered]
        places.append([[known.setdefault(request, len(known)) for request in row] for row in rows])
    drawn: dict[int, Generated] = {}
    single = {key: generator for key, generator in generators.items() if isinstance(generator, OneModel)}
    if engine is not None and single:
        together = vllm_engine.answers(
            engine, list(single.values()), [list(requests[key]) for key in single], sampling, progress
        )
        drawn = dict(zip(single, together, strict=True))
    for key, generator in generators.items():
        if key not in drawn:
            drawn[key] = in_chunks(generator, list(requests[key]), sampling, progress)
    answers = Answers([], sum(output.tokens for output in drawn.values()), [])
    for policy, samples in zip(policies, places, strict=True):
        output = drawn[id(policy.generator)]
        candidates = [[output.responses[place] for place in row] for row in samples]
        picked = policy.choose(prompts, candidates) if policy.choose else [0] * len(prompts)
        chosen = [row[index] for row, index in zip(samples, picked, strict=True)]
        answers.responses.append([output.responses[place] for place in chosen])
        answers.traces.append(None if output.traces is None else output.traces.at(chosen))
    return answers


def adapter_name(context: RunContext, what: str) -> str:
    """Return the name, on the model, of one of the run's adapters; those of its snapshots have names of their own."""
    at = re.sub(r"\W", "_", f"{context.snapshot}_") if context.snapshot else ""
    return f"run_{context.run.record.run_id}_{at}{what}"

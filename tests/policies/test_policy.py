"""Many policies asked at once: as if each had been asked alone, and shared texts sampled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from moalign.config.card import TemplateSpec
from moalign.config.recipe import LoraSpec
from moalign.core import preferences
from moalign.lm import adapters
from moalign.lm.chat import Renderer
from moalign.lm.generator import ModelGenerator
from moalign.lm.language_model import LanguageModel
from moalign.lm.sampler import Generated, Sampling, Traces
from moalign.policies.policy import Policy, respond_all

PROMPTS = ["make soup", "read a map", "make soup", "fix a chair"]
SAMPLING = Sampling(max_new_tokens=8, seed=3, batch_size=2)
GRID = preferences.grid(2, 4)
RENDERER = Renderer(TemplateSpec(), ("helpfulness", "harmlessness"))


class Echo:
    """Answers with what it was asked and the number of the row; notes every request."""

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.requests: list[tuple[str, int]] = []
        self.calls: list[int] = []

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> tuple[list[str], int]:
        self.requests += zip(texts, rows, strict=True)
        self.calls.append(len(texts))
        return [f"{self.name}|{text}|{row}|{sampling.seed}" for text, row in zip(texts, rows, strict=True)], len(texts)


class Traced(Echo):
    """The same, and tells tokens: the number of the row, once for each letter of its own name."""

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Generated:
        pair = super().generate(texts, rows, sampling)
        ids = [np.full(len(self.name), row) for row in rows]
        return Generated(*pair, Traces(self.name, ids, [-float(row) for row in rows], [True] * len(rows)))


def contents(made: Generated) -> tuple[list[str], int, list[float]]:
    assert made.traces is not None
    return made.responses, made.tokens, made.traces.logps


def tagged(prompt: str, tag: str) -> str:
    return f"{tag} {prompt}"


def test_batched_grid_equals_one_policy_at_a_time(lm: LanguageModel) -> None:
    generator = ModelGenerator(lm)
    policies = [Policy(generator, partial(RENDERER.preference, weights=w)) for w in GRID]
    together = respond_all(policies, PROMPTS, SAMPLING)
    assert together.responses == [policy.respond(PROMPTS, SAMPLING) for policy in policies]
    assert len({text for row in together.responses for text in row}) > len(GRID)


def test_prompts_draw_the_same_numbers_for_every_policy() -> None:
    echo = Echo()
    result = respond_all([Policy(echo, partial(tagged, tag=tag)) for tag in "ab"], PROMPTS, SAMPLING).responses
    assert result[0] == [f"echo|a {prompt}|{i}|3" for i, prompt in enumerate(PROMPTS)]
    assert result[1] == [f"echo|b {prompt}|{i}|3" for i, prompt in enumerate(PROMPTS)]


def test_shared_texts_are_sampled_once() -> None:
    echo = Echo()
    same = [Policy(echo, partial(tagged, tag="same")) for _ in GRID]
    answers = respond_all([*same, Policy(echo, partial(tagged, tag="own"))], PROMPTS, SAMPLING)
    assert sorted(echo.requests) == sorted((f"{tag} {p}", i) for tag in ("same", "own") for i, p in enumerate(PROMPTS))
    assert answers.tokens == 2 * len(PROMPTS)  # what was sampled, not what was handed out
    assert all(row == answers.responses[0] for row in answers.responses[:-1])
    assert answers.responses[-1] != answers.responses[0]
    # a prompt that is asked twice is answered twice
    assert answers.responses[0][0] != answers.responses[0][2]


def test_each_generator_answers_its_own_policies() -> None:
    first, two = Echo("one"), Echo("two")
    render = partial(tagged, tag="x")
    result = respond_all(
        [Policy(first, render), Policy(two, render), Policy(first, render)], PROMPTS, SAMPLING
    ).responses
    assert [row[0].split("|")[0] for row in result] == ["one", "two", "one"]
    assert len(first.requests) == len(two.requests) == len(PROMPTS)


def test_an_engine_leaves_alone_what_is_no_single_language_model() -> None:
    echo, refuses = Echo(), object()  # any use of it would raise
    answered = [respond_all([Policy(echo, str)], PROMPTS, SAMPLING, engine=engine) for engine in (None, refuses)]
    assert answered[0].responses == answered[1].responses


def test_best_of_n_chooses_among_independent_samples() -> None:
    echo = Echo()
    seen: list[tuple[list[str], list[list[str]]]] = []

    def choose(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[int]:
        seen.append((list(prompts), [list(row) for row in candidates]))
        return [2, 0, 1, 2]

    result = respond_all([Policy(echo, partial(tagged, tag="x"), samples=3, choose=choose)], PROMPTS, SAMPLING)
    prompts, candidates = seen[0]
    assert prompts == PROMPTS  # bare prompts: that is what scorers see
    assert [len(row) for row in candidates] == [3] * 4
    assert len({text for row in candidates for text in row}) == 12
    assert result.responses[0] == [candidates[0][2], candidates[1][0], candidates[2][1], candidates[3][2]]
    assert result.tokens == 12


def test_best_of_n_shares_its_candidates_with_other_preferences_and_the_plain_policy() -> None:
    echo = Echo()
    render = partial(tagged, tag="x")
    first = Policy(echo, render, samples=2, choose=lambda prompts, _: [0] * len(prompts))
    last = Policy(echo, render, samples=2, choose=lambda prompts, _: [1] * len(prompts))
    plain = Policy(echo, render)
    answers = respond_all([first, last, plain], PROMPTS, SAMPLING)
    assert answers.tokens == 2 * len(PROMPTS)
    assert answers.responses[0] == answers.responses[2] != answers.responses[1]


def test_every_policy_gets_the_tokens_of_the_answers_it_gave() -> None:
    """Over several chunks (four batches of two), with another policy that chooses and a generator that tells none."""
    first, none = Traced("ab"), Echo()
    picks = [2, 0, 1, 2]
    policies = [
        Policy(first, partial(tagged, tag="x"), samples=3, choose=lambda prompts, _: picks),
        Policy(none, partial(tagged, tag="x")),
        Policy(first, partial(tagged, tag="y")),
    ]
    answers = respond_all(policies, PROMPTS, SAMPLING)
    assert len(first.calls) > 1
    best, silent, plain = answers.traces
    assert silent is None and best is not None and plain is not None
    rows = [i + pick * len(PROMPTS) for i, pick in enumerate(picks)]
    assert [ids.tolist() for ids in best.ids] == [[row, row] for row in rows]
    assert best.logps == [-float(row) for row in rows]
    assert [text.split("|")[2] for text in answers.responses[0]] == [str(row) for row in rows]
    assert plain.vocabulary == "ab" and plain.logps == [0.0, -1.0, -2.0, -3.0]


def test_progress_tells_every_sampled_response_in_chunks() -> None:
    echo, done = Echo(), []
    policies = [Policy(echo, partial(tagged, tag=tag), samples=2) for tag in "abc"]
    respond_all(policies, PROMPTS, SAMPLING, done.append)
    assert sum(done) == len(echo.requests) == 24
    assert done == echo.calls == [8, 8, 8]  # four batches of two


@pytest.mark.slow
def test_generators_switch_between_base_and_adapters(make_lm: Callable[..., LanguageModel]) -> None:
    """Whatever ran before, a generator answers with its own adapter, and the base with none."""
    bare = ModelGenerator(make_lm())
    expected = {"base": contents(bare.generate(PROMPTS, range(4), SAMPLING))}
    lm = make_lm()
    generators = {"base": ModelGenerator(lm)}
    for seed, name in enumerate(("first", "second")):
        adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.5), seed, name)
        torch.manual_seed(seed)
        with torch.no_grad():
            for key, value in lm.model.named_parameters():
                if "lora_B" in key and name in key:
                    value.normal_(std=0.3)
        generators[name] = ModelGenerator(lm, name)
        expected[name] = contents(generators[name].generate(PROMPTS, range(4), SAMPLING))
    assert len({tuple(texts) for texts, *_ in expected.values()}) == 3
    for name in ("second", "base", "first", "first", "base", "second"):
        assert contents(generators[name].generate(PROMPTS, range(4), SAMPLING)) == expected[name]
    policies = [Policy(generators[name], partial(tagged, tag="")) for name in expected]
    again = respond_all(policies, PROMPTS, SAMPLING).responses
    assert again == [Policy(generators[name], partial(tagged, tag="")).respond(PROMPTS, SAMPLING) for name in expected]


def test_preferences_that_are_worded_alike_are_mixed_apart() -> None:
    """A mixture reads the preference itself; what a control model reads of it may be the same words."""
    from types import SimpleNamespace

    from moalign.policies.controlled import ControlPrompt

    class Mixed:
        def generate(self, texts: Sequence[ControlPrompt], rows: Sequence[int], sampling: Sampling) -> Generated:
            return Generated([f"mixed at {text.preference}" for text in texts], len(texts))

    words = [{"up_to": 0.25, "text": "few"}, {"up_to": 0.75, "text": "some"}, {"up_to": 1, "text": "many"}]
    template = TemplateSpec.model_validate({"words": {"helpfulness": words, "harmlessness": words}})
    context: Any = SimpleNamespace(task=SimpleNamespace(renderer=Renderer(template, ("helpfulness", "harmlessness"))))
    mixed, grid = Mixed(), [(0.3, 0.7), (0.5, 0.5), (0.7, 0.3)]
    policies = [Policy(mixed, lambda prompt, w=w: ControlPrompt.made(context, prompt, w)) for w in grid]
    told = respond_all([*policies, policies[0]], ["make soup"], SAMPLING)
    assert told.responses == [[f"mixed at {w}"] for w in (*grid, grid[0])]
    one, other = (ControlPrompt.made(context, "make soup", w) for w in grid[:2])
    assert str(one) == str(other) and one != other and len({one, other}) == 2
    assert one == ControlPrompt.made(context, "make soup", grid[0])

"""KL to base: against plain passes of the model, 0 for the base itself, a bound where a policy chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moalign.core.preferences import Preference
from moalign.evaluation.divergence import KlToBase, from_base, of_choice
from moalign.evaluation.evaluate import evaluate
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm.generator import Generator, ModelGenerator
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.sampler import Generated, Sampling, Traces
from moalign.methods.base import Method
from moalign.methods.sft import Sft
from moalign.policies.policy import Policy, respond_all
from moalign.policies.prompted import base
from moalign.tasks.sandbox.base import make_tokenizer
from moalign.training.job import RunContext

TOLERANCE = 1e-4
"""Nats per response; sums of a dozen float32 log-probabilities, with and without a cache."""


@pytest.fixture
def opened(small_task: tuple[str, ...], tmp_path: Path) -> Any:
    """``opened("sft", "steps=0")``: a finished run."""

    def make(method: str, *overrides: str) -> tuple[Method, RunContext]:
        run, _ = train(plan(TrainRequest(method, overrides=(*small_task, *overrides), results=tmp_path)))
        return context_of(run, tmp_path)

    return make


def content(method: Method, context: RunContext) -> dict[str, Any]:
    return evaluate(method, context).result.content


def log_prob(lm: LanguageModel, text: str, ids: Sequence[int], temperature: float = 1.0) -> float:
    """Return log pi of a response by one plain pass in double precision, as the model stands."""
    (head,) = lm.encode([text])
    with torch.no_grad():
        logits = lm.model(torch.tensor([[*head, *ids]])).logits[0, len(head) - 1 : -1].double() / temperature
    return float(torch.log_softmax(logits, -1)[range(len(ids)), list(ids)].sum())


def ratio(context: RunContext, policy: Policy, traces: Traces, temperature: float = 1.0) -> float:
    """Return the mean over prompts of log pi(y | as asked) - log pi_base(y | bare), answer by answer."""
    task = context.task
    lm, measured_ = task.language_model, []
    generator = policy.generator
    assert isinstance(generator, ModelGenerator)
    for prompt, ids in zip(task.eval_prompts, traces.ids, strict=True):
        with reference_mode(lm):
            bare = log_prob(lm, task.renderer.plain(prompt), ids, temperature)
            own = log_prob(lm, policy.render(prompt), ids, temperature)
        if generator.adapter is not None:
            lm.model.set_adapter(generator.adapter)
            own = log_prob(lm, policy.render(prompt), ids, temperature)
        measured_.append(own - bare)
    return float(np.mean(measured_))


def measured(context: RunContext, policies: Sequence[Policy], **changes: float) -> tuple[list[KlToBase], Any]:
    task = context.task
    sampling = replace(task.sampling(5), **changes)
    answers = respond_all(policies, task.eval_prompts, sampling)
    return from_base(task, policies, task.eval_prompts, answers, sampling), answers


def test_the_base_asked_with_the_bare_prompt_has_not_moved(opened: Any) -> None:
    record = content(*opened("sft", "steps=0"))
    assert [point["kl"] for point in record["points"]] == pytest.approx([0.0] * 3, abs=TOLERANCE)
    assert record["quality"]["kl"] == pytest.approx(0.0, abs=TOLERANCE)
    assert record["quality"]["kl_bound"] is False


@pytest.mark.slow
def test_a_preference_in_the_prompt_moves_the_base_by_what_plain_passes_say(opened: Any) -> None:
    method, context = opened("prompting")
    record = content(method, context)
    task = context.task
    policies = [method.policy(context, w) for w in task.grid]
    answers = respond_all(policies, task.eval_prompts, task.sampling(task.card.evaluation.seed))
    wanted = [ratio(context, *pair) for pair in zip(policies, answers.traces, strict=True)]
    assert [point["kl"] for point in record["points"]] == pytest.approx(wanted, abs=TOLERANCE)
    assert record["quality"]["kl"] == pytest.approx(float(np.mean(wanted)), abs=TOLERANCE)
    assert min(wanted) > 0.05 and len(set(wanted)) == 3  # the random base is no expert, but it does read its prompt
    assert json.loads((context.run.path / "eval.json").read_text()) == record


@pytest.mark.slow
def test_an_adapter_s_move_is_that_of_plain_passes_with_and_without_it(opened: Any) -> None:
    method, context = opened("sft", "steps=6", "batch=4", "lr=0.03", "max_tokens=128")
    policy = method.policy(context, (0.5, 0.5))
    (measured_,), answers = measured(context, [policy])
    assert measured_.nats == pytest.approx(ratio(context, policy, answers.traces[0]), abs=TOLERANCE)
    assert measured_.nats is not None and measured_.nats > 0.1 and not measured_.bound


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.6, "temperature": 0.8}])
def test_temperature_counts_for_both_and_a_nucleus_leaves_the_base_where_it_is(
    opened: Any, changes: dict[str, float]
) -> None:
    _, context = opened("sft", "steps=0")
    generator, renderer = base(context), context.task.renderer
    bare = Policy(generator, renderer.plain)
    asked = Policy(generator, lambda prompt: renderer.preference(prompt, (0.9, 0.1)))
    measured_, answers = measured(context, [bare, asked], **changes)
    assert measured_[0].nats == pytest.approx(0.0, abs=TOLERANCE)
    assert measured_[1].nats == pytest.approx(
        ratio(context, asked, answers.traces[1], changes["temperature"]), abs=TOLERANCE
    )


def test_different_answers_are_read_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moalign.training import reference

    _, context = opened("sft", "steps=0")
    rows: list[int] = []
    plain = reference.log_probs
    monkeypatch.setattr(
        reference, "log_probs", lambda lm, some, **more: rows.append(len(some)) or plain(lm, some, **more)
    )
    same = [Policy(base(context), context.task.renderer.plain) for _ in range(4)]
    measured(context, same)
    assert rows == [len(context.task.eval_prompts)]


def test_answers_end_at_their_stop_text_for_both(opened: Any) -> None:
    """What the policy says after it is no part of the answer, so it is no part of the divergence."""
    _, context = opened("sft", "steps=0")
    asked = Policy(base(context), lambda prompt: context.task.renderer.preference(prompt, (1.0, 0.0)))
    _, whole = measured(context, [asked])
    word = whole.responses[0][0].split()[1]
    measured_, answers = measured(context, [asked], stop=(word,))  # type: ignore[arg-type]
    assert sum(map(len, answers.traces[0].ids)) < sum(map(len, whole.traces[0].ids))
    assert measured_[0].nats == pytest.approx(ratio(context, asked, answers.traces[0]), abs=TOLERANCE)


# -- choosing among samples ------------------------------------------------------------------------------------------


def test_the_bound_on_choosing() -> None:
    assert of_choice(1) == 0.0
    assert of_choice(2) == pytest.approx(0.1931, abs=5e-5)  # log 2 - 1/2
    assert of_choice(4) == pytest.approx(0.6363, abs=5e-5)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_no_choice_among_samples_moves_further_than_the_bound(n: int) -> None:
    """Exactly, for ranked answers: P(best <= y) = P(y' <= y)^n. The more answers there are, the nearer the bound."""

    def moved(shares: np.ndarray) -> float:
        best = np.diff(np.concatenate([[0.0], shares.cumsum() ** n]))
        return float((best * np.log(best / shares)).sum())

    few, many = (moved(np.full(count, 1 / count)) for count in (10, 100_000))
    assert few < many < of_choice(n)
    assert many == pytest.approx(of_choice(n), abs=1e-3)


def test_best_of_n_is_told_as_a_bound(opened: Any) -> None:
    record = content(*opened("best-of-n", "n=3"))
    wanted = math.log(3) - 2 / 3
    assert [point["kl"] for point in record["points"]] == pytest.approx([wanted] * 3, abs=TOLERANCE)
    assert record["quality"]["kl"] == pytest.approx(wanted, abs=TOLERANCE)
    assert [record["quality"]["kl_bound"], *(point["kl_bound"] for point in record["points"])] == [True] * 4


def test_choosing_comes_on_top_of_where_the_samples_come_from(opened: Any) -> None:
    _, context = opened("sft", "steps=0")

    def shortest(prompts: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[int]:
        return [min(range(len(row)), key=lambda i: len(row[i])) for row in candidates]

    def render(prompt: str) -> str:
        return context.task.renderer.preference(prompt, (0.3, 0.7))

    chosen = Policy(base(context), render, samples=4, choose=shortest)
    measured_, answers = measured(context, [chosen])
    wanted = ratio(context, chosen, answers.traces[0]) + of_choice(4)
    assert measured_ == [KlToBase(pytest.approx(wanted, abs=TOLERANCE), bound=True)]
    assert measured(context, [Policy(base(context), render, samples=1, choose=shortest)])[0][0].bound is False


# -- where it is not known -------------------------------------------------------------------------------------------


class Saying:
    """Answers as another generator does, and tells something else of its tokens."""

    def __init__(self, inner: Generator, **changes: Any) -> None:
        self.inner, self.changes = inner, changes

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Sampling) -> Any:
        made = self.inner.generate(texts, rows, sampling)
        assert isinstance(made, Generated) and made.traces is not None
        if not self.changes:
            return made.responses, made.tokens
        return Generated(made.responses, made.tokens, replace(made.traces, **self.changes))


def other_words() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["newword"])
    return tokenizer


def test_tokens_that_are_not_told_or_not_the_base_s_give_none(opened: Any) -> None:
    _, context = opened("sft", "steps=0")
    generator, plain = base(context), context.task.renderer.plain
    count = len(context.task.eval_prompts)
    sources: list[Any] = [
        Saying(generator),
        Saying(generator, vocabulary=other_words()),
        Saying(generator, logps=[float("nan")] * count),
        Saying(generator, vocabulary=make_tokenizer()),  # another object with the same words
        generator,
    ]
    measured_, _ = measured(context, [Policy(source, plain) for source in sources])
    assert [one.nats is None for one in measured_] == [True, True, True, False, False]
    assert measured_[3].nats == pytest.approx(0.0, abs=TOLERANCE)


def test_greedy_answers_have_no_estimate_and_ask_the_base_nothing(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, context = opened("sft", "steps=0")
    monkeypatch.setattr("moalign.training.reference.log_probs", lambda *given, **named: pytest.fail("it asked"))
    assert measured(context, [Policy(base(context), context.task.renderer.plain)], temperature=0.0)[0] == [
        KlToBase(None)
    ]


class HalfKnown(Sft):
    """The base, which tells its tokens for one preference only."""

    def policy(self, context: RunContext, preference: Preference) -> Policy:
        """See above."""
        source: Any = base(context)
        quiet = context.cache.setdefault("quiet", Saying(source))
        return Policy(source if preference[0] == 1 else quiet, context.task.renderer.plain)


def test_a_mean_over_the_grid_needs_every_preference(opened: Any) -> None:
    _, context = opened("sft", "steps=0")
    record = content(HalfKnown(), context)
    assert [point["kl"] is None for point in record["points"]] == [True, True, False]
    assert record["quality"]["kl"] is None

"""``eval``: one judge; what it writes, reads back, and in which order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference
from moalign.evaluation import evaluate as evaluation
from moalign.evaluation.evaluate import Evaluation, evaluate, held_out, preferences_for
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm import sampler
from moalign.methods.base import Capabilities, Method
from moalign.methods.sft import Sft
from moalign.pareto.hypervolume import hypervolume
from moalign.pareto.indicators import spacing
from moalign.policies import policy
from moalign.rewards.panel import RewardPanel
from moalign.runs import meter
from moalign.tasks.sandbox import world
from moalign.training.job import RunContext

PROMPTS = 8
LAST = len(world.SLOTS[0]) - 1


class Speaker:
    """Says in each slot the last phrase or the first, by the preference and the prompt that the text holds; its
    answers to a repeated prompt differ."""

    calls = 0

    def generate(self, texts: Sequence[str], rows: Sequence[int], sampling: Any) -> tuple[list[str], int]:
        type(self).calls += 1
        return [said(*text.split("|"), row % 2) for text, row in zip(texts, rows, strict=True)], 10 * len(texts)


def said(weight: str, prompt: str, sample: int = 0) -> str:
    first = round(float(weight) * len(world.SLOTS))
    choice = [0 if slot < first else LAST for slot in range(len(world.SLOTS))]
    choice[-1] = len(prompt) % 3 + sample
    return world.response_text(tuple(choice))


class Steered(Sft):
    """Answers by its first weight, without a model."""

    def policy(self, context: RunContext, preference: Preference) -> policy.Policy:
        """See :class:`Speaker`."""
        speaker = context.cache.setdefault("speaker", Speaker())
        return policy.Policy(speaker, lambda prompt: f"{preference[0]}|{prompt}")


class Fixed(Steered):
    """The same, for trained preferences alone."""

    capabilities = Capabilities(one_policy=False, steerable=False)


Opened = tuple[Method, RunContext]


def opened(task: tuple[str, ...], results: Path, method: Method, **changes: Any) -> Opened:
    run, _ = train(plan(TrainRequest("sft", overrides=(*task, "steps=0"), results=results, **changes)))
    Speaker.calls = 0
    return method, context_of(run, results)[1]


@pytest.fixture
def steered(small_task: tuple[str, ...], tmp_path: Path) -> Opened:
    return opened(small_task, tmp_path, Steered())


def expected(context: RunContext, grid: Sequence[Preference]) -> np.ndarray:
    """The scores ``[prompts, preferences, objectives]``, one prompt and preference at a time."""
    scores = np.zeros((PROMPTS, len(grid), 2))
    for p, prompt in enumerate(context.task.eval_prompts):
        for k, preference in enumerate(grid):
            raw = context.panel.score([prompt], [said(str(preference[0]), prompt, p % 2)])
            scores[p, k] = context.task.normaliser.unit(raw)[0]
    return scores


def test_scores_are_prompts_by_preferences_by_objectives(steered: Opened) -> None:
    result = evaluate(*steered)
    wanted = expected(steered[1], steered[1].task.grid)
    assert result.scores.shape == (PROMPTS, 3, 2)
    assert np.allclose(result.scores, wanted)
    for k, point in enumerate(result.result.content["points"]):
        assert tuple(point["prefs"]) == steered[1].task.grid[k]
        assert point["mean"] == pytest.approx(wanted[:, k].mean(axis=0).tolist())
    assert len({tuple(point["mean"]) for point in result.result.content["points"]}) == 3


def test_what_eval_json_holds(steered: Opened) -> None:
    method, context = steered
    content = evaluate(method, context).result.content
    promised = {"run", "objectives", "points", "hypervolume", "hypervolume_ci", "ref", "optimal_share", "indicators"}
    assert promised <= set(content)
    assert {
        "run_id",
        "method",
        "task",
        "card_hash",
        "seed",
        "prompts",
        "front",
        "sensitivity",
        "quality",
        "cost",
    } <= set(content)
    assert content == json.loads((context.run.path / "eval.json").read_text())
    assert content["run"] == str(context.run.path)
    assert content["objectives"] == ["helpfulness", "harmlessness"]
    assert content["ref"] == list(context.task.card.reference_point)
    assert content["prompts"] == PROMPTS

    means = np.array([point["mean"] for point in content["points"]])
    assert content["hypervolume"] == pytest.approx(hypervolume(means, content["ref"]))
    low, high = content["hypervolume_ci"]
    assert low <= content["hypervolume"] <= high
    for point in content["points"]:
        assert all(bounds[0] <= mean <= bounds[1] for mean, bounds in zip(point["mean"], point["ci"], strict=True))
        assert context.task.normaliser.unit([point["raw"]])[0].tolist() == pytest.approx(point["mean"])
    best = context.task.optimum(context.task.grid, context.task.eval_prompts)
    assert best is not None
    most = hypervolume(context.task.normaliser.unit(best), content["ref"])
    assert content["optimal_share"] == pytest.approx(content["hypervolume"] / most)
    assert 0 < content["optimal_share"] < 1
    assert {"tau", "inner_product", "expected_utility", "regret", "igd_plus"} <= set(content["indicators"])
    assert content["indicators"]["spacing"] == pytest.approx(spacing(means))
    assert [point["kl"] for point in content["points"]] == [None] * 3  # the speaker tells nothing of its tokens
    assert content["quality"]["kl"] is None and content["quality"]["kl_bound"] is False
    assert content["cost"]["tokens_generated"] == PROMPTS * 3 * 10
    assert content["cost"]["reward_calls"] == 0  # what the judge scores is not the policy's cost


def test_collapse_is_judged_by_the_policys_tokens_and_what_short_means_on_the_task(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    method, context = opened(small_task, tmp_path / "a", Steered())
    found = evaluate(method, context)
    tokens = context.task.tokens(context.run.read_table("responses")["response"])
    assert found.result.quality.causes["short"] == 0
    assert found.result.quality.mean_length == pytest.approx(np.mean([len(ids) for ids in tokens]))
    longest = max(len(ids) for ids in tokens)
    requested = opened((*small_task, f"task.quality={{short: {longest + 1}}}"), tmp_path / "b", Steered())
    result = evaluate(*requested).result
    assert (found.result.warnings, result.quality.causes["short"]) == (None, 1)
    assert [text.partition(" (")[0] for text in result.warnings or ()] == ["100 % of its responses are collapsed"]


def test_a_preference_that_collapses_alone_is_named(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One empty answer of 24 is no warning by itself; it is one of the 8 at its preference."""
    method, context = opened(small_task, tmp_path, Steered())
    one = f"0.5|{context.task.eval_prompts[0]}"
    answers = Speaker.generate

    def generate(self: Speaker, texts: Sequence[str], *rest: Any) -> tuple[list[str], int]:
        responses, tokens = answers(self, texts, *rest)
        return ["" if text == one else response for text, response in zip(texts, responses, strict=True)], tokens

    monkeypatch.setattr(Speaker, "generate", generate)
    result = evaluate(method, context).result
    assert [point.collapsed for point in result.points] == [0, 1 / 8, 0]
    assert result.quality.mean_length == pytest.approx(np.mean([point.mean_length for point in result.points]))
    assert [text.partition(" (")[0] for text in result.warnings or ()] == [
        "at 0.5,0.5 12 % of its responses are collapsed"
    ]


def test_the_table_holds_every_answer_with_its_raw_scores(steered: Opened) -> None:
    method, context = steered
    evaluate(method, context)
    table = pd.read_parquet(context.run.path / "responses.parquet")
    assert table.columns.tolist() == [
        *("prompt", "preference", "response", "ids", "finished"),
        *("helpfulness", "harmlessness"),
    ]
    assert len(table) == PROMPTS * 3
    assert table["preference"].unique().tolist() == ["0,1", "0.5,0.5", "1,0"]
    assert table["prompt"].tolist() == context.task.eval_prompts * 3
    raw = context.panel.score(table["prompt"].tolist(), table["response"].tolist())
    assert np.array_equal(table[context.task.names].to_numpy(), raw)


def test_answers_without_known_tokens_are_finished_texts(steered: Opened) -> None:
    evaluate(*steered)
    table = steered[1].run.read_table("responses")
    assert table["ids"].isna().all()
    assert table["finished"].all()


def assert_equal(left: Evaluation, right: Evaluation) -> None:
    assert left.result == right.result
    assert np.array_equal(left.scores, right.scores)


def test_what_was_evaluated_before_is_read_back(steered: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(*steered)
    calls = Speaker.calls
    assert calls > 0
    monkeypatch.setattr(type(steered[1].panel), "score", lambda *given: pytest.fail("it scored again"))
    assert_equal(evaluate(*steered), first)
    assert Speaker.calls == calls


@pytest.mark.slow
def test_reading_back_loads_no_model(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with a real policy."""
    run, _ = train(plan(TrainRequest("prompting", overrides=small_task, results=tmp_path)))
    method, context = context_of(run, tmp_path)
    first = evaluate(method, context)
    monkeypatch.setattr(sampler, "sample", lambda *given, **named: pytest.fail("it sampled again"))
    monkeypatch.setattr("moalign.lm.language_model.load", lambda *given: pytest.fail("it loaded a model"))
    assert_equal(evaluate(*context_of(run, tmp_path)), first)


def test_an_evaluation_of_another_card_is_not_read_back(steered: Opened) -> None:
    method, context = steered
    evaluate(method, context)
    path = context.run.path / "eval.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "card_hash": "0" * 16, "hypervolume": 99.0}))
    calls = Speaker.calls
    assert evaluate(method, context).result.hypervolume == content["hypervolume"]
    assert Speaker.calls > calls


def test_an_evaluation_of_fewer_preferences_than_its_answers_is_named(steered: Opened) -> None:
    place = Path(evaluate(*steered).result.run) / "eval.json"
    content = json.loads(place.read_text())
    place.write_text(json.dumps({**content, "points": content["points"][:1]}))
    with pytest.raises(RequestError, match=r"eval.json: it has 1 preferences, and its answers are for 3; delete"):
        evaluate(*steered)


@pytest.mark.parametrize("what", ["truncated", "missing"])
def test_answers_that_are_gone_or_damaged_are_told_with_what_to_do(steered: Opened, what: str) -> None:
    place = Path(evaluate(*steered).result.run) / "responses.parquet"
    content = place.read_bytes()
    place.unlink() if what == "missing" else place.write_bytes(content[:100])
    with pytest.raises(RequestError, match=r"eval.json was made from it; delete both and evaluate again: moalign eval"):
        evaluate(*steered)


def test_other_preferences_go_to_another_file(steered: Opened) -> None:
    method, context = steered
    own = evaluate(method, context)
    wanted = [(0.3, 0.7), (0.9, 0.1)]
    other = evaluate(method, context, wanted)
    assert [tuple(point["prefs"]) for point in other.result.content["points"]] == wanted
    assert np.allclose(other.scores, expected(context, wanted))
    assert json.loads((context.run.path / "eval.json").read_text()) == own.result.content
    (file,) = context.run.path.glob("eval-*.json")
    assert json.loads(file.read_text()) == other.result.content
    assert (context.run.path / file.name.replace("eval", "responses").replace("json", "parquet")).is_file()
    calls = Speaker.calls
    assert_equal(evaluate(method, context, wanted), other)
    assert Speaker.calls == calls
    evaluate(method, context, [(0.9, 0.1)])
    assert len(list(context.run.path.glob("eval-*.json"))) == 2


def test_the_tasks_grid_spelt_out_is_the_tasks_grid(steered: Opened) -> None:
    method, context = steered
    evaluate(method, context, context.task.grid)
    assert (context.run.path / "eval.json").is_file()
    assert not list(context.run.path.glob("eval-*.json"))


def test_several_samples_of_a_prompt_are_averaged(small_task: tuple[str, ...], tmp_path: Path) -> None:
    method, context = opened((*small_task, "task.evaluation.samples=2"), tmp_path, Steered())
    result = evaluate(method, context)
    assert result.scores.shape == (PROMPTS, 3, 2)
    assert result.result.prompts == PROMPTS
    for p, prompt in enumerate(context.task.eval_prompts):
        for k, preference in enumerate(context.task.grid):
            both = [said(str(preference[0]), prompt, sample) for sample in (0, 1)]
            raw = context.panel.score([prompt] * 2, both)
            assert both[0] != both[1]
            assert result.scores[p, k] == pytest.approx(context.task.normaliser.unit(raw).mean(axis=0))


def test_more_samples_than_the_card_asks_for(small_task: tuple[str, ...], tmp_path: Path, steered: Opened) -> None:
    """As a card with as many would have it; the card's own evaluation stays, and the run is the same."""
    method, context = steered
    own = evaluate(method, context)
    assert own.result.samples == 1
    requested = evaluate(method, context, samples=2)
    assert (requested.result.samples, requested.result.prompts) == (2, PROMPTS)
    other = evaluate(*opened((*small_task, "task.evaluation.samples=2"), tmp_path / "other", Steered()))
    assert np.array_equal(requested.scores, other.scores)
    assert (
        requested.result.content["points"] == other.result.content["points"]
        and requested.result.hypervolume == other.result.hypervolume
    )
    assert not np.allclose(requested.scores, own.scores)
    assert json.loads((context.run.path / "eval.json").read_text()) == own.result.content
    assert json.loads((context.run.path / "eval-x2.json").read_text()) == requested.result.content
    assert len(context.run.read_table("responses-x2")) == 2 * len(context.run.read_table("responses"))
    calls = Speaker.calls
    assert_equal(evaluate(method, context, samples=2), requested)
    assert_equal(evaluate(method, context, samples=1), own)  # the card's number spelt out is the card's evaluation
    assert Speaker.calls == calls


def test_an_evaluation_that_does_not_say_how_many_answers_is_of_the_cards_number(steered: Opened) -> None:
    method, context = steered
    own = evaluate(method, context)
    path = context.run.path / "eval.json"
    older = {key: value for key, value in own.result.content.items() if key not in ("samples", "version")}
    path.write_text(json.dumps(older))
    assert_equal(evaluate(method, context), own)


def test_a_method_that_is_not_steerable_answers_for_what_it_was_trained_on(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    method, context = opened(small_task, tmp_path, Fixed(), prefs=("0.3,0.7", "1,0"))
    assert preferences_for(method, context, None) == [(0.3, 0.7), (1.0, 0.0)]
    assert preferences_for(method, context, [(1.0, 0.0)]) == [(1.0, 0.0)]
    with pytest.raises(RequestError, match=r"--prefs 0.5,0.5: .* trained on: 0.3,0.7; 1,0"):
        evaluate(method, context, [(0.5, 0.5)])
    evaluate(method, context)
    assert len(list(context.run.path.glob("eval-*.json"))) == 1  # not the task's grid


def test_a_third_that_is_typed_with_eight_digits_is_the_one_that_was_trained(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    method, context = opened(small_task, tmp_path, Fixed(), grid=4)
    typed = [preferences.parse(preferences.typed(w), context.task.names) for w in context.preferences]
    assert typed[1] != context.preferences[1] == (1 / 3, 2 / 3)
    assert preferences_for(method, context, typed) == list(context.preferences)
    with pytest.raises(
        RequestError, match=r"--prefs 0.3333,0.6667: sft answers only for .*: 0,1; 0.33333333,0.66666667;"
    ):
        preferences_for(method, context, [(0.3333, 0.6667)])


def test_two_spellings_of_a_preference_are_asked_once(steered: Opened) -> None:
    own = steered[1].task.grid[1]
    assert preferences_for(*steered, [own, tuple(w * (1 + 1e-9) for w in own)]) == [own]


def test_a_grid_preference_that_is_typed_is_judged_under_the_name_of_the_grid(steered: Opened) -> None:
    asked = [tuple(w * (1 + 1e-8) for w in preference) for preference in steered[1].task.grid]
    assert preferences_for(*steered, asked) == steered[1].task.grid


@pytest.mark.parametrize("gpu", [True, False])
def test_the_memory_of_answering_is_not_that_of_training(
    steered: Opened, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    """Training took 900 bytes of the GPU; counted anew, answering takes 70, and judging 80.

    Without a GPU it is not told: a process's peak would be its training's.
    """
    peak, found = [900], iter([70, 80])
    monkeypatch.setattr(meter, "fresh_device_peak", lambda: peak.__setitem__(0, 0))
    monkeypatch.setattr(meter, "device_peak_bytes", lambda: (peak[0] or next(found)) if gpu else 0)
    assert evaluate(*steered, None).result.content["cost"]["peak_memory_bytes"] == (80 if gpu else None)


def test_answers_outlive_an_interruption_while_they_are_judged(
    steered: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: while scores are waited for, and between the table of answers and the record. They are sampled once."""
    run = steered[1].run
    expected = without_clocks(evaluate(*steered, None).result.content)
    (run.path / "eval.json").unlink()
    (run.path / "responses.parquet").unlink()
    Speaker.calls = 0

    def stop(*_: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    for place, what in ((RewardPanel, "score"), (evaluation, "proxy_reward")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(place, what, stop)
            evaluate(*steered, None)
        assert not (run.path / "eval.json").exists()
        assert (run.path / "unjudged-responses.parquet").is_file()
    sampled = Speaker.calls
    assert sampled > 0
    assert without_clocks(evaluate(*steered, None).result.content) == expected
    assert Speaker.calls == sampled, "the answers that wait are taken over"
    assert not list(run.path.glob("unjudged-*")), "and forgotten when they are judged"
    (run.path / "unjudged-responses.parquet").write_bytes(b"left by a kill between the record and its clearing up")
    evaluate(*steered, None)
    assert not list(run.path.glob("unjudged-*"))


@pytest.mark.parametrize("what", ["card", "damaged", "without KL"])
def test_answers_that_wait_of_another_card_or_damaged_are_sampled_again(
    steered: Opened, monkeypatch: pytest.MonkeyPatch, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = steered[1].run
    waiting = run.path / "unjudged-responses.parquet"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(evaluation, "proxy_reward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(*steered, None)
    if what == "damaged":
        waiting.write_bytes(waiting.read_bytes()[:100])
    else:
        table = pd.read_parquet(waiting)
        assert table.attrs["card"] == steered[1].task.hash
        if what == "card":
            table.attrs["card"] = "0123456789abcdef"
        else:
            del table.attrs["kl"]
        table["response"] = "nothing of the kind"
        table.to_parquet(waiting, index=False)
    before = Speaker.calls
    evaluate(*steered, None)
    assert Speaker.calls > before and not waiting.exists()
    said = [] if what == "card" else [f"warning: {waiting}: damaged, so these answers are sampled again"]
    assert [line.partition(" (")[0] for line in capsys.readouterr().err.splitlines()] == said


def without_clocks(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "cost": {key: content["cost"][key] for key in ("tokens_generated", "reward_calls")}}


def test_progress_ends_at_the_total(steered: Opened) -> None:
    reports: list[tuple[str, int, int]] = []
    evaluate(*steered, None, lambda *what: reports.append(what))
    answering = [(done, total) for what, done, total in reports if what == "answering"]
    assert answering[-1] == (PROMPTS * 3, PROMPTS * 3)
    assert answering == sorted(answering)


# -- held-out preferences --------------------------------------------------------------------------------------------


def unaware(task: tuple[str, ...], results: Path, holdout: str) -> Opened:
    return opened((*task, f"holdout={holdout}"), results, Steered())


def test_held_out_preferences_are_judged_beside_the_trained_ones(small_task: tuple[str, ...], tmp_path: Path) -> None:
    method, context = unaware(small_task, tmp_path, "[[0.5, 0.5]]")
    assert held_out(context) == [(0.5, 0.5)]
    assert list(context.preferences) == [(0.0, 1.0), (1.0, 0.0)]
    result = evaluate(method, context)
    content = result.result.content["generalisation"]
    assert content["trained"]["prefs"] == [[0.0, 1.0], [1.0, 0.0]]
    assert content["held_out"]["prefs"] == [[0.5, 0.5]]
    means, ref = result.scores.mean(axis=0), result.result.content["ref"]
    best = np.array(result.result.content["optimum"]["points"])
    for side, rows in (("trained", [0, 2]), ("held_out", [1])):
        volume = hypervolume(means[rows], ref)
        assert content[side]["hypervolume"] == pytest.approx(volume)
        assert content[side]["optimal_share"] == pytest.approx(volume / hypervolume(best[rows], ref))
        weights = np.array(content[side]["prefs"])
        utility, most = ((weights * found[rows]).sum(axis=1).mean() for found in (means, best))
        assert content[side]["utility_share"] == pytest.approx(utility / most)
    assert json.loads((context.run.path / "eval.json").read_text())["generalisation"] == content


def test_held_out_preferences_off_the_grid_are_answered_too(small_task: tuple[str, ...], tmp_path: Path) -> None:
    method, context = unaware(small_task, tmp_path, "[[0.3, 0.7], [0.9, 0.1]]")
    result = evaluate(method, context)
    content = result.result.content["generalisation"]
    assert [point["prefs"] for point in result.result.content["points"]] == [list(w) for w in context.task.grid]
    assert content["trained"]["prefs"] == [list(w) for w in context.task.grid]
    assert content["held_out"]["prefs"] == [[0.3, 0.7], [0.9, 0.1]]
    wanted = expected(context, [(0.3, 0.7), (0.9, 0.1)]).mean(axis=0)
    assert content["held_out"]["hypervolume"] == pytest.approx(hypervolume(wanted, result.result.content["ref"]))
    other = evaluate(method, context, [(0.3, 0.7), (0.9, 0.1)])
    assert other.result.generalisation is None


def test_without_a_holdout_there_is_nothing_to_tell(steered: Opened) -> None:
    assert evaluate(*steered).result.generalisation is None

"""RiC: targets, filters, relabelled rows, and how a preference becomes desired rewards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign.config.card import TemplateSpec
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.core.seeds import derive
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm import adapters
from moalign.lm.chat import Renderer
from moalign.methods import ric
from moalign.methods.ric import Config, Ric, boundary_targets, desired_rewards, keep
from moalign.pareto.front import layers
from moalign.runs.meter import Meter
from moalign.tasks.responses import columns, from_columns
from moalign.training.job import Job

BOX = np.array([[-4.0, 4.0], [-4.0, 4.0]])
QUICK = (
    "offline={steps: 2, batch: 4, max_tokens: 64}",
    "online={steps: 2, batch: 4, max_tokens: 64}",
    "offline_part=10",
)


# -- inference: preference -> desired rewards ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preference", "name", "wanted"),
    [
        ((0.5, 0.5), "l2", (1.7, 1.7)),
        ((0.5, 0.5), "linf", (4.0, 4.0)),
        ((0.5, 0.5), "linear", (0.0, 0.0)),
        ((0.8, 0.2), "l2", (3.8, -2.1)),
        ((0.8, 0.2), "linf", (4.0, -0.8)),
        ((0.8, 0.2), "linear", (2.4, -2.4)),
        ((1.0, 0.0), "l2", (4.0, -4.0)),
        ((1.0, 0.0), "linf", (4.0, -4.0)),
        ((0.0, 1.0), "linear", (-4.0, 4.0)),
    ],
)
def test_the_three_maps(preference: tuple[float, ...], name: Any, wanted: tuple[float, ...]) -> None:
    found = desired_rewards(preference, BOX, name)
    assert [round(float(value), 1) for value in found] == list(wanted)


@pytest.mark.parametrize("name", ["l2", "linf", "linear"])
def test_the_maps_stay_in_a_box_that_is_not_square(name: Any) -> None:
    box = np.array([[-1.0, 3.0], [0.0, 0.5], [-2.0, -1.0]])
    for preference in np.random.default_rng(0).dirichlet(np.ones(3), size=50):
        found = desired_rewards(preference.tolist(), box, name)
        assert (found >= box[:, 0] - 1e-12).all()
        assert (found <= box[:, 1] + 1e-12).all()


def test_three_objectives_by_hand() -> None:
    box = np.array([[0.0, 1.0]] * 3)
    assert desired_rewards((0.5, 0.3, 0.2), box, "linf").tolist() == pytest.approx([1.0, 0.9, 0.6])
    assert desired_rewards((0.6, 0.0, 0.4), box, "l2").tolist() == pytest.approx([0.8320503, 0.0, 0.5547002])


# -- targets and filters ---------------------------------------------------------------------------------------------


def test_targets_lie_on_the_upper_right_boundary() -> None:
    box = np.array([[-1.0, 3.0], [0.0, 0.5], [-2.0, -1.0]])
    targets = boundary_targets(np.random.default_rng(0), box, 6000)
    below = targets < box[:, 1]
    assert (below.sum(axis=1) == 1).all()  # exactly one coordinate is not at its maximum
    assert (targets >= box[:, 0]).all()
    assert below.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.03)
    # The smallest of three uniform numbers has mean 1/4.
    relative = ((targets - box[:, 0]) / (box[:, 1] - box[:, 0]))[below]
    assert relative.mean() == pytest.approx(0.25, abs=0.01)
    assert relative.max() > 0.8


@pytest.mark.parametrize("objectives", [2, 3])
def test_any_quantile_keeps_one_minus_seven_tenths_to_the_m(objectives: int) -> None:
    z = np.random.default_rng(1).normal(size=(20_000, objectives))
    kept = keep(z, Config())
    assert kept.mean() == pytest.approx(1 - 0.7**objectives, abs=0.01)
    bounds = np.quantile(z, 0.7, axis=0)
    assert (kept == (z >= bounds).any(axis=1)).all()


def test_any_quantile_by_hand() -> None:
    z = np.array([[float(i), float((7 * i) % 11)] for i in range(11)])  # both columns are a permutation of 0..10
    kept = keep(z, Config(quantile=0.8))
    assert np.flatnonzero(kept).tolist() == [3, 6, 8, 9, 10]  # the first is 8, 9, 10; the second at 9, 6 (9), 3 (10)


def test_an_objective_that_is_mostly_at_its_least_does_not_let_everything_pass() -> None:
    z = np.zeros((20, 2))
    z[:, 0] = np.arange(20)
    z[3, 1] = 2.0  # the 0.7 quantile of this column is 0
    assert np.flatnonzero(keep(z, Config())).tolist() == [3, 14, 15, 16, 17, 18, 19]
    assert keep(np.ones((5, 2)), Config()).all()  # nothing varies: nothing is told apart


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9, 1.0])
def test_nondominated_keeps_whole_first_layers_and_no_more_than_needed(share: float) -> None:
    z = np.random.default_rng(2).normal(size=(300, 2))
    kept = keep(z, Config(filter="nondominated", keep_share=share))
    layer = layers(z)
    last = layer[kept].max()
    assert (kept == (layer <= last)).all()
    assert kept.mean() >= share
    assert (layer < last).mean() < share


# -- tags ------------------------------------------------------------------------------------------------------------


def test_scores_are_written_as_plain_text_with_one_decimal() -> None:
    renderer = Renderer(TemplateSpec(scores="{prompt} {scores}", marker=" ->"), ("one", "two"))
    assert renderer.scores("hello", [1.249, -0.35001]) == "hello <rm1_score> 1.2 <rm2_score> -0.4 ->"


def test_a_score_that_rounds_to_zero_has_no_sign() -> None:
    """``-0.0`` and ``0.0`` would be two texts for one reward."""
    renderer = Renderer(TemplateSpec(), ("one", "two"))
    assert renderer.scores("x", [-0.04, 0.04]) == "x <rm1_score> 0.0 <rm2_score> 0.0"


# -- rounds ----------------------------------------------------------------------------------------------------------


def make_job(task: tuple[str, ...], results: Path, *overrides: str) -> Job:
    made = plan(TrainRequest("ric", overrides=(*task, *QUICK, *overrides), results=results))
    job = made.job(made.open(), Meter())
    adapters.attach(job.task.language_model, job.policy_spec.lora, job.seed)
    return job


def test_samples_are_relabelled_with_the_scores_they_obtained(small_task: tuple[str, ...], tmp_path: Path) -> None:
    job = make_job(small_task, tmp_path, "online_prompts=40")
    scored = job.task.scored()
    z = job.panel.z(scored.raw)
    texts, responses = Ric()._round_rows(job, job.task.language_model, scored, z, 0)
    table = job.run.read_table("samples-1")
    own = job.panel.z(job.panel.score(table["prompt"].tolist(), table["response"].tolist()))
    assert np.array_equal(table[[f"z:{name}" for name in job.task.names]].to_numpy(), own)

    passed = keep(own, job.config)
    told = job.notes["round-1"]
    assert told["samples"] + told["collapsed"] == 40
    assert told["kept"] == passed.sum()
    assert len(texts) == len(responses) == told["kept"] + told["offline_kept"]
    assert told["offline_kept"] == 10

    render = job.task.renderer.scores
    expected = [render(p, s) for p, s in zip(table["prompt"][passed], own[passed], strict=True)]
    assert texts[: len(expected)] == expected
    assert responses[: len(expected)] == from_columns(table[passed])
    bounds = job.task.normaliser.z_bounds()
    at_maximum = [text for text in expected if f"{bounds[0, 1]:.1f}" in text or f"{bounds[1, 1]:.1f}" in text]
    assert len(at_maximum) < len(expected) / 2  # every target had a coordinate at its maximum: targets are gone

    offline = {(render(p, s), r) for p, s, r in zip(scored.prompts, z, scored.responses, strict=True)}
    assert set(zip(texts[len(expected) :], responses[len(expected) :], strict=True)) <= offline


def test_the_targets_are_what_the_samples_were_asked_for(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.policies import policy

    job = make_job(small_task, tmp_path, "online_prompts=9", "top_p=0.8", "temperature=0.6")
    seen: list[Any] = []
    respond_all = policy.respond_all
    monkeypatch.setattr(
        policy, "respond_all", lambda *given, **more: (seen.append(given), respond_all(*given, **more))[1]
    )
    steps: list[tuple[str, int, int]] = []
    job.progress = lambda *step: steps.append(step)
    Ric()._samples(job, job.task.language_model, 0)
    _, texts, limits, *_ = seen[0]
    assert (limits.top_p, limits.temperature) == (0.8, 0.6)
    assert limits.seed == derive(job.seed, "ric", 0, "samples")  # of this round, whatever else is drawn
    assert steps[-1] == ("sampling-1", 9, 9)
    bounds = job.task.normaliser.z_bounds()
    top = [f"<rm{i}_score> {bounds[i - 1, 1]:.1f}" for i in (1, 2)]
    assert all(top[0] in text or top[1] in text for text in texts)
    assert job.meter.tokens_generated > 0


# Two rounds and an offline set, worked by hand: bcd, fgh and qrs pass, by the median of either objective as by the
# first layers that hold half of a set (q is of the second layer). The second round is better throughout: a threshold
# over both rounds would keep nothing of the first.
ROUNDS = [
    [("a", 0.0, -0.5), ("b", 1.0, 0.0), ("c", 2.0, -1.0), ("d", 0.5, 3.0)],
    [("e", 10.0, 9.5), ("f", 11.0, 10.0), ("g", 12.0, 9.0), ("h", 10.5, 13.0)],
]
OFFLINE = [("p", -5.0, -6.0), ("q", -4.0, -5.1), ("r", -3.0, -5.0), ("s", -4.5, -2.0), ("t", -4.8, -5.5)]


def sampled(letter: str) -> Response:
    """A sample of one token; three of them were cut off."""
    return Response(letter, (ord(letter),), finished=letter not in "aeh")


def by_hand(offline_part: int, number: int = 1, **changes: Any) -> tuple[list[str], list[str], dict[str, int]]:
    import pandas as pd

    def samples(job: Any, lm: Any, earlier: int) -> Any:
        rows = ROUNDS[earlier]
        responses = columns([sampled(r[0]) for r in rows])
        table = pd.DataFrame({"prompt": [f"to {r[0]}" for r in rows], **responses})
        return table.assign(**{"z:one": [r[1] for r in rows], "z:two": [r[2] for r in rows], "collapsed": 2 + earlier})

    renderer = SimpleNamespace(scores=lambda prompt, scores: f"{prompt} {scores[0]:g} {scores[1]:g}")
    task = SimpleNamespace(names=["one", "two"], renderer=renderer)
    config = Config.model_validate({"quantile": 0.5, "keep_share": 0.5, "offline_part": offline_part, **changes})
    job: Any = SimpleNamespace(config=config, task=task, seed=0, notes={})
    method = Ric()
    method._samples = samples  # type: ignore[method-assign]
    scored: Any = SimpleNamespace(prompts=[f"to {r[0]}" for r in OFFLINE], responses=[Response(r[0]) for r in OFFLINE])
    texts, responses = method._round_rows(job, None, scored, np.array([r[1:] for r in OFFLINE]), number)
    known = {row[0]: sampled(row[0]) for row in [*ROUNDS[0], *ROUNDS[1]]}
    assert all(response == known.get(response.text, Response(response.text)) for response in responses)
    return texts, [response.text for response in responses], job.notes[f"round-{number + 1}"]


@pytest.mark.parametrize("name", ["any_quantile", "nondominated"])
def test_every_round_and_the_offline_set_are_filtered_by_themselves(name: str) -> None:
    texts, responses, told = by_hand(offline_part=10, filter=name)
    assert responses[:6] == list("bcdfgh")
    assert sorted(responses[6:]) == list("qrs")
    scores = {row[0]: f"to {row[0]} {row[1]:g} {row[2]:g}" for row in [*ROUNDS[0], *ROUNDS[1], *OFFLINE]}
    assert texts == [scores[response] for response in responses]  # everyone with its own prompt and scores
    assert told == {"samples": 8, "kept": 6, "offline_passed": 3, "offline_kept": 3, "collapsed": 5}
    assert by_hand(0, 0, filter=name)[1] == list("bcd")  # the first round knows no second


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_the_offline_part_is_as_large_as_asked_for_and_drawn_from_what_passed(part: int) -> None:
    _, responses, told = by_hand(offline_part=part)
    mixed = responses[6:]
    assert len(mixed) == len(set(mixed)) == told["offline_kept"] == part
    assert set(mixed) <= set("qrs")
    assert told["offline_passed"] == 3


def test_a_round_samples_again_and_keeps_the_rounds_before(small_task: tuple[str, ...], tmp_path: Path) -> None:
    job = make_job(small_task, tmp_path, "online_prompts=20", "online_rounds=2")
    scored = job.task.scored()
    z = job.panel.z(scored.raw)
    Ric()._round_rows(job, job.task.language_model, scored, z, 0)
    Ric()._round_rows(job, job.task.language_model, scored, z, 1)
    first, second = (len(job.run.read_table(f"samples-{i}")) for i in (1, 2))
    assert job.notes["round-2"]["samples"] == first + second
    assert job.notes["round-2"]["samples"] + job.notes["round-2"]["collapsed"] == 40
    assert job.run.read_table("samples-1")["response"].tolist() != job.run.read_table("samples-2")["response"].tolist()


@pytest.mark.slow
def test_when_all_samples_collapse_it_says_so(small_task: tuple[str, ...], tmp_path: Path) -> None:
    short = "task.generation.max_new_tokens=3"  # fewer than five tokens are a collapsed sample
    request = TrainRequest("ric", overrides=(*small_task, *QUICK, "online_prompts=6", short), results=tmp_path)
    with pytest.raises(RequestError, match="sampling-1: all 6 samples collapsed .* train the offline stage longer"):
        train(plan(request))


def test_what_is_short_is_the_tasks_to_say(small_task: tuple[str, ...], tmp_path: Path) -> None:
    job = make_job(
        small_task, tmp_path, "online_prompts=12", "task.generation.max_new_tokens=3", "task.quality={short: 3}"
    )
    table = Ric()._samples(job, job.task.language_model, 0)
    lengths = [len(ids) for ids in job.task.tokens(table["response"])]
    assert set(lengths) == {3}
    assert len(table) + table["collapsed"].iloc[0] == 12


@pytest.mark.slow
def test_a_preference_is_asked_for_as_desired_rewards(small_task: tuple[str, ...], tmp_path: Path) -> None:
    request = TrainRequest(
        "ric", overrides=(*small_task, *QUICK, "online_rounds=0", "preference_map=linf"), results=tmp_path
    )
    run, _ = train(plan(request))
    assert list(run.record.phases) == ["offline"]
    method, context = context_of(run, tmp_path)
    policies = [method.policy(context, preference) for preference in ((0.5, 0.5), (1.0, 0.0))]
    bounds = context.task.normaliser.z_bounds()
    assert policies[0].render("hi") == f"hi <rm1_score> {bounds[0, 1]:z.1f} <rm2_score> {bounds[1, 1]:z.1f}"
    assert policies[1].render("hi") == f"hi <rm1_score> {bounds[0, 1]:z.1f} <rm2_score> {bounds[1, 0]:z.1f}"
    assert policies[0].generator is policies[1].generator  # one policy: a grid is answered in one pass


def test_the_defaults_are_the_papers() -> None:
    config = ric.Config()
    assert (config.offline.steps, config.offline.batch, config.offline.lr, config.offline.schedule) == (
        20_000,
        8,
        1.414e-4,
        "linear",
    )
    assert (config.online.steps, config.online.lr, config.online.schedule) == (4_000, 1e-5, "constant")
    assert (config.online_prompts, config.offline_part, config.temperature, config.top_p) == (20_000, 10_000, 0.7, 0.9)
    assert (config.filter, config.quantile, config.preference_map, config.online_rounds) == (
        "any_quantile",
        0.7,
        "l2",
        1,
    )

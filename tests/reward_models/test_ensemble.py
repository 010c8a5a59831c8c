"""Ensembles: what members are trained on, how they are put together, and what an objective of them says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moalign.config.objectives import ClassifierObjective
from moalign.core.errors import RequestError
from moalign.core.seeds import derive
from moalign.reward_models import calibration, evaluation, runs
from moalign.reward_models.pairs import PairSet
from moalign.reward_models.runs import RewardRequest
from moalign.rewards.ensemble import EnsembleScorer, aggregate
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.rewards.panel import RewardPanel
from moalign.rewards.scorer import build_scorers
from moalign.rewards.store import Store
from moalign.runs import atomic
from moalign.runs.run import Run

Ask = Callable[..., RewardRequest]
Trained = Callable[..., tuple[RewardRequest, Run]]

TWO = {"heads": "each", "members": 2}


def folders(run: Run, members: int) -> list[Path]:
    model = run.path / "model"
    return [model, *(model / f"member-{number}" for number in range(1, members))]


def texts(request: RewardRequest, split: str = "eval") -> tuple[list[str], list[str]]:
    sets = request.parts[split]
    return [p for one in sets for p in one.prompts * 2], [t for one in sets for t in one.chosen + one.rejected]


def spec_of(run: Run, **changes: Any) -> ClassifierObjective:
    given = runs.objective(run, "x", "eager").model_dump()
    return ClassifierObjective.model_validate({**given, **changes})


# -- how members are put together ------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    """Members 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3 = 14 / 3; members that agree lose nothing."""
    scores = np.array([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    assert aggregate(scores, "mean", 0).tolist() == [3, 5]
    assert aggregate(scores, "mean", 2) == pytest.approx([3 - 2 * (14 / 3) ** 0.5, 5])
    assert aggregate(scores, "variance", 0.5) == pytest.approx([3 - 7 / 3, 5])
    assert aggregate(scores, "worst", 0).tolist() == [1, 5]


def test_a_score_is_the_mean_of_standardised_members_less_what_they_disagree(trained: Trained) -> None:
    """An independent computation: each member's own logits, its mean and sd over the calibration pairs' responses."""
    request, run = trained(2, **TWO)
    prompts, responses = texts(request)
    known = list(dict.fromkeys(zip(*texts(request, "calibration"), strict=True)))
    columns = []
    for folder in folders(run, 2):
        alone = ClassifierScorer(spec_of(run, members=None, model=str(folder)), Path())
        fitted = np.array(alone.score(*map(list, zip(*known, strict=True))))
        columns.append((np.array(alone.score(prompts, responses)) - fitted.mean()) / fitted.std())
    z = np.stack(columns, axis=1)
    assert z.std(axis=1).max() > 0.05
    expected = {"mean": z.mean(1) - 2 * z.std(1), "variance": z.mean(1) - 2 * z.var(1), "worst": z.min(1)}
    for how, values in expected.items():
        spec = spec_of(run, aggregate=how, pessimism=0 if how == "worst" else 2)
        scorer = EnsembleScorer(spec, Path())
        np.testing.assert_allclose(scorer.score(prompts, responses), values, atol=1e-4)
        np.testing.assert_allclose(scorer.spread(prompts, responses), z.std(1), atol=1e-4)
        # A cost (smaller is better): doubt makes it larger, so that the panel's turned score is smaller.
        cost = EnsembleScorer(spec.model_copy(update={"maximise": False}), Path())
        turned = {"mean": z.mean(1) + 2 * z.std(1), "variance": z.mean(1) + 2 * z.var(1), "worst": z.max(1)}[how]
        np.testing.assert_allclose(cost.score(prompts, responses), turned, atol=1e-4)


def test_members_are_read_once_for_all_objectives_score_and_spread(trained: Trained, tmp_path: Path) -> None:
    request, run = trained(2, **TWO)
    prompts, responses = texts(request)
    specs = [runs.objective(run, name, name) for name in ("eager", "careful")]
    scorers: Any = build_scorers(specs, Path())
    with Store(tmp_path / "scores.sqlite") as store:
        panel = RewardPanel([*scorers, *build_scorers([spec_of(run, members=None)], Path())], store)
        scores = panel.score(prompts, responses)
        spread = panel.spread(prompts, responses)
        assert scores.shape == spread.shape == (len(prompts), 3)
        assert (spread[:, :2] > 0).any() and not spread[:, 2].any()
        np.testing.assert_allclose(spread[:, 1], scorers[1].spread(prompts, responses))
        again = RewardPanel(build_scorers(specs, Path()), store)
        assert np.array_equal(again.spread(prompts, responses), spread[:, :2])
        assert np.array_equal(again.score(prompts, responses), scores[:, :2])
        assert [member.rows_scored for scorer in again.objectives for member in scorer.members] == [0] * 4  # type: ignore[attr-defined]
    distinct = len(set(zip(prompts, responses, strict=True)))
    assert [member.rows_scored for member in scorers[0].members] == [distinct, distinct]
    assert [member.rows_scored for member in scorers[1].members] == [0, 0]


def test_the_revision_changes_with_what_changes_a_score_and_with_nothing_else(trained: Trained, tmp_path: Path) -> None:
    _, run = trained(2, **TWO)

    def revision(**changes: Any) -> str:
        return EnsembleScorer(spec_of(run, **changes), Path()).revision

    plain = revision()
    moved = shutil.copytree(run.path / "model", tmp_path / "moved")
    assert plain == revision(model=str(moved), name="y", members=["member-1", 0], maximise=False, batch_tokens=99)
    others: list[dict[str, Any]] = [{"pessimism": 1}, {"pessimism": 2}, {"pessimism": 1, "maximise": False}]
    others += [{"aggregate": "variance", "pessimism": 1}, {"aggregate": "worst"}, {"label": "careful"}]
    found = [revision(**other) for other in others]
    assert len({plain, *found}) == 7
    scales = json.loads((moved / "heads.json").read_text())
    (moved / "heads.json").write_text(json.dumps({**scales, "eager": {"mean": 0.0, "sd": 1.0}}))
    assert revision(model=str(moved)) != plain


def test_the_heads_of_one_model_are_members_where_they_are_named(trained: Trained) -> None:
    request, run = trained(2, heads="each")
    prompts, responses = texts(request)
    spec = spec_of(run, label=None, members=["careful", "eager"])
    scales = json.loads((run.path / "model" / "heads.json").read_text())
    z = [
        (np.array(ClassifierScorer(spec_of(run, label=label), Path()).score(prompts, responses)) - scale["mean"])
        / scale["sd"]
        for label, scale in scales.items()
    ]
    scorer = EnsembleScorer(spec, Path())
    np.testing.assert_allclose(scorer.score(prompts, responses), np.mean(z, axis=0), atol=1e-5)
    assert scorer.members[0].rows_scored == len(set(zip(prompts, responses, strict=True)))
    assert scorer.members[1].rows_scored == 0
    assert EnsembleScorer(spec_of(run, label=None, members="all"), Path()).revision == scorer.revision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"members": ["member-0", "member-3"]},
            "objective 'x': members: unknown member 'member-3'; allowed: member-0",
        ),
        ({"members": ["member-1", 1]}, "members: at least two different ones are needed; found member-1, member-1"),
        ({"members": [1]}, "at least two different ones are needed; found member-1; the model has member-0, member-1"),
        ({"label": "eagre"}, "the model has no label 'eagre'"),
    ],
)
def test_members_that_are_not_there(trained: Trained, changes: dict[str, Any], message: str) -> None:
    _, run = trained(2, **TWO)
    with pytest.raises(RequestError) as caught:
        EnsembleScorer(spec_of(run, **changes), Path())
    assert message in str(caught.value) and len(caught.value.problems) == 1


def test_a_model_without_members_or_scales(trained: Trained, tmp_path: Path) -> None:
    _, plain = trained(1)
    with pytest.raises(RequestError, match="at least two .* the model has reward .*--members 4 makes an ensemble"):
        EnsembleScorer(spec_of(plain, label=None, members="all"), Path())
    _, run = trained(2, heads="each")
    with pytest.raises(RequestError, match="label and members exclude each other .* its labels: eager, careful"):
        EnsembleScorer(spec_of(run, members="all"), Path())
    moved = shutil.copytree(run.path / "model", tmp_path / "moved")
    for content in (None, "{}", '{"eager": {"mean": 0}}', "[1"):
        (moved / "heads.json").unlink(missing_ok=True)
        if content is not None:
            (moved / "heads.json").write_text(content)
        with pytest.raises(RequestError, match="each label's mean and sd, which .*heads.json does not say for 'eager'"):
            EnsembleScorer(spec_of(run, label=None, members="all", model=str(moved)), Path())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": None, "pessimism": 1}, "pessimism is for a model with members; found pessimism: 1.0 without them"),
        ({"members": None, "aggregate": "worst"}, "aggregate is for a model with members"),
        ({"aggregate": "worst", "pessimism": 1}, "aggregate: worst takes no pessimism; found 1"),
        ({"output": "probability"}, "members are put together by their logits; found output: probability"),
        ({"pessimism": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    given = {"name": "x", "kind": "hf-classifier", "model": "m", "members": "all"}
    with pytest.raises(ValueError, match=message):
        ClassifierObjective.model_validate({**given, **changes})


# -- how members are trained -----------------------------------------------------------------------------------------


def test_a_bag_is_drawn_with_replacement_by_its_seed() -> None:
    pair_set = PairSet("a")
    for row in range(500):
        pair_set.add(f"p{row}", f"c{row}", f"r{row}", 0.5)
    one, again, other = pair_set.bag(1), pair_set.bag(1), pair_set.bag(2)
    assert one == again != other
    assert len(one) == len(one.chance) == 500
    # A bag of n holds n (1 - 1/e) of the pairs: 316, with a standard deviation of about 7.
    assert len(set(one.prompts)) == pytest.approx(316, abs=30)
    assert all(p[1:] == c[1:] == r[1:] for p, c, r in zip(one.prompts, one.chosen, one.rejected, strict=True))


@pytest.mark.parametrize("settings", [{"heads": "each"}, {"loss": "more"}])
def test_a_member_is_a_model_trained_on_its_bag_alone(ask: Ask, settings: dict[str, Any]) -> None:
    """Trained apart, on the bag and with the seed that are the member's, the model is the same bit for bit."""
    request = ask(2, "together", members=2, **settings)
    run, _ = runs.obtain(request)
    assert not (run.path / "members").exists()
    bags = []
    for number, folder in enumerate(folders(run, 2)):
        seed = derive(request.seed, f"member-{number}")
        bag = [pairs.bag(derive(seed, "bag", at)) for at, pairs in enumerate(request.train_sets)]
        plain = replace(ask(2, f"apart-{number}", **settings), seed=seed, parts={**request.parts, "train": bag})
        apart, _ = runs.obtain(plain)
        left, right = load_file(folder / "model.safetensors"), load_file(apart.path / "model" / "model.safetensors")
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
        bags.append(bag)
    assert bags[0] != bags[1]
    assert {line["phase"] for line in run.metrics()} == {"member-0", "member-1"}
    assert run.record.cost.tokens_trained > apart.record.cost.tokens_trained


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [3, 7, 8, 9])
def test_an_ensemble_resumes_bit_for_bit(ask: Ask, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the first member, in the second (four steps each), and when all are trained but not put together, or
    put together but not yet cleared away."""
    whole, _ = runs.obtain(ask(1, "whole", members=2))
    steps = 0

    def stop(what: str, done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == at and at < 8:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if at == 8:

            def no_copy(*_: Any, **__: Any) -> None:
                raise Stop

            patch.setattr(shutil, "copytree", no_copy)
        if at == 9:
            remove = atomic.remove_directory

            def no_clearing(path: Path) -> None:
                if path.name == "members":
                    raise Stop
                remove(path)

            patch.setattr(atomic, "remove_directory", no_clearing)
        runs.obtain(ask(1, "parts", members=2), stop)
    broken = runs.RewardStore(ask(1, "parts").results).runs()[0]
    assert broken.record.status == "failed" and (broken.path / "model").exists() == (at == 9)
    resumed, trained_before = runs.obtain(ask(1, "parts", members=2))
    assert (trained_before, resumed.record.status) == (False, "done")
    assert not (resumed.path / "members").exists() and resumed.record.weights == whole.record.weights
    for left, right in zip(folders(whole, 2), folders(resumed, 2), strict=True):
        assert {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()} == {
            path.name: path.read_bytes() for path in right.iterdir() if path.is_file()
        }
    strip = ("seconds", "peak_memory_bytes")
    lines = [[{k: v for k, v in line.items() if k not in strip} for line in run.metrics()] for run in (whole, resumed)]
    assert lines[0] == lines[1]


def test_one_member_is_the_model_of_before(ask: Ask) -> None:
    assert ask(2, members=1).identity() == ask(2).identity() != ask(2, members=2).identity()


def test_members_need_pairs_for_their_scale(ask: Ask, labelled: Callable[..., list[PairSet]], tmp_path: Path) -> None:
    (pairs,) = labelled(1, 40)
    request = ask(1, members=2)
    kept = [row for row in range(40) if pairs.prompts[row] not in request.parts["calibration"][0].prompts]
    with pytest.raises(RequestError, match="members 2: .* the split calibration, and it is empty"):
        runs.make("x", request.settings, request.backbone, [pairs.pick(kept)], results=tmp_path)


def test_an_ensemble_is_judged_in_log_odds(trained: Trained) -> None:
    """Its score is in units of the members' sd: an ECE of that would say nothing."""
    request, run = trained(2, **TWO)
    result = evaluation.evaluate(runs.objective(run), request.parts["eval"], request.parts["calibration"], draws=100)
    for pairs, row in zip(request.parts["eval"], result["datasets"], strict=True):
        scorer = EnsembleScorer(runs.objective(run, "x", pairs.name), Path())
        sds = [json.loads((folder / "heads.json").read_text())[pairs.name]["sd"] for folder in folders(run, 2)]
        scores = np.subtract(scorer.score(pairs.prompts, pairs.chosen), scorer.score(pairs.prompts, pairs.rejected))
        assert row["ece"]["10"] == pytest.approx(calibration.ece(scores * np.mean(sds)), abs=1e-6)
        assert row["accuracy"] == pytest.approx((scores > 0).mean())

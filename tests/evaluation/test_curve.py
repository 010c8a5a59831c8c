"""``eval --snapshots``: every snapshot is judged as a finished run is, once, and truth and belief are told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from moalign.core.errors import RequestError
from moalign.core.progress import Progress, silent
from moalign.evaluation import curve as curves
from moalign.evaluation import evaluate
from moalign.evaluation.curve import Curve, curve
from moalign.evaluation.result import ProxyPoint, ProxyReward
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.methods.base import Method
from moalign.pareto.hypervolume import hypervolume
from moalign.runs.run import Run
from moalign.training.job import RunContext

FAST = ("policy.lora={r: 4, alpha: 8, dropout: 0.0}", "steps=4", "batch=4", "lr=0.05", "snapshots=2")
Opened = tuple[Method, RunContext]


@pytest.fixture(scope="module")
def trained(small_task: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two snapshots."""
    request = TrainRequest(
        "mo-odpo", overrides=(*small_task, *FAST, "samples=2"), results=tmp_path_factory.mktemp("trained")
    )
    return train(plan(request))[0]


@pytest.fixture
def opened(trained: Run, tmp_path: Path) -> Opened:
    """The same run, in a folder of this test's own."""
    return copied(trained, tmp_path)


def copied(run: Run, results: Path) -> Opened:
    *_, task, method, name = run.path.parts
    place = results / "runs" / task / method / name
    shutil.copytree(run.path, place)
    return context_of(Run.load(place), results)


def adapters_on(context: RunContext) -> set[str]:
    return set(getattr(context.task.language_model.model, "peft_config", {}))


def content(context: RunContext, name: str = "curve.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((context.run.path / name).read_text())
    return found


def test_every_row_is_the_evaluation_of_a_run_that_ended_there(opened: Opened, trained: Run, tmp_path: Path) -> None:
    """By a second way: a copy of the run whose adapter is the snapshot's, evaluated as any run."""
    method, context = opened
    made = curve(method, context)
    assert [(row.part, row.step, row.share) for row in made.rows] == [("online", 1, 0.25), ("online", 4, 1.0)]
    for row, folder in zip(made.rows, ("snapshots/online-1/adapter", "adapter"), strict=True):
        _, other = copied(trained, tmp_path / f"step-{row.step}")
        if folder != "adapter":
            shutil.rmtree(other.run.path / "adapter")
            shutil.copytree(trained.path / folder, other.run.path / "adapter")
            other.run.record.weights = {}  # they would be refused as damaged
        alone = evaluate.evaluate(method, other).result
        assert row.true.hypervolume == pytest.approx(alone.hypervolume)
        assert row.true.inner_product == pytest.approx(alone.indicators.inner_product)
        assert np.allclose(row.true.means, [point.mean for point in alone.points])
        assert row.kl == pytest.approx(alone.quality.kl) and row.collapse_rate == alone.quality.rate
        assert row.kl_by_preference == pytest.approx([point.kl for point in alone.points])
        assert row.believed is None and row.spread is None  # the judge's rewards are those of training
    assert made.rows[0].kl != made.rows[1].kl


def test_the_files_hold_it_all_and_nothing_stays_on_the_model(opened: Opened) -> None:
    method, context = opened
    made = curve(method, context)
    assert adapters_on(context) == set()
    assert content(context) == made.content == Curve.load(context.run.path / "curve.json").content
    table = context.run.read_table("curve")
    assert len(table) == 2 * 3 * 8  # snapshots, preferences, prompts
    assert set(table.columns) >= {"part", "step", "prompt", "preference", "response", *context.task.names}
    again = context.task.panel.score(table["prompt"].tolist(), table["response"].tolist())
    means = context.task.normaliser.unit(again).reshape(2, 3, 8, 2).mean(axis=2)
    assert np.allclose(means, [row.true.means for row in made.rows])
    assert (context.run.path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_loses_no_judged_snapshot(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    method, context = opened
    judged: list[str] = []
    respond = evaluate.respond

    def counted(method: Method, context: RunContext, *rest: Any) -> Any:
        judged.append(context.snapshot)
        return respond(method, context, *rest)

    monkeypatch.setattr(evaluate, "respond", counted)

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("snapshot 2 of 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve(method, context, progress=stop)
    assert adapters_on(context) == set()
    assert [row["step"] for row in content(context)["rows"]] == [1]
    assert not (context.run.path / "curve.png").exists()
    made = curve(method, context)
    assert judged == ["snapshots/online-1", "", ""]
    assert [row.step for row in made.rows] == [1, 4]
    assert len(context.run.read_table("curve")) == 48

    before = content(context)
    assert curve(method, context).content == made.content == before
    assert len(judged) == 3, "what is judged is read back"
    (context.run.path / "curve.parquet").unlink()
    assert curve(method, context).content == before
    assert len(judged) == 5, "a row whose answers are gone is judged again"


def test_other_preferences_and_samples_are_kept_apart(opened: Opened) -> None:
    method, context = opened
    made = curve(method, context, [(0.25, 0.75)], samples=2)
    assert made.prefs == ((0.25, 0.75),) and made.samples == 2
    assert [len(row.true.means) for row in made.rows] == [1, 1]
    assert not (context.run.path / "curve.json").exists()
    (path,) = context.run.path.glob("curve-*-x2.json")
    assert len(pd.read_parquet(path.with_suffix(".parquet"))) == 2 * 1 * 8 * 2


def test_believed_rewards_stand_beside_the_true_ones(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    method, context = opened
    means = [(0.0, 2.0), (1.0, 1.0), (2.0, 0.0)]

    def proxy(*_: Any) -> ProxyReward:
        points = [ProxyPoint(preference=w, mean=mean) for w, mean in zip(context.task.grid, means, strict=True)]
        return ProxyReward(points=tuple(points), hypervolume=0.0)

    monkeypatch.setattr(evaluate, "proxy_reward", proxy)
    row = curve(method, context).rows[0]
    assert row.believed is not None
    assert row.believed.inner_product == pytest.approx((2 + 1 + 2) / 3)  # (0,1).(0,2), (.5,.5).(1,1), (1,0).(2,0)
    assert row.believed.hypervolume == pytest.approx(hypervolume(means, context.task.card.reference_point))
    assert row.true.inner_product != row.believed.inner_product


def test_the_spread_is_weighed_by_the_preference_in_normalised_units() -> None:
    spread = np.array([[1.0, 4.0], [3.0, 8.0], [5.0, 0.0], [1.0, 2.0]])
    panel = SimpleNamespace(spread=lambda prompts, responses: spread if responses == list("abcd") else None)
    context: Any = SimpleNamespace(
        task=SimpleNamespace(panel=panel, normaliser=SimpleNamespace(lo=(-1.0, 0.0), hi=(1.0, 4.0)))
    )
    table = pd.DataFrame({"prompt": list("pqpq"), "response": list("abcd")})
    # Two answers at (0, 1): 4/4 and 8/4. Two at (.75, .25): .75 5/2 and .75 1/2 + .25 2/4.
    wanted = (1.0 + 2.0 + 1.875 + 0.5) / 4
    assert curves.spread_of(context, table, [(0.0, 1.0), (0.75, 0.25)]) == pytest.approx(wanted)
    spread[:] = 0.0
    assert curves.spread_of(context, table, [(0.0, 1.0), (0.75, 0.25)]) is None, "no objective has members"


def made_of(*truths: tuple[float, float]) -> Curve:
    def reward(inner: float, volume: float) -> dict[str, Any]:
        return {"inner_product": inner, "hypervolume": volume, "means": [[0.0, 0.0]]}

    rows = [
        {
            "part": "online",
            "step": n,
            "share": n / 4,
            "kl": float(n * n),
            "kl_by_preference": [None],
            "true": reward(*truth),
        }
        | {"believed": None, "collapse_rate": 0.0, "spread": None}
        for n, truth in enumerate(truths, start=1)
    ]
    about = {"run": "r", "run_id": "r", "method": "m", "task": "t", "card_hash": "h", "seed": 0, "objectives": ["a"]}
    return Curve.model_validate({**about, "prefs": [[1.0]], "samples": 1, "prompts": 1, "rows": rows})


def test_where_the_truth_is_best_and_what_is_lost_after_it() -> None:
    best = made_of((0.2, 0.1), (0.7, 0.4), (0.6, 0.9), (0.1, 0.3)).best
    assert (best["inner_product"].step, best["inner_product"].kl, best["inner_product"].value) == (2, 4.0, 0.7)
    assert best["inner_product"].lost == pytest.approx(0.6)
    assert (best["hypervolume"].row, best["hypervolume"].lost) == (2, pytest.approx(0.6))
    assert made_of((0.2, 0.1), (0.7, 0.4)).best["inner_product"].lost == 0.0
    assert made_of((0.7, 0.1), (0.7, 0.4)).best["inner_product"].row == 0, "of equals the first"


def test_a_run_without_snapshots_or_a_preference_that_it_cannot_serve_is_refused(
    opened: Opened, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    run, _ = train(plan(TrainRequest("sft", overrides=(*small_task, "steps=0"), results=tmp_path / "b")))
    with pytest.raises(RequestError, match="it has no snapshots; train it with some: moalign train sft --snapshots"):
        curve(*context_of(run, tmp_path / "b"))
    method, context = opened
    shutil.rmtree(context.run.path / "snapshots" / "online-1")
    with pytest.raises(RequestError, match="online-1: adapter is missing"):
        curve(method, context)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["modpo", "paretohqd"])
def test_an_adapter_for_each_preference_answers_as_it_was_then(
    method: str, small_task: tuple[str, ...], tmp_path: Path
) -> None:
    stage = "{steps: 4, batch: 4, lr: 0.05, max_tokens: 48}"
    settings = {
        "modpo": ("steps=4", "batch=4", "lr=0.05", "max_tokens=48", "per_prompt=1"),
        "paretohqd": ("k=8", "min_pool=24", "augment_prompts=48", f"first={stage}", f"second={stage}"),
    }
    overrides = (*small_task, FAST[0], *settings[method], "snapshots=2")
    run, _ = train(plan(TrainRequest(method, overrides=overrides, results=tmp_path)))
    served, context = context_of(run, tmp_path)
    most = 0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal most
        most = max(most, len(adapters_on(context)))

    watching: Progress = progress if method == "modpo" else silent
    made = curve(served, context, progress=watching)
    parts = {"modpo": ["pref"], "paretohqd": ["stage1", "pref"]}[method]
    assert [(row.part, row.step) for row in made.rows] == [(part, step) for part in parts for step in (1, 4)]
    assert len({row.kl for row in made.rows}) == len(made.rows)
    assert most <= 1 and adapters_on(context) == set()
    whole = evaluate.evaluate(served, context).result
    assert made.rows[-1].true.hypervolume == pytest.approx(whole.hypervolume)

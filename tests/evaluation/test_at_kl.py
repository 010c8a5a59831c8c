"""The share of the optimum at the policy's own KL: by hand on a coin; where it is not known; as a user sees it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moalign.cli import main as cli
from moalign.evaluation import at_kl
from moalign.evaluation.evaluate import evaluate
from moalign.evaluation.result import EvalResult
from moalign.experiment.train import context_of
from moalign.report import figures
from moalign.runs.run import Run
from moalign.tasks.frontier import Frontier

KL = math.log(2) - (2 * math.log(2) - 0.75 * math.log(3))
"""Nats from a fair coin to one of chance .75: log 2 - H(.75)."""


def coin(preference: tuple[float, float]) -> Frontier:
    """Answers worth (0, 0) and (1, 1) at even chances."""
    table = np.array([[[0.0, 0.0], [1.0, 1.0]]])
    return Frontier(np.log([[0.5, 0.5]]), table, table @ np.array(preference), np.ones(1))


TASK: Any = SimpleNamespace(
    frontier=lambda prefs: [coin(w) for w in prefs],
    judge_normaliser=SimpleNamespace(unit=lambda raw: np.asarray(raw) / 2),  # so that w.n is half of the chance
)


def judged(*points: tuple[float, float | None, bool]) -> Any:
    """A result with a point for each (mean of both objectives, KL, bound), at two preferences in turn."""
    return SimpleNamespace(
        points=[
            SimpleNamespace(
                preference=((1.0, 0.0), (0.5, 0.5))[k % 2], mean=(mean, mean), kl=kl, kl_bound=bound, optimum_at_kl=None
            )
            for k, (mean, kl, bound) in enumerate(points)
        ],
        indicators=SimpleNamespace(regularised_regret=None),
        share_at_kl=None,
        frontier=None,
    )


def test_share_and_regret_by_hand() -> None:
    """Base .25; the optimum .375 at KL and .5 at log 2. Won: .05 of .125 and .2 of .25: shares .4 and .8."""
    result = judged((0.3, KL, False), (0.45, math.log(2), False))
    at_kl.add(result, TASK)
    assert result.share_at_kl == pytest.approx((0.4 + 0.8) / 2, abs=2e-3)
    assert result.indicators.regularised_regret == pytest.approx((0.075 + 0.05) / 2, abs=1e-3)
    assert [point.optimum_at_kl.utility for point in result.points] == pytest.approx([0.375, 0.5], abs=1e-3)
    assert result.points[0].optimum_at_kl.mean == pytest.approx((0.375, 0.375), abs=1e-3)
    assert [curve.preference for curve in result.frontier] == [(1.0, 0.0), (0.5, 0.5)]
    assert result.frontier[0].kl[0] == 0 and result.frontier[0].mean[-1] == pytest.approx((0.5, 0.5))


def test_one_unknown_kl_leaves_the_run_without_a_share_and_the_others_with_their_optimum() -> None:
    for unknown in ((0.3, None, False), (0.3, KL, True)):
        result = judged((0.3, KL, False), unknown)
        at_kl.add(result, TASK)
        assert result.share_at_kl is None and result.indicators.regularised_regret is None
        assert [point.optimum_at_kl is None for point in result.points] == [False, True]


def test_a_policy_that_did_not_move_has_a_regret_and_no_share() -> None:
    result = judged((0.24, -0.001, False), (0.25, 0.0, False))
    at_kl.add(result, TASK)
    assert result.share_at_kl is None
    assert result.indicators.regularised_regret == pytest.approx(0.005, abs=1e-4)


def test_without_a_known_kl_the_task_is_not_even_asked() -> None:
    result = judged((0.3, None, False), (0.3, 0.6, True))
    at_kl.add(result, SimpleNamespace())  # type: ignore[arg-type]
    assert result.share_at_kl is None and result.frontier is None


def test_the_corners_and_the_middle_are_drawn() -> None:
    assert at_kl.drawn([(0.0, 1.0), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (1.0, 0.0)]) == [0, 2, 4]
    assert at_kl.drawn([(0.0, 0.0, 1.0), (0.25, 0.25, 0.5), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0)]) == [0, 1, 2]
    assert at_kl.drawn([(0.3, 0.7)]) == [0]


def test_eval_and_compare_show_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the built-in base, as typed; an evaluation from before is filled in, its file left as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "ALL", {"fronts": figures.draw_fronts, "kl": figures.ALL["kl"]})
    small = (
        "task.evaluation.prompts=4",
        "task.evaluation.samples=2",
        "task.grid=3",
        "task.pool.calibration_per_prompt=2",
    )
    settings = [part for text in small for part in ("--set", text)]
    assert cli.main(["compare", "--task", "sandbox", "--methods", "prompting,best-of-n", *settings, "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in compared["rows"]}
    assert rows["best-of-n"]["share_at_kl"] is None, "its KL is a bound"
    assert [curve["prefs"] for curve in compared["frontier"]] == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert "| share at its KL |" in Path(compared["markdown"]).read_text()
    assert Path(compared["figures"]["kl"]).read_bytes()[1:4] == b"PNG"

    folder = Path(rows["prompting"]["runs"][0]["run"])
    content = json.loads((folder / "eval.json").read_text())
    assert content["share_at_kl"] == rows["prompting"]["share_at_kl"] != 0
    assert content["indicators"]["regularised_regret"] == rows["prompting"]["indicators"]["regularised_regret"]
    for point, curve in zip(content["points"], content["frontier"], strict=True):
        assert np.dot(point["prefs"], point["optimum_at_kl"]["mean"]) == pytest.approx(
            point["optimum_at_kl"]["utility"]
        )
        gained = np.array(curve["mean"]) @ point["prefs"]
        assert gained[0] < point["optimum_at_kl"]["utility"] < gained[-1]
    assert cli.main(["eval", str(folder)]) == 0
    assert (
        f"{100 * content['share_at_kl']:.1f} % of what the best policy at the same KL gains" in capsys.readouterr().out
    )

    older = {key: value for key, value in content.items() if key not in ("share_at_kl", "frontier")}
    del older["indicators"]["regularised_regret"]
    (folder / "eval.json").write_text(json.dumps(older))
    filled = evaluate(*context_of(Run.load(folder), Path("results"))).result
    assert filled.share_at_kl == pytest.approx(content["share_at_kl"])
    assert json.loads((folder / "eval.json").read_text()) == older
    bound = json.loads((Path(rows["best-of-n"]["runs"][0]["run"]) / "eval.json").read_text())
    assert "share_at_kl" not in bound and not any("optimum_at_kl" in point for point in bound["points"])
    assert EvalResult.load(folder / "eval.json").share_at_kl is None

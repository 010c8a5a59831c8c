"""DPO-LW: every objective's pairs in every batch, losses weighted by the preference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.core.errors import RequestError
from moalign.core.seeds import derive
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.training import offline_dpo

QUICK = ("steps=3", "batch=5", "lr=0.01", "max_tokens=64", "per_prompt=1", "policy.lora={r: 4, alpha: 8}")


def test_batches_and_weights_follow_the_preference(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    plain = offline_dpo.train_dpo

    def spy(job: Any, lm: Any, pairs: Any, config: Any, phase: str, **more: Any) -> dict[str, float]:
        seen.append({"pairs": pairs, **more})
        return plain(job, lm, pairs, config, phase, **more)

    monkeypatch.setattr(offline_dpo, "train_dpo", spy)
    prefs = ("1,0", "0.7,0.3")
    run, _ = train(plan(TrainRequest("dpo-lw", prefs=prefs, overrides=(*small_task, *QUICK), results=tmp_path)))
    one, both = seen
    # One-hot: plain DPO on that objective's pairs, every place counts 1.
    assert len(one["pairs"]) == run.record.notes["pairs"]["helpfulness"]["pairs"]
    assert one["weights"].tolist() == [1.0] * 15
    assert len(set(one["places"].tolist())) == 15
    # .7 / .3 of two objectives: three and two places a batch; the batch mean is .7 mean_1 + .3 mean_2.
    first = run.record.notes["pairs"]["helpfulness"]["pairs"]
    assert len(both["pairs"]) == first + run.record.notes["pairs"]["harmlessness"]["pairs"]
    assert ((both["places"] < first).reshape(3, 5) == [True, True, True, False, False]).all()
    wanted = offline_dpo.even_order(
        [first, len(both["pairs"]) - first], 3, 5, derive(run.record.seed, "pref-1", "order")
    )
    assert both["places"].tolist() == wanted[0].tolist()
    np.testing.assert_allclose(both["weights"].reshape(3, 5), [[0.7 * 5 / 3] * 3 + [0.3 * 5 / 2] * 2] * 3)
    assert len(list(run.path.glob("adapter-pref-*"))) == 2
    assert {"loss", "accuracy"} <= set(run.record.notes["diagnostics"])
    method, context = context_of(run, tmp_path)
    assert method.policy(context, (0.7, 0.3)).render("hi") == context.task.renderer.plain("hi")
    with pytest.raises(RequestError, match="the nearest is 0.7,0.3"):
        method.policy(context, (0.5, 0.5))


def test_a_batch_too_small_for_the_objectives(small_task: tuple[str, ...], tmp_path: Path) -> None:
    request = TrainRequest("dpo-lw", overrides=(*small_task, *QUICK, "batch=1"), results=tmp_path)
    with pytest.raises(
        RequestError, match="batch 1: every batch holds pairs of each of 2 objectives; allowed: at least"
    ):
        train(plan(request))


@pytest.mark.parametrize(("prefs", "batch"), [(("0.5,0.5",), 2), (("1,0", "0,1"), 1)])
def test_a_pair_of_each_objective_that_counts_is_enough(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefs: tuple[str, ...], batch: int
) -> None:
    def reached(*_: Any, **more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(offline_dpo, "objective_pairs", reached)
    overrides = (*small_task, *QUICK, f"batch={batch}")
    with pytest.raises(ZeroDivisionError):
        train(plan(TrainRequest("dpo-lw", prefs=prefs, overrides=overrides, results=tmp_path)))


@pytest.mark.parametrize("method", ["dpo-lw", "raco"])
def test_without_steps_the_base_answers(small_task: tuple[str, ...], tmp_path: Path, method: str) -> None:
    request = TrainRequest(method, prefs=("0.4,0.6",), overrides=(*small_task, *QUICK, "steps=0"), results=tmp_path)
    run, _ = train(plan(request))
    assert run.record.status == "done" and run.metrics() == []

"""BAPO: beside DPO-LW, of which it is the anchored one; what the base is asked, and what is counted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moalign.cli.main import main
from moalign.core.amounts import Amount, Amounts
from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.methods.bapo import Config
from moalign.runs.run import Run
from moalign.training import anchored

QUICK = ("steps=3", "batch=5", "lr=0.01", "max_tokens=64", "per_prompt=1", "beta=0.1", "log_every=1")
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"


def trained(method: str, task: tuple[str, ...], results: Path, *more: str, prefs: tuple[str, ...]) -> Run:
    return train(plan(TrainRequest(method, prefs=prefs, overrides=(*task, *QUICK, LORA, *more), results=results)))[0]


def weights(run: Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.path.glob("adapter-*/adapter_model.safetensors")}


def test_without_an_anchor_it_is_dpo_lw_bit_for_bit_and_with_one_it_is_not(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    prefs = ("0.7,0.3",)
    plain = trained("dpo-lw", small_task, tmp_path, prefs=prefs)
    without = trained("bapo", small_task, tmp_path, "anchor=0", prefs=prefs)
    assert weights(without) == weights(plain)
    assert without.record.cost.tokens_generated == plain.record.cost.tokens_generated
    run = trained("bapo", small_task, tmp_path, "anchor=5", "anchors=7", prefs=prefs)
    assert all(run.path.joinpath(name).is_dir() for name in weights(plain))
    assert not set(weights(run).values()) & set(weights(plain).values())
    table = run.read_table("anchors")
    assert len(table) == 7 == table["prompt"].nunique()
    answered = run.record.cost.tokens_generated - plain.record.cost.tokens_generated
    assert 7 <= answered == sum(map(len, table["ids"])) <= 7 * 12
    assert run.record.cost.tokens_trained > plain.record.cost.tokens_trained
    lines = run.metrics()
    assert lines[0]["anchor"] == pytest.approx(0, abs=1e-4)  # step 1 reads the base itself
    assert all({"anchor", "anchor_log_ratio"} <= set(line) for line in lines)


def test_what_it_says_of_its_cost() -> None:
    assert [Config(anchor=0).rows_per_pair, Config().rows_per_pair] == [2, 3]
    task = Amounts(2, prompts=100, labelled=(5, 5))
    assert Config().learns_from(task) == Amount(0, 100)
    assert Config(anchors=30).learns_from(task) == Amount(0, 30)
    assert Config(anchor=0).learns_from(task) == Amount()
    assert Config().learns_from(Amounts(2, labelled=(5, 5))) == Amount(0, 512)


def test_a_base_that_says_nothing_is_no_anchor(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(*_: object) -> anchored.Anchors:
        return anchored.Anchors([], np.zeros(0, dtype=np.float32), 0)

    monkeypatch.setattr(anchored, "encode_anchors", silent)
    with pytest.raises(RequestError, match="anchors: all 4 responses of the base are empty"):
        trained("bapo", small_task, tmp_path, "anchors=4", prefs=("0.5,0.5",))


def test_an_anchor_that_pushes_away_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "bapo", "--results", str(tmp_path), "--set", "anchor=-1"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("error: --set anchor: config.anchor: found -1; allowed: ") and ">= 0" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_stays_nearer_to_the_base_outside_the_task_than_dpo_lw(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """The paper's claim, by results/outside.py, on a random base: the same pairs and steps, the same answers read."""
    spec = importlib.util.spec_from_file_location("outside", Path(__file__).parents[2] / "results" / "outside.py")
    assert spec is not None and spec.loader is not None
    outside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outside)
    more, prefs = ("steps=30", "batch=8", "beta=0.1", "per_prompt=4", "task.evaluation.prompts=64"), ("0.5,0.5",)
    plain = outside.measure(trained("dpo-lw", small_task, tmp_path, *more, prefs=prefs), tmp_path)
    held = outside.measure(trained("bapo", small_task, tmp_path, *more, "anchor=10", prefs=prefs), tmp_path)
    assert set(plain) == {"task", "stated", "unseen"}
    for name in plain:
        assert held[name]["kl"] < 0.7 * plain[name]["kl"], name
        assert plain[name]["likelihood"] < 1.4 * held[name]["likelihood"], name

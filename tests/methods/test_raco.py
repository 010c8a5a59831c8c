"""RACO: beside DPO-LW, of which it is another step; what may be asked of it, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest

from moalign.cli.main import main
from moalign.experiment.train import TrainRequest, plan, train
from moalign.methods.raco import Config, trainer_of
from moalign.runs.run import Run
from moalign.training.conflict_averse import PerToken

QUICK = ("steps=3", "batch=5", "lr=0.01", "max_tokens=64", "per_prompt=1", "beta=0.1", "log_every=1")
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"


def trained(method: str, task: tuple[str, ...], results: Path, *more: str, prefs: tuple[str, ...]) -> Run:
    return train(plan(TrainRequest(method, prefs=prefs, overrides=(*task, *QUICK, LORA, *more), results=results)))[0]


def weights(run: Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.path.glob("adapter-*/adapter_model.safetensors")}


def test_c_0_is_dpo_lw_bit_for_bit_and_the_papers_c_is_not(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """At a corner, where one objective counts, they are the same whatever c: plain DPO."""
    prefs = ("1,0", "0.7,0.3")
    plain = weights(trained("dpo-lw", small_task, tmp_path, prefs=prefs))
    assert weights(trained("raco", small_task, tmp_path, "c=0", prefs=prefs)) == plain
    run = trained("raco", small_task, tmp_path, prefs=prefs)
    averse = weights(run)
    assert averse["adapter-pref-0"] == plain["adapter-pref-0"]
    assert averse["adapter-pref-1"] != plain["adapter-pref-1"]
    shares = {key.partition("/")[2] for key in run.record.notes["diagnostics"] if key.startswith("share/")}
    assert shares == {"helpfulness", "harmlessness"}
    lines = [line for line in run.metrics() if line["phase"] == "pref-1"]
    assert all(line["share/helpfulness"] <= 0.7 and line["share/harmlessness"] <= 0.3 for line in lines)
    assert all(-1 <= line["cosine"] <= 1 for line in lines)


def test_how_a_preference_is_trained() -> None:
    names = ["a", "b"]
    assert trainer_of(Config(mode="amopo"), [1.0], ["a"]) is PerToken
    assert trainer_of(Config(c=0), [0.5, 0.5], names) is None
    assert trainer_of(Config(), [1.0], ["a"]) is None
    assert trainer_of(Config(), [0.5, 0.5], names) is not None
    assert (Config().beta, Config().c) == (0.2, 0.4)
    assert [config.gradients_kept(3) for config in (Config(), Config(c=0), Config(mode="amopo"))] == [3, 0, 0]


@pytest.mark.slow
def test_amopo_is_a_mode_of_it(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run = trained("raco", small_task, tmp_path, "mode=amopo", prefs=("0.7,0.3",))
    assert not [key for key in run.record.notes["diagnostics"] if key.startswith("share/")]
    assert weights(run) != weights(trained("raco", small_task, tmp_path, prefs=("0.7,0.3",)))


@pytest.mark.parametrize(("value", "allowed"), [("-0.1", ">= 0"), ("1", "< 1")])
def test_a_c_that_leads_nowhere_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str, allowed: str
) -> None:
    assert main(["train", "raco", "--results", str(tmp_path), "--set", f"c={value}"]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: --set c: config.c: found {value}; allowed: ") and allowed in message
    assert not list(tmp_path.iterdir())

"""MODPO: roles, margins, the grid as resumable stages of one run, implicit margins from experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moalign.cli.main import main
from moalign.core.errors import RequestError
from moalign.core.progress import silent
from moalign.experiment.train import TrainRequest, context_of, plan, train
from moalign.lm import adapters
from moalign.methods import modpo
from moalign.methods.modpo import Config, margin_of, role_of
from moalign.runs.run import Run
from moalign.training import offline_dpo, reference
from moalign.training.job import Job

NAMES = ["helpfulness", "harmlessness"]
THREE = ["a", "b", "c"]
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.1}"
QUICK = ("steps=4", "batch=4", "lr=0.01", "max_tokens=64", "per_prompt=1", "log_every=1", "checkpoint_every=2")


def trained(
    small_task: tuple[str, ...],
    results: Path,
    *more: str,
    prefs: tuple[str, ...] = (),
    progress: Callable[[str, int, int], None] = silent,
    task: str = "sandbox",
) -> Run:
    request = TrainRequest("modpo", task, prefs=prefs, overrides=(*small_task, LORA, *QUICK, *more), results=results)
    return train(plan(request), progress)[0]


# -- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("w", "k"), [((1.0, 0.0), 0), ((0.4, 0.6), 1), ((0.0, 1.0), 1), ((0.5, 0.5), 0)])
def test_auto_trains_on_the_pairs_of_the_largest_weight(w: tuple[float, float], k: int) -> None:
    assert role_of(w, Config(), NAMES) == k


def test_a_named_role_stays(tmp_path: Path) -> None:
    config = Config(role="harmlessness")
    assert role_of((0.9, 0.1), config, NAMES) == 1
    assert role_of((0.95, 0.05), config, NAMES) == 1


@pytest.mark.parametrize(
    ("w", "told"),
    [
        ((0.96, 0.04), "its weight on role harmlessness is 0.04; allowed: at least 0.05 .its gradient grows"),
        ((1.0, 0.0), "with w_k = 0 the answer is the margin's own model, which margin: reward does not have"),
    ],
)
def test_a_small_share_is_refused_with_the_swap(w: tuple[float, float], told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        role_of(w, Config(role="harmlessness"), NAMES)
    assert caught.value.exit_code == 2
    assert "swap the roles: train it on the pairs of helpfulness (role: auto" in str(caught.value)


def test_without_a_share_the_answer_is_an_implicit_margin_s_expert() -> None:
    config = Config(role="a", margin="implicit")
    assert role_of((0.0, 0.0, 1.0), config, THREE) == 0
    with pytest.raises(RequestError, match="at least 0.05"):
        role_of((0.0, 0.5, 0.5), config, THREE)


def test_an_unknown_role_names_the_nearest(small_task: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="role: unknown objective 'helpfulnes'.*did you mean 'helpfulness'"):
        trained(small_task, tmp_path, "role=helpfulnes")


def test_margins_leave_out_the_labelled_objective() -> None:
    gaps = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    told = margin_of((0.2, 0.5, 0.3), 1, gaps)
    assert told.values.tolist() == [[1.0, 3.0], [4.0, 6.0]]
    assert (list(told.weights), told.share) == ([0.2, 0.3], 0.5)


# -- the grid --------------------------------------------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record what every stage of DPO is given."""
    seen: list[dict[str, Any]] = []
    plain = offline_dpo.train_dpo

    def spy(job: Any, lm: Any, pairs: Any, config: Any, phase: str, margin: Any) -> dict[str, float]:
        seen.append({"phase": phase, "pairs": pairs, "margin": margin})
        return plain(job, lm, pairs, config, phase, margin)

    monkeypatch.setattr(offline_dpo, "train_dpo", spy)
    return seen


@pytest.mark.slow
def test_each_preference_is_a_stage_on_its_role_s_pairs(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    asked: list[int] = []
    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *a: asked.append(len(a[2])) or compute(*a))
    prefs = ("1,0", "0.7,0.3", "0.3,0.7")
    run = trained(small_task, tmp_path, prefs=prefs)
    assert [one["phase"] for one in seen] == ["pref-0", "pref-1", "pref-2"]
    assert len(asked) == 2  # once per role, whatever the number of preferences
    assert seen[0]["pairs"] is seen[1]["pairs"]
    assert seen[2]["pairs"] is not seen[0]["pairs"]
    assert [one["margin"].share for one in seen] == [1.0, 0.7, 0.7]
    assert [list(one["margin"].weights) for one in seen] == [[0.0], [0.3], [0.3]]
    task = context_of(run, tmp_path)[1].task
    pairs = task.pairs(0, "scored", 1, "bradley-terry")  # as the recipe says
    assert pairs.raw is not None
    z = [task.panel.with_normaliser(task.normaliser).z(raw) for raw in pairs.raw]
    np.testing.assert_allclose(seen[1]["margin"].values[:, 0], (z[0] - z[1])[:, 1])
    notes = run.record.notes
    assert list(notes["roles"].values()) == ["helpfulness", "helpfulness", "harmlessness"]
    assert notes["pairs"]["helpfulness"]["pairs"] == len(seen[0]["pairs"])
    assert len(notes["per_preference"]) == 3
    assert {"loss", "margin_ratio"} <= set(notes["diagnostics"])
    assert len(list(run.path.glob("adapter-pref-*/adapter_model.safetensors"))) == 3
    again = trained(small_task, tmp_path, "beta=0.3", prefs=prefs)  # another run, the same reference
    assert again.path != run.path
    assert len(asked) == 2


@pytest.mark.slow
def test_an_interrupted_grid_goes_on_at_its_vector_bit_for_bit(small_task: tuple[str, ...], tmp_path: Path) -> None:
    whole = trained(small_task, tmp_path / "whole")
    stages = sorted(path.name for path in whole.path.glob("adapter-*"))
    assert stages == ["adapter-pref-0", "adapter-pref-1", "adapter-pref-2"]
    seen: list[tuple[str, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done))
        if "(2/3)" in what and done == 3 and seen.count((what, done)) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(small_task, tmp_path / "b", progress=progress)
    before = len(seen)
    run = trained(small_task, tmp_path / "b", progress=progress)
    again = [(what, done) for what, done in seen[before:] if what.startswith("preference")]
    assert "(2/3)" in again[0][0]
    assert again[0][1] == 3  # from the checkpoint of step 2
    for stage in stages:
        name = f"{stage}/adapter_model.safetensors"
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    for counter in ("tokens_generated", "tokens_trained", "reward_calls"):
        assert getattr(run.record.cost, counter) == getattr(whole.record.cost, counter)
    assert run.record.notes == whole.record.notes
    assert not (run.path / "checkpoints").exists()


@pytest.mark.slow
def test_three_objectives(small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    trained(small_task, tmp_path, prefs=("0.2,0.3,0.5", "0,0,1"), task="sandbox-3")
    assert [one["margin"].values.shape for one in seen] == [(len(seen[0]["pairs"]), 2)] * 2
    assert [list(one["margin"].weights) for one in seen] == [[0.2, 0.3], [0.0, 0.0]]


# -- implicit margins ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_implicit_margins_are_the_experts_log_ratios(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch)
    run = trained(small_task, tmp_path, "margin=implicit", "beta=0.2", prefs=("0.6,0.4",))
    assert [one["phase"] for one in seen] == ["pref-0", "pref-1", "pref-0"]  # two experts, then the preference
    experts = Run.load(next(path for path in run.path.parent.iterdir() if path.name == _expert(run)))
    assert [one["margin"].share for one in seen] == [1.0, 1.0, 0.6]
    assert run.record.cost.tokens_trained > experts.record.cost.tokens_trained > 0
    rows, margin = seen[2]["pairs"], seen[2]["margin"]
    lm = context_of(experts, tmp_path)[1].task.language_model
    adapters.load(lm, experts.path / "adapter-pref-1")
    with torch.no_grad():
        ratio = [
            reference.log_probs(lm, some[:5], own=True).numpy() - rows.reference[:5, side]
            for side, some in enumerate((rows.chosen, rows.rejected))
        ]
    np.testing.assert_allclose(margin.values[:5, 0], 0.2 * (ratio[0] - ratio[1]), atol=1e-4)
    assert np.abs(margin.values).max() > 1e-3


def _expert(run: Run) -> str:
    return str(run.record.notes["experts"]["run_id"])


@pytest.mark.slow
def test_at_no_share_the_expert_itself_answers(small_task: tuple[str, ...], tmp_path: Path) -> None:
    run = trained(small_task, tmp_path, "margin=implicit", "role=helpfulness", prefs=("0,1", "0.5,0.5"))
    expert = next(path for path in run.path.parent.iterdir() if path.name == _expert(run))
    from safetensors.numpy import load_file

    found = load_file(run.path / "adapter-pref-0" / "adapter_model.safetensors")
    wanted = load_file(expert / "adapter-pref-1" / "adapter_model.safetensors")
    assert all((found[name] == wanted[name]).all() for name in wanted)
    assert modpo.LEAST_SHARE == 0.05


def test_pairs_are_made_only_of_objectives_that_are_trained_on(
    small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no share the answer is an expert: no pair of the role's is needed."""
    objectives: list[list[int]] = []

    def reached(job: Any, lm: Any, config: Any, of: list[int], **_: Any) -> None:
        objectives.append(of)
        raise ZeroDivisionError

    monkeypatch.setattr(Job, "find_experts", lambda *_: (None, []))
    monkeypatch.setattr(offline_dpo, "objective_pairs", reached)
    for prefs in (("0,1",), ("0,1", "0.5,0.5")):
        with pytest.raises(ZeroDivisionError):
            trained(small_task, tmp_path, "margin=implicit", "role=helpfulness", prefs=prefs)
    assert objectives == [[], [0]]


def test_the_next_command_asks_for_a_preference_that_was_trained(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an evaluation, too: a policy per preference answers for no other."""
    settings = [word for text in (*small_task, *QUICK) for word in ("--set", text)]
    given = ["--prefs", "0.25,0.75", "--no-eval", "--results", str(tmp_path)]
    assert main(["train", "modpo", *given, *settings]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if "moalign generate" in line]
    assert command.endswith("--prefs 0.25,0.75")

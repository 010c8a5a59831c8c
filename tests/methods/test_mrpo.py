"""MRPO: beside DPO-LW, from which it differs in the reference; where its references come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moalign.core.amounts import Amounts, SplitAmount
from moalign.core.errors import RequestError
from moalign.experiment.train import TrainRequest, plan, train
from moalign.losses.references import virtual_reference
from moalign.methods import mrpo
from moalign.methods.mrpo import Config
from moalign.runs.meter import Meter
from moalign.runs.run import Run
from moalign.runs.store import RunStore
from moalign.training import offline_dpo

QUICK = ("steps=3", "batch=5", "lr=0.01", "max_tokens=64", "per_prompt=1", "beta=0.1", "log_every=1")
LORA = "policy.lora={r: 4, alpha: 8, dropout: 0.0}"
EXPERTS = "experts={steps: 3, batch: 5, lr: 0.01, max_tokens: 64, per_prompt: 1}"
PREFS = ("0.7,0.3",)


def trained(method: str, task: tuple[str, ...], results: Path, *more: str, prefs: tuple[str, ...] = PREFS) -> Run:
    return train(plan(TrainRequest(method, prefs=prefs, overrides=(*task, *QUICK, LORA, *more), results=results)))[0]


def weights(run: Run) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.path.glob("adapter-*/adapter_model.safetensors")}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The pairs that runs are trained on."""
    rows: list[Any] = []
    plain = offline_dpo.train_dpo

    def spy(job: Any, lm: Any, pairs: Any, *rest: Any, **more: Any) -> dict[str, float]:
        rows.append(pairs)
        return plain(job, lm, pairs, *rest, **more)

    monkeypatch.setattr(offline_dpo, "train_dpo", spy)
    return rows


def test_without_further_references_it_is_dpo_lw_bit_for_bit(small_task: tuple[str, ...], tmp_path: Path) -> None:
    plain = weights(trained("dpo-lw", small_task, tmp_path))
    assert weights(trained("mrpo", small_task, tmp_path, "references=[]")) == plain


def test_its_references_are_the_base_and_an_expert_of_each_objective(
    small_task: tuple[str, ...], tmp_path: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[np.ndarray] = []

    def spy(logps: np.ndarray, *rest: Any) -> np.ndarray:
        given.append(logps)
        return virtual_reference(logps, *rest)

    monkeypatch.setattr("moalign.losses.references.virtual_reference", spy)
    run = trained("mrpo", small_task, tmp_path, EXPERTS)
    experts = run.record.notes["experts"]
    assert experts["method"] == "modpo" and len(run.record.notes["references"]) == 2
    assert list(tmp_path.glob(f"runs/*/modpo/{experts['run_id']}"))
    used = seen[-1]  # the first two are the experts' own
    assert len(seen) == 3 and len(given) == 2
    base = np.concatenate([seen[0].reference, seen[1].reference])
    stacked = np.concatenate(given, axis=1)
    assert stacked.shape == (3, len(used), 2)
    np.testing.assert_array_equal(stacked[0].astype(np.float32), base)
    assert (np.abs(stacked[1] - base).max(), np.abs(stacked[2] - stacked[1]).max()) > (1e-4, 1e-4)
    np.testing.assert_allclose(used.reference, virtual_reference(stacked, "confident", 0.1), rtol=1e-6)


def test_responses_that_its_experts_learned_from_count_once(small_task: tuple[str, ...], tmp_path: Path) -> None:
    """It builds its pairs from the pool that the experts' were built from: their cost has it."""
    run = trained("mrpo", small_task, tmp_path, EXPERTS)
    (experts,) = RunStore(tmp_path).runs(method="modpo")
    alone = trained("mrpo", small_task, tmp_path, "references=[]")
    assert run.record.cost.reward_calls == experts.record.cost.reward_calls == alone.record.cost.reward_calls > 0
    trained_on = experts.record.cost.tokens_trained + alone.record.cost.tokens_trained
    assert run.record.cost.tokens_trained == trained_on
    task = Amounts(2, train=SplitAmount((4, 4)), labelled=(0, 0))
    assert (Config().learns_from(task).rows, Config(references=()).learns_from(task).rows) == (0, 8)


def test_another_adapter_in_a_folder_is_another_run(small_task: tuple[str, ...], tmp_path: Path) -> None:
    one, two = (trained("dpo-lw", small_task, tmp_path, *more).path / "adapter-pref-0" for more in ((), ("lr=0.02",)))
    settings = (*small_task, *QUICK, LORA, f"references=[{one}]")
    request = TrainRequest("mrpo", prefs=PREFS, overrides=settings, results=tmp_path)
    before = plan(request).folder
    assert plan(request).folder == before
    (one / "adapter_model.safetensors").write_bytes((two / "adapter_model.safetensors").read_bytes())
    assert plan(request).folder != before


def test_a_folder_is_a_reference(small_task: tuple[str, ...], tmp_path: Path, seen: list[Any]) -> None:
    other = trained("dpo-lw", small_task, tmp_path)
    folder = other.path / "adapter-pref-0"
    run = trained("mrpo", small_task, tmp_path, f"references=[{folder}]", "trust=code")
    assert run.record.notes["references"] and "experts" not in run.record.notes
    assert np.abs(seen[-1].reference - seen[0].reference).max() > 1e-4
    assert seen[-1].reference.dtype == np.float32
    with pytest.raises(RequestError, match="found no adapter there .* it has adapter-pref-0: name one of them"):
        mrpo.adapter_in(str(other.path))
    with pytest.raises(RequestError, match="references: nowhere: found no adapter there"):
        mrpo.adapter_in("nowhere")
    empty = tmp_path / "no weights"
    empty.mkdir()
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="found no adapter there .adapter_config.json and adapter_model.safetensors"):
        mrpo.adapter_in(str(empty))


def test_what_is_refused_before_anything_is_trained(small_task: tuple[str, ...], tmp_path: Path) -> None:
    for references, found in ((EXPERTS, "experts"), ("references=[]", "none"), ("references=[a, b]", "a, b")):
        with pytest.raises(RequestError, match=f"trust: code is of the base and one further .* references {found};"):
            trained("mrpo", small_task, tmp_path, references, "trust=code")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RequestError, match="references: nowhere"):
        trained("mrpo", small_task, tmp_path, EXPERTS, "references=[experts, nowhere]")
    assert not list(tmp_path.glob("runs/*/modpo"))


def test_a_reference_that_has_changed_is_refused_when_a_run_goes_on(
    small_task: tuple[str, ...], tmp_path: Path
) -> None:
    one, two = (trained("dpo-lw", small_task, tmp_path, *more).path / "adapter-pref-0" for more in ((), ("lr=0.02",)))
    made = plan(
        TrainRequest(
            "mrpo", prefs=PREFS, overrides=(*small_task, *QUICK, LORA, f"references=[{one}]"), results=tmp_path
        )
    )
    run = made.open()
    assert mrpo.reference_folders(made.job(run, Meter())) == [one]
    (one / "adapter_model.safetensors").write_bytes((two / "adapter_model.safetensors").read_bytes())
    with pytest.raises(RequestError, match="was begun with other adapters in these folders"):
        mrpo.reference_folders(made.job(run, Meter()))


def test_settings() -> None:
    assert Config().expert_runs() is not None and Config().switched_off == set()
    assert Config(references=()).expert_runs() is None and Config(references=()).switched_off == {"experts"}
    assert Config.borrows({}) == {"experts": "dpo-soups"} == Config.borrows({"references": ["experts", "a"]})
    assert Config.borrows({"references": ["a"]}) == {} == Config.borrows({"references": 3})

"""``make gpu-test`` without a GPU: how it ends, and that its numbers are made of what the commands print."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from moalign.config import find, load
from moalign.methods import registry

BENCH = Path(__file__).resolve().parents[1] / "results" / "bench"
SCRIPT = BENCH / "gpu.py"
DEVICE = {"gpu": "Some GPU 24GB", "memory_bytes": 24 * 2**30, "matmul_flops": 1e14}
MEMORY = {
    "parameters": 5 * 10**8,
    "phases": [
        {"phase": "answering", "total_gib": 5.0, "parts_gib": {"rest": 2.0}},
        {"phase": "training: update", "total_gib": 10.0, "parts_gib": {"rest": 2.0, "base": 8.0}},
    ],
}
ROW = {
    "method": "modpo", "status": "done", "error": None, "peak_gpu_bytes": 6 * 2**30, "seconds_per_step": 0.5,
    "tokens_generated_per_second": None, "tokens_trained_per_second": 20_000.0,
}  # fmt: skip


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"result_script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return loaded(SCRIPT, monkeypatch)


class Scripted:
    """Answers in place of processes."""

    def __init__(self, gpu: ModuleType, fails: str = "") -> None:
        self.gpu, self.fails = gpu, fails
        self.asked: list[tuple[str, ...]] = []

    def moalign(self, *arguments: str, limit: float = 0.0) -> dict[str, Any]:
        self.asked.append(arguments)
        if arguments[0] == self.fails:
            raise self.gpu.Failed("not finished within 420 s")
        if arguments[0] == "bench":
            methods = arguments[1 : arguments.index("--task")]
            failed = {"method": "moc", "status": "failed", "error": "CUDA out of memory"}
            return {"rows": [failed if name == "moc" else {**ROW, "method": name} for name in methods]}
        if arguments[0] == "check":
            settings = {"micro_batch": 4, "policy.gradient_checkpointing": True} if "modpo" in arguments[1] else None
            return {"memory": MEMORY, "cards": [{"settings": settings}]}
        evaluation = {
            "hypervolume": 0.5, "hypervolume_ci": [0.4, 0.6], "indicators": {"tau": 0.9}, "quality": {"rate": 0.0}
        }  # fmt: skip
        return {"method": "mo-odpo", "task": "assistant", "seconds": 9.0, "cost": {}, "evaluation": evaluation}

    def inside(self, *arguments: str, limit: float = 0.0) -> dict[str, Any]:
        self.asked.append(arguments)
        return {"tokens_per_second": 100.0 if "vllm" in arguments else 50.0, "logps": [[-1.0, -2.0], [-3.0]]}


def test_numbers_by_hand(gpu: ModuleType) -> None:
    """6 GiB of the 8 that are torch's in the estimate; 20,000 x 4 x 0.5e9 = 4e13 operations of 1e14."""
    told = gpu.numbers(ROW, MEMORY, 1e14)
    assert (told["peak_gib"], told["estimate_gib"], told["peak_over_estimate"]) == (6.0, 8.0, 0.75)
    assert told["share_of_matmul"] == pytest.approx(0.4)
    assert told["tokens_generated_per_second"] is None
    unknown = gpu.numbers({**ROW, "peak_gpu_bytes": None, "tokens_trained_per_second": None}, MEMORY, 1e14)
    assert (unknown["peak_gib"], unknown["peak_over_estimate"], unknown["share_of_matmul"]) == (None, None, None)


def test_what_fails_is_said_in_its_place_and_the_rest_is_measured(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parts = Scripted(gpu)
    record = gpu.record_of(parts, DEVICE, tmp_path)
    assert [row["method"] for row in record["small"]] == ["mo-odpo", "moc", "modpo"]
    settings = {row["method"]: (row["card_gib"], row["settings"]) for row in record["large"]}
    assert settings["moc"] == (24.0, [])
    assert settings["modpo"] == (24.0, ["micro_batch=4", "policy.gradient_checkpointing=true"])
    benches = [asked for asked in parts.asked if asked[0] == "bench"]
    assert [asked[1:3] for asked in benches[1:]] == [("mo-odpo", "moc"), ("modpo", "--task")]  # by settings
    assert "micro_batch=4" in benches[2] and "micro_batch=4" not in benches[1]
    assert record["card24"] == {"not_measured": "the part large is of a card of 24 GiB"}
    assert record["vllm"] == {"not_measured": "vLLM is not installed"}
    assert record["training"]["hypervolume"] == 0.5
    assert gpu.failures(record) == ["small moc: CUDA out of memory", "large moc: CUDA out of memory"]
    assert any("needs.gpu_memory_gib=24.0" in asked for asked in parts.asked)
    failed = gpu.record_of(Scripted(gpu, "train"), DEVICE, tmp_path)
    assert failed["training"] == {"failed": "not finished within 420 s"}
    assert "training: not finished within 420 s" in gpu.failures(failed)


def test_on_a_large_card_the_settings_for_24_gb_are_measured_too(gpu: ModuleType, tmp_path: Path) -> None:
    parts = Scripted(gpu)
    record = gpu.record_of(parts, {**DEVICE, "memory_bytes": 80 * 2**30}, tmp_path, ["large", "card24"])
    assert {row["card_gib"] for row in record["large"]} == {80.0}
    (row,) = record["card24"]
    assert (row["method"], row["card_gib"]) == ("mo-odpo", 24)
    assert [asked for asked in parts.asked if "--make" in asked] == [("--make", str(tmp_path / "large"))]  # once
    assert "small" not in record and "training" not in record


def test_where_the_gpu_is_shared_memory_is_told_and_no_time(gpu: ModuleType, tmp_path: Path) -> None:
    record = gpu.record_of(Scripted(gpu), DEVICE, tmp_path, ["small", "training"], shared=True)
    row = record["small"][0]
    assert row["peak_gib"] == 6.0 and row["shared"] is True
    assert [row[name] for name in gpu.TIMES] == [None] * 4
    assert record["training"] == {"not_measured": "the GPU was shared"}


def test_engines_are_compared_token_by_token(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    class Apart(Scripted):
        def inside(self, *arguments: str, limit: float = 0.0) -> dict[str, Any]:
            told = super().inside(*arguments)
            return told if "vllm" not in arguments else {**told, "logps": [[-1.5, -2.0], [-3.25]]}

    told = gpu.side_by_side(Apart(gpu))
    assert told["ratio"] == 2.0
    assert (told["mean_logp_gap"], told["max_logp_gap"]) == (0.25, 0.5)


def test_a_part_is_ended_at_its_time_limit_and_a_message_is_its_reason(gpu: ModuleType) -> None:
    with pytest.raises(gpu.Failed, match="not finished within"):
        gpu.Parts(0.5).json("sleep", "30")
    with pytest.raises(gpu.Failed, match="no time left"):
        gpu.Parts(-1).json("true")
    with pytest.raises(gpu.Failed, match="it broke"):
        gpu.Parts(60).json("sh", "-c", "echo first >&2; echo it broke >&2; exit 1")
    assert gpu.Parts(60).json("echo", json.dumps({"a": 1})) == {"a": 1}


def test_without_a_gpu_there_is_one_message_and_no_record(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.Parts, "inside", lambda self, *arguments, **_: {})
    assert gpu.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: no CUDA device here; make gpu-test measures one (torch sees none)\n"
    assert not list(tmp_path.iterdir())


def test_one_record_is_written_under_the_name_of_the_gpu(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moalign.lm import builtin

    scripted = Scripted(gpu)
    monkeypatch.setattr(builtin, "installed", lambda name: tmp_path)
    monkeypatch.setattr(gpu.Parts, "inside", lambda self, *told, **_: DEVICE if "--device" in told else {})
    monkeypatch.setattr(gpu.Parts, "moalign", lambda self, *told, **_: scripted.moalign(*told))
    monkeypatch.setattr(gpu, "side_by_side", lambda parts: {"not_measured": "vLLM is not installed"})
    assert gpu.main(["--out", str(tmp_path)]) == 1  # a method ran out of memory
    (file,) = tmp_path.glob("*.json")
    assert file.name == "gpu-some-gpu-24gb.json"
    assert json.loads(file.read_text())["device"] == DEVICE
    assert "error: small moc: CUDA out of memory" in capsys.readouterr().err
    first = json.loads(file.read_text())
    file.write_text(json.dumps({**first, "measured": dict.fromkeys(first["measured"], "2026-01-01")}))
    gpu.main(["--out", str(tmp_path), "--parts", "training"])  # the other parts stay, with their day
    again = json.loads(file.read_text())
    assert {name for name, day in again["measured"].items() if day != "2026-01-01"} == {"training"}
    assert set(again["seconds"]) == set(gpu.PARTS)
    assert [row["method"] for row in again["small"]] == ["mo-odpo", "moc", "modpo"] and "training" in again
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--parts", "training,smal"])
    assert "found 'smal'; allowed: small, large, card24, vllm, training" in capsys.readouterr().err
    monkeypatch.setattr(builtin, "installed", lambda name: None)
    monkeypatch.setattr(builtin, "converted", lambda name: None)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "make llm brings it" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_itself_on_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: make gpu-test measures it")
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == ["error: no CUDA device here; make gpu-test measures one (torch sees none)"]
    assert not list(tmp_path.iterdir())


def test_memory_of_kept_runs_is_the_most_of_a_methods_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 GiB of the runs of 2 and 3; of the estimate's 10 GiB the 2 that torch does not allocate are left out."""
    monkeypatch.syspath_prepend(BENCH)
    page = loaded(BENCH / "gpu_memory.py", monkeypatch)
    monkeypatch.setattr(page.check, "check", lambda recipe, overrides: SimpleNamespace(memory=MEMORY))
    record = {"method": "moc", "task": "assistant", "environment": {"gpus": ["Some GPU"]}}
    kept = [{**record, "cost": {"peak_memory_bytes": gib * 2**30}} for gib in (2, 3)]
    (row,) = page.kept_rows(iter(kept))
    assert (row.method, row.gpu, row.runs, row.measured, row.estimate) == ("moc", "Some GPU", 2, 3.0, 8.0)
    assert row.phase == "training: update"


def test_the_page_of_memory_is_that_of_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates need the real LLM's sizes, which are known without it; measured is what the kept runs say."""
    monkeypatch.syspath_prepend(BENCH)
    page = loaded(BENCH / "gpu_memory.py", monkeypatch)
    rows = [*page.kept_rows(page.records(page.KEPT)), *page.test_rows(BENCH)]
    assert (BENCH / "gpu_memory.md").read_text(encoding="utf-8") == page.page(rows)
    assert all(row.measured < row.estimate for row in rows)
    for row in rows:
        if row.model.startswith("smollm2"):  # and the recipes say so
            config = registry.get(row.method).Config
            recipe = load.load_recipe(find.find_recipe(f"assistant/{row.method}"), row.method, config_class=config)
            needs = recipe.recipe.needs
            assert needs.measured.startswith(f"{row.measured:.2f} GiB on an H200, {row.runs} run")
            assert needs.peak_gib == float(f"{row.measured:.2f}")

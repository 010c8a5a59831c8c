"""vLLM as typed: what it is refused for, a training and an evaluation with a stand-in for it, and life without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moalign.core import processes
from moalign.lm import backends
from moalign.methods import registry

ON = ("--set", "rollout.engine=vllm")


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on vLLM is not installed."""
    monkeypatch.setattr(backends, "find_spec", lambda name: None)


@pytest.mark.parametrize("verb", [("check", "sandbox/mo-odpo"), ("train", "mo-odpo")])
def test_without_vllm_one_message_says_how_to_get_it(
    moalign: Any, monkeypatch: pytest.MonkeyPatch, small_task: tuple[str, ...], verb: tuple[str, ...], tmp_path: Path
) -> None:
    without(monkeypatch)
    ended = moalign(*verb, *ON, "--set", small_task[0])
    assert ended.code == 2 and ended.errors == [
        "rollout.engine: found 'vllm', but vLLM is not installed; pip install 'moalign[vllm]' into an environment of "
        "its own; or take hf"
    ]
    assert "Traceback" not in ended.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("mo-odpo", ["policy.lora.r=65"], "it serves adapters up to rank 64; found policy.lora.r = 65; or take hf"),
        (
            "rewarded-soups",
            ["policy.lora.r=33"],
            "it serves adapters up to rank 64; found policy.lora.r = 33, which makes 66 of 2 experts interpolated",
        ),
        ("mod", [], "the method mixes the next-token distributions of experts, and vLLM samples from one model"),
        ("pcm", [], "the method mixes the next-token distributions of experts, and vLLM samples from one model"),
        ("mo-odpo", ["task.model=null"], "the task's base is the sandbox's built-in one, too small for vLLM's kernels"),
        ("mo-odpo", ["policy.lora.use_dora=true"], "use_dora"),
        ("mo-odpo", ["rollout.engine=vlm"], "rollout.engine: found 'vlm'"),
        ("mo-odpo", ["rollout.engine=hf", "rollout.correction=3"], "needs engine: vllm; found correction"),
        ("mo-odpo", ["rollout.correction=0.5"], "rollout.correction: found 0.5"),
        ("mo-odpo", ["rollout.motor=vllm"], "motor"),
    ],
)
def test_what_vllm_does_not_serve_is_refused_before_anything_is_trained(
    moalign: Any,
    vllm: list[Any],
    small_task: tuple[str, ...],
    method: str,
    settings: list[str],
    message: str,
    tmp_path: Path,
) -> None:
    sets = [part for text in (small_task[0], *settings) for part in ("--set", text)]
    ended = moalign("train", method, *ON, *sets)
    assert ended.code == 2 and len(ended.errors) == 1 and message in ended.errors[0], ended.err
    assert "Traceback" not in ended.err and not list(tmp_path.iterdir()) and not vllm


@pytest.mark.parametrize(("gpu", "dtype", "served"), [(True, "float32", False), (True, "bfloat16", True)])
def test_on_a_gpu_vllm_serves_adapters_in_half_precision_alone(
    moalign: Any,
    vllm: list[Any],
    small_task: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    dtype: str,
    served: bool,
) -> None:
    """Its LoRA kernels there assert it, without a word; on a CPU, where all tests run, it has others."""
    monkeypatch.setattr(backends, "_on_gpu", lambda: gpu)
    ended = moalign("train", "mo-odpo", *ON, "--set", small_task[0], "--set", f"task.dtype={dtype}", "--dry-run")
    told = "on a GPU it serves adapters in half precision only and dtype is float32; set task.dtype=bfloat16"
    assert (ended.code, told in ended.err) == ((0, False) if served else (2, True)), ended.err


def test_vllm_samples_for_one_process_alone(
    moalign: Any, vllm: list[Any], small_task: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "launched", lambda: (0, 2))
    ended = moalign("train", "mo-odpo", *ON, "--set", small_task[0], "--set", "batch=4")
    assert ended.code == 2 and len(ended.errors) == 1, ended.err
    assert "vllm, and a launcher has started 2 processes; vLLM samples for one alone" in ended.errors[0]


def test_a_base_that_vllm_does_not_know_is_refused_before_there_is_a_run(
    moalign: Any, vllm: list[Any], small_task: tuple[str, ...], random_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(random_base, tmp_path / "refused")
    sets = [part for text in (*small_task, f"task.model={tmp_path / 'refused'}", "steps=1") for part in ("--set", text)]
    ended = moalign("train", "mo-odpo", *ON, *sets)
    assert ended.code == 2 and "(Model architectures ['Odd'] are not supported)" in ended.errors[0], ended.err
    assert not list(tmp_path.glob("results/runs/*/*/*"))


def test_a_run_is_trained_and_judged_by_vllm_and_lives_on_without_it(
    moalign: Any, vllm: list[Any], small_task: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*small_task, "steps=2", "batch=4", "warmup=0", "log_every=1", "policy.lora.r=4")
    sets = [part for text in settings for part in ("--set", text)]
    ended = moalign("train", "mo-odpo", *sets, *ON, "--json")
    assert ended.code == 0, ended.err
    run = Path(json.loads(ended.out)["run"])
    record = json.loads((run / "run.json").read_text())
    assert record["identity"]["rollout"] == {"engine": "vllm"}
    assert record["recipe"]["rollout"] == {"engine": "vllm", "correction": 2.0, "gpu_memory": 0.4}
    assert all(json.loads(line)["mismatch"] > 0 for line in (run / "metrics.jsonl").read_text().splitlines())
    assert json.loads((run / "eval.json").read_text())["engine"] == "vllm"
    (llm,) = vllm
    assert len(llm.calls) == 3, "two steps and one evaluation, of one base"
    assert len(llm.calls[2]) == 8 * 3 and {request.adapter.number for request in llm.calls[2]} == {3}
    planned = moalign("train", "mo-odpo", *sets, *ON, "--set", "rollout.gpu_memory=0.6", "--dry-run", "--json")
    assert json.loads(planned.out)["run_id"] == record["run_id"], "memory is no part of what a run is"
    planned = moalign("train", "mo-odpo", *sets, "--dry-run", "--json")
    assert json.loads(planned.out)["run_id"] != record["run_id"], "other random numbers: another run"

    with monkeypatch.context() as patched:  # of a task in float32, where it is looked at again on a GPU
        patched.setattr(backends, "_on_gpu", lambda: True)
        ended = moalign("eval", str(run), "--grid", "4", "--json")
        assert ended.code == 0 and "vLLM, which sampled in training, cannot sample here" in ended.out, ended.err
        assert len(vllm[0].calls) == 3

    without(monkeypatch)
    ended = moalign("eval", str(run), "--grid", "2", "--json")
    assert ended.code == 0, ended.err
    again = next(json.loads(path.read_text()) for path in run.glob("eval-*.json"))
    assert "engine" not in again
    assert again["warnings"][-1].startswith("answers by our own engine: vLLM, which sampled in training, cannot sample")
    ended = moalign("export", str(run), "--prefs", "1,0", "--out", "exported")
    assert ended.code == 0 and (tmp_path / "exported" / "adapter_model.safetensors").is_file(), ended.err
    assert len(llm.calls) == 3

    other = moalign("train", "prompting", *sets[: 2 * len(small_task)], "--json")
    ended = moalign("compare", str(run), json.loads(other.out)["run"], "--json")
    assert ended.code == 0, ended.err
    warned = {row["method"]: row.get("warnings") for row in json.loads(ended.out)["rows"]}
    said = "answered by vLLM, other rows not: their answers share no random numbers"
    assert said in warned["mo-odpo"] and said not in (warned["prompting"] or [])


def test_check_leaves_vllm_its_share_of_a_card(moalign: Any, vllm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And proposes no 4-bit base, which vLLM is not served with."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ended = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "80GB", *ON, "--set", "rollout.gpu_memory=0.5", "--json")
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    (card,) = told["cards"]
    assert card["fits"] is True and card["peak_gib"] <= 0.48 * 80 and "policy.load_in_4bit" not in card["settings"]
    alone = moalign("check", "hh-rlhf/mo-odpo", "--gpu", "80GB", "--json")
    assert json.loads(alone.out)["cards"][0]["peak_gib"] > 0.48 * 80, "it takes more where it may"
    note = "memory: vLLM takes 0.5 of a GPU (rollout.gpu_memory) on top of this; not measured on a GPU yet"
    assert note in told["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["modpo", "rewarded-soups", "moc", "ric", "paretohqd", "best-of-n"])
def test_whatever_answers_is_sampled_by_vllm(
    moalign: Any, vllm: list[Any], small_task: tuple[str, ...], method: str
) -> None:
    """One call for a whole grid: of an adapter each, of experts interpolated, of one policy, or of the base."""
    quick = [f"{key}={json.dumps(value)}" for key, value in registry.get(method).quick.items()]
    sets = [part for text in (*small_task, *quick, "policy.lora.r=4") for part in ("--set", text)]
    ended = moalign("train", method, *sets, *ON, "--json")
    assert ended.code == 0, ended.err
    result = json.loads((Path(json.loads(ended.out)["run"]) / "eval.json").read_text())
    assert result["engine"] == "vllm" and len(result["points"]) == 3
    (llm,) = vllm
    asked = llm.calls[-1]
    served = sorted({request.adapter.number for request in asked if request.adapter is not None})
    assert len(served) == {"modpo": 3, "paretohqd": 3, "rewarded-soups": 3, "best-of-n": 0}.get(method, 1)
    assert llm.settings["max_lora_rank"] == 8, "of two experts of rank 4 interpolated, too"
    assert len(asked) >= 8 * max(1, len(served))

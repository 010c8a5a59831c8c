"""Options that make training faster, as typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from moalign.tasks.sandbox.base import make_tokenizer

TOP = "policy.lora={r: 4, alpha: 8, dropout: 0.0, layers: 1}"


def folder_of(place: Path, kind: str) -> Path:
    """Write a model of two layers with random weights that reads the sandbox's words."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    known = {"vocab_size": len(tokenizer), "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = LlamaConfig(
            **known, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.25
        )
        LlamaForCausalLM(config).save_pretrained(place)
    else:
        MambaForCausalLM(MambaConfig(**known, num_hidden_layers=2, state_size=4)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def options(task: tuple[str, ...], model: Path, *sets: str) -> list[str]:
    return [part for text in (*task, f"task.model={model}", *sets) for part in ("--set", text)]


FEW = ("steps=2", "batch=4", "micro_batch=4", "log_every=1")


def test_a_policy_is_trained_and_exported(moalign: Any, small_task: tuple[str, ...], tmp_path: Path) -> None:
    sets = options(small_task, folder_of(tmp_path / "model", "llama"), *FEW, TOP)
    both = [part for text in ("share_prompts=true", "group_by_length=true") for part in ("--set", text)]
    runs = []
    for more in ([], both):
        ended = moalign("train", "mo-odpo", "--prefs", "0.5,0.5", "--no-eval", "--json", *sets, *more)
        assert ended.code == 0, ended.err
        runs.append(json.loads(ended.out)["run_id"])
    assert runs[0] != runs[1]  # rounding differs, so it is another run
    ended = moalign("export", runs[1], "--prefs", "0.5,0.5", "--out", "adapter")
    assert ended.code == 0, ended.err
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["layers_pattern"]) == ([1], "layers")
    ended = moalign("export", runs[1], "--prefs", "0.5,0.5", "--out", "whole", "--merged")
    assert ended.code == 0, ended.err
    left, right = (
        AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (tmp_path / "model", Path("whole"))
    )
    changed = {name for name, value in left.items() if not torch.equal(value, right[name])}
    assert changed and all(".layers.1." in name for name in changed)


def test_a_model_without_a_memory_is_refused(moalign: Any, small_task: tuple[str, ...], tmp_path: Path) -> None:
    lora = "policy.lora={r: 4, alpha: 8, dropout: 0.0, targets: [in_proj]}"
    sets = options(small_task, folder_of(tmp_path / "model", "mamba"), *FEW, lora, "share_prompts=true")
    ended = moalign("train", "mo-odpo", "--no-eval", *sets)
    assert ended.code == 2
    assert len(ended.errors) == 1 and "a mamba model cannot be sampled" in ended.errors[0]


@pytest.mark.parametrize(
    ("method", "setting", "message"),
    [
        ("pcm", "share_prompts=true", "share_prompts: found true; allowed: false"),
        ("mo-odpo", "share_prompts=2", "share_prompts: found 2; allowed: true or false"),
        ("mo-odpo", "group_by_lenght=true", "group_by_length"),
        ("mo-odpo", "policy.lora.layers=0", "policy.lora.layers: found 0; allowed: a whole number >= 1"),
        ("mo-odpo", "policy.lora={layers: 1, targets: .*proj}", "layers needs targets: all-linear, or a list of names"),
    ],
)
def test_wrong_settings(moalign: Any, method: str, setting: str, message: str) -> None:
    ended = moalign("train", method, "--set", setting)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.errors) == 1 and message in ended.errors[0]


@pytest.mark.parametrize(("method", "few"), [("mo-odpo", FEW), ("dpo-lw", ("steps=1", "batch=2", "per_prompt=1"))])
def test_sharing_excludes_checkpointing(
    moalign: Any, small_task: tuple[str, ...], tmp_path: Path, method: str, few: tuple[str, ...]
) -> None:
    both = ("share_prompts=true", "policy.gradient_checkpointing=true")
    sets = options(small_task, folder_of(tmp_path / "model", "llama"), *few, TOP, *both)
    ended = moalign("train", method, "--no-eval", *sets)
    assert ended.code == 2
    assert len(ended.errors) == 1 and "gradient checkpointing keeps no cache" in ended.errors[0]

"""A folder's weights are those of its model, and LoRA targets are layers of it: told before anything is trained."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import architecture, language_model
from moalign.lm.language_model import LanguageModel

UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(lm: LanguageModel, tmp_path: Path) -> Path:
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES: list[tuple[Callable[[Weights], object], str]] = [
    (lambda weights: weights.pop(UP), f"missing: {UP}"),
    (lambda weights: weights.pop("model.embed_tokens.weight"), "missing: model.embed_tokens.weight"),
    (lambda weights: weights.update({"score.weight": torch.ones(1, 32)}), "of another model: score.weight"),
    (lambda weights: weights.update({UP: torch.ones(7, 32)}), rf"of another shape: {UP} \[7, 32\] instead of \["),
]


@pytest.mark.parametrize(("change", "problem"), CHANGES, ids=["missing", "embeddings", "unexpected", "shape"])
def test_weights_of_another_model_are_refused(
    folder: Path, change: Callable[[Weights], object], problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    changed(folder, change)
    with pytest.raises(RequestError, match=rf"{folder}: its weights are not those of a LlamaForCausalLM \({problem}"):
        language_model.load(str(folder), device="cpu")
    with pytest.raises(RequestError, match=rf"task.model: .* LlamaForCausalLM \({problem}"):
        architecture.examine(folder, "task.model", None)
    assert capfd.readouterr().err == ""  # one message, ours


def test_many_weights_are_named_in_short_and_all_kinds_of_faults_at_once(folder: Path) -> None:
    def change(weights: Weights) -> None:
        for name in [name for name in weights if "layers.0" in name]:
            del weights[name]
        weights["value_head.weight"] = torch.ones(2)

    changed(folder, change)
    with pytest.raises(RequestError, match=r"missing: (\S+, ){2}\S+ and 6 more; of another model: value_head.weight"):
        language_model.load(str(folder), device="cpu")


def test_a_tied_head_is_not_missing(lm: LanguageModel, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(lm.model.config)
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    tied.save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = language_model.load(str(folder), device="cpu")
    assert torch.equal(loaded.model.lm_head.weight, tied.model.embed_tokens.weight)
    architecture.examine(folder, "task.model", None)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": "2"},
        {"head_dim": [16]},
        {"vocab_size": "many"},
        {"text_config": [1]},
        {"intermediate_size": None},
    ],
)
def test_sizes_of_another_type_in_a_config_are_passed_over(folder: Path, change: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    sizes = architecture.of_folder(folder)
    assert sizes is not None
    assert (sizes.hidden, sizes.layers) == (32, 2)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"model": 3}'])
def test_a_damaged_tokenizer_is_named(folder: Path, name: str, text: str) -> None:
    """The libraries raise errors of every kind for it."""
    (folder / name).write_text(text)
    with contextlib.suppress(RequestError):  # without its settings a tokenizer may do
        language_model.load_codec(str(folder))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], r".*\.(q_proj|down_proj)"])
def test_a_model_is_examined_without_its_weights(folder: Path, targets: list[str] | str) -> None:
    sizes = architecture.of_folder(folder)
    assert sizes is not None
    seen = architecture.examine(folder, "task.model", LoraSpec(r=4, targets=targets))
    count = architecture.adapted(sizes.shapes, 4, targets)
    assert seen == f"LlamaForCausalLM, {sizes.parameters:,} parameters, {count:,} in LoRA adapters"


def test_targets_that_name_no_layer_are_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"policy.lora.targets \['q_projj'\]: Target modules .*q_projj.* not found"):
        architecture.examine(folder, "task.model", LoraSpec(targets=["q_projj"]))

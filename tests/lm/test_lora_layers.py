"""``policy.lora.layers``: adapters in the last layers alone, where the backward pass ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, architecture
from moalign.lm.language_model import LanguageModel, wrap
from moalign.lm.side_by_side import SideBySide
from moalign.tasks.sandbox import base

IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 2]])
TOP = LoraSpec(r=3, alpha=6, dropout=0.0, layers=2)


def made() -> LanguageModel:
    """A Llama of four layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=185, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return wrap(LlamaForCausalLM(config), base.make_tokenizer(), "four", "0" * 16, device="cpu")


def moved(lm: LanguageModel, spec: LoraSpec, name: str = adapters.ADAPTER, seed: int = 0) -> LanguageModel:
    """Attach an adapter and move it away from its start, where it changes nothing."""
    adapters.attach(lm, spec, seed, name)
    generator = torch.Generator().manual_seed(seed)
    start = adapters.tensors(lm, name)
    shaken = {key: value + 0.2 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    adapters.set_tensors(lm, shaken, name)
    lm.model.eval()
    return lm


@torch.no_grad()
def logits(lm: LanguageModel) -> Tensor:
    result: Tensor = lm.model(IDS).logits
    return result


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
@pytest.mark.parametrize("layers", [1, 3, 4])
def test_the_last_layers_alone_have_adapters(targets: list[str] | str, layers: int) -> None:
    lm, spec = made(), LoraSpec(r=3, alpha=6, layers=layers, targets=targets)
    shapes = {name: list(value.shape) for name, value in lm.model.named_parameters()}
    adapters.attach(lm, spec, seed=0)
    names = [name for name, value in lm.model.named_parameters() if value.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == set(range(4 - layers, 4))
    assert len(names) == layers * 2 * (7 if targets == "all-linear" else 2)
    count = sum(value.numel() for value in lm.model.parameters() if value.requires_grad)
    assert architecture.adapted(shapes, 3, targets, architecture.first_adapted(spec, 4)) == count


def test_the_backward_pass_ends_where_they_begin() -> None:
    lm, entering = made(), []
    adapters.attach(lm, TOP, seed=0)
    for layer in lm.model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda module, given: entering.append(given[0].requires_grad))
    lm.model(IDS).logits.sum().backward()
    assert entering == [False, False, False, True]
    assert sum(value.grad is not None for value in lm.model.parameters()) == 2 * 7 * 2


def test_layers_go_by_other_names_in_other_models() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=185, n_embd=32, n_layer=3, n_head=4))
    changed = adapters.with_adapter(model.requires_grad_(False), LoraSpec(r=2, layers=1))
    names = [name for name, value in changed.named_parameters() if value.requires_grad]
    assert len(names) == 2 * 4 and all(".h.2." in name for name in names)


def test_a_second_adapter_may_have_other_layers() -> None:
    lm = moved(made(), LoraSpec(r=3, alpha=6, dropout=0.0))
    everywhere = logits(lm)
    moved(lm, TOP, "top", seed=1)
    assert len(adapters.tensors(lm, "top")) == 2 * 7 * 2
    assert not torch.allclose(logits(lm), everywhere)
    lm.model.set_adapter(adapters.ADAPTER)
    assert torch.equal(logits(lm), everywhere)


def test_what_is_saved_is_loaded_here_and_by_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    lm = moved(made(), TOP)
    wanted = logits(lm)
    with adapters.merged(lm):  # as small models sample
        torch.testing.assert_close(logits(lm), wanted, rtol=1e-4, atol=1e-4)
    adapters.save(lm, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["layers_pattern"]) == ([2, 3], "layers")
    again = made()
    adapters.load(again, tmp_path / "adapter", "loaded")
    assert torch.equal(logits(again), wanted)
    assert adapters.read(again, tmp_path / "adapter").spec.layers == 2
    by_peft = PeftModel.from_pretrained(made().model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(by_peft(IDS).logits, wanted)


def test_experts_with_them_are_mixed_and_interpolated() -> None:
    lm = made()
    for seed, name in enumerate(("one", "two")):
        moved(lm, TOP, name, seed + 1)
    apart = []
    for name in ("one", "two"):
        lm.model.set_adapter(name)
        apart.append(logits(lm))
    with torch.no_grad():
        both = SideBySide(lm, ["one", "two"])(input_ids=IDS.repeat(2, 1)).logits
    torch.testing.assert_close(both, torch.cat(apart), rtol=1e-4, atol=1e-4)
    experts = [adapters.Adapter(TOP, adapters.tensors(lm, name)) for name in ("one", "two")]
    adapters.place(lm, adapters.interpolate(experts, [0.0, 1.0]), "mean")
    torch.testing.assert_close(logits(lm), apart[1])
    adapters.place(lm, adapters.interpolate(experts, [0.5, 0.5]), "mean")
    assert len(adapters.tensors(lm, "mean")) == 2 * 7 * 2


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(RequestError, match="policy.lora.layers: found 5; allowed: 1 to 4, the layers of the model"):
        adapters.attach(made(), LoraSpec(layers=5), seed=0)
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        LoraSpec(layers=0)
    with pytest.raises(ValidationError, match="layers needs targets: all-linear, or a list of names; found"):
        LoraSpec(layers=2, targets=r".*\.q_proj")


def test_the_command_line_says_so(
    small_task: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model of the small task has one layer."""
    from moalign.cli.main import main

    told = "policy.lora.layers: found 2; allowed: 1 to 1, the layers of the model"
    task = [part for override in small_task for part in ("--set", override)]
    wanted = [*task, "--set", "policy.lora.layers=2"]
    (tmp_path / "mo-odpo.yaml").write_text("method: mo-odpo\ntask: sandbox\n")
    assert main(["check", str(tmp_path / "mo-odpo.yaml"), *wanted, "--results", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.count(told) == 1
    assert main(["train", "mo-odpo", *wanted, "--results", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.count(told) == 1

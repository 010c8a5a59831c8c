"""LoRA adapters: the base stays untouched, bit for bit; what is saved is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.sampler import sample, uniforms

SPEC = LoraSpec(r=4, alpha=8, dropout=0.5)
IDS = torch.tensor([[1, 20, 30, 40, 50, 60, 2]])
Make = Callable[..., LanguageModel]


def logits(lm: LanguageModel) -> Tensor:
    lm.model.eval()
    with torch.no_grad():
        result: Tensor = lm.model(IDS).logits
    return result


def trained(lm: LanguageModel, seed: int = 0, name: str = adapters.ADAPTER) -> LanguageModel:
    """Attach an adapter and move it away from its start, where it changes nothing."""
    adapters.attach(lm, SPEC, seed, name)
    generator = torch.Generator().manual_seed(seed)
    start = adapters.tensors(lm, name)
    moved = {key: value + 0.2 * torch.randn(value.shape, generator=generator) for key, value in start.items()}
    adapters.set_tensors(lm, moved, name)
    return lm


def base_weights(lm: LanguageModel) -> dict[str, Tensor]:
    """Copies of the base's own tensors under the names they have without an adapter."""
    state = {key: value.clone() for key, value in lm.model.state_dict().items() if "lora_" not in key}
    return {key.removeprefix("base_model.model.").replace("base_layer.", ""): value for key, value in state.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_fresh_adapter_answers_as_the_base_and_is_the_only_thing_that_trains(make_lm: Make) -> None:
    lm = make_lm()
    before = logits(lm)
    adapters.attach(lm, SPEC, seed=0)
    torch.testing.assert_close(logits(lm), before, atol=1e-6, rtol=0)
    learning = [name for name, value in lm.model.named_parameters() if value.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    assert sum(value.numel() for value in adapters.tensors(lm).values()) == sum(
        value.numel() for value in lm.model.parameters() if value.requires_grad
    )


def test_first_weights_depend_on_the_seed_alone(make_lm: Make) -> None:
    result = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        lm = make_lm()
        torch.manual_seed(before)
        adapters.attach(lm, SPEC, seed)
        result.append(adapters.tensors(lm))
    assert same(result[0], result[1]) and not same(result[0], result[2])


def test_attaching_again_starts_afresh(make_lm: Make) -> None:
    lm = trained(make_lm())
    base = base_weights(lm)
    fresh = make_lm()
    adapters.attach(fresh, SPEC, seed=0)
    adapters.attach(lm, SPEC, seed=0)
    assert same(adapters.tensors(lm), adapters.tensors(fresh))
    assert same(base_weights(lm), base)
    assert list(lm.model.peft_config) == [adapters.ADAPTER]


def test_reference_mode_is_exactly_the_bare_base(make_lm: Make) -> None:
    bare = logits(make_lm())
    lm = trained(make_lm())
    steered = logits(lm)
    assert (steered - bare).abs().max() > 0.1
    with reference_mode(lm):
        assert torch.equal(logits(lm), bare)
    assert torch.equal(logits(lm), steered)
    with pytest.raises(RuntimeError, match="inside"), reference_mode(lm):
        raise RuntimeError("inside")
    assert torch.equal(logits(lm), steered)


def test_training_goes_on_after_reference_mode(make_lm: Make) -> None:
    lm = make_lm()
    adapters.attach(lm, SPEC, seed=0)
    before = [name for name, value in lm.model.named_parameters() if value.requires_grad]
    with reference_mode(lm):
        pass
    assert [name for name, value in lm.model.named_parameters() if value.requires_grad] == before


def test_reference_mode_inside_reference_mode(make_lm: Make) -> None:
    bare = logits(make_lm())
    lm = trained(make_lm())
    with reference_mode(lm):
        with reference_mode(lm):
            assert torch.equal(logits(lm), bare)
        assert torch.equal(logits(lm), bare)


def test_merged_answers_alike_and_puts_the_weights_back_bit_for_bit(make_lm: Make) -> None:
    lm = trained(make_lm())
    steered, base, adapter = logits(lm), base_weights(lm), adapters.tensors(lm)
    with adapters.merged(lm):
        torch.testing.assert_close(logits(lm), steered, atol=1e-5, rtol=1e-5)
        assert not same(base_weights(lm), base)
    assert same(base_weights(lm), base) and same(adapters.tensors(lm), adapter)
    assert torch.equal(logits(lm), steered)
    with reference_mode(lm):
        assert torch.equal(logits(lm), logits(make_lm()))


def test_merged_keeps_half_precision(make_lm: Make) -> None:
    """Sampling with an adapter on a small model in bfloat16 stopped with an error: the sum was in single precision."""
    full, half = trained(make_lm()), make_lm()
    half.model.to(torch.bfloat16)
    trained(half)
    base = base_weights(half)
    with adapters.merged(half), adapters.merged(full):
        weight = half.model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
        exact = full.model.get_base_model().model.layers[0].self_attn.q_proj.get_base_layer().weight
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), exact, atol=0.005, rtol=2**-7)
        drawn = sample(half, [IDS[0].tolist()], uniforms(0, range(8), 6), repeat=8)
    assert drawn.tokens >= 8 and (drawn.logps[drawn.response_mask] < 0).all()
    assert same(base_weights(half), base)


def test_merged_puts_the_weights_back_after_an_exception(make_lm: Make) -> None:
    lm = trained(make_lm())
    steered, base = logits(lm), base_weights(lm)
    with pytest.raises(KeyboardInterrupt), adapters.merged(lm):
        raise KeyboardInterrupt
    assert same(base_weights(lm), base)
    assert torch.equal(logits(lm), steered)


def test_merged_puts_the_weights_back_when_merging_itself_fails(make_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    lm = trained(make_lm())
    base, real, calls = base_weights(lm), Linear.get_delta_weight, []

    def fails_late(layer: Linear, name: str) -> Tensor:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError
        return real(layer, name)

    monkeypatch.setattr(Linear, "get_delta_weight", fails_late)
    with pytest.raises(MemoryError), adapters.merged(lm):
        raise AssertionError("it must not get here")
    assert same(base_weights(lm), base)


def test_large_models_are_not_merged(make_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MERGE_BELOW", 10)
    lm = trained(make_lm())
    steered, base = logits(lm), base_weights(lm)
    with adapters.merged(lm):
        assert same(base_weights(lm), base)
        assert torch.equal(logits(lm), steered)


def test_merging_a_bare_model_does_nothing(make_lm: Make) -> None:
    lm = make_lm()
    before = logits(lm)
    with adapters.merged(lm):
        assert torch.equal(logits(lm), before)


def test_two_adapters_switch(make_lm: Make) -> None:
    alone = {name: logits(trained(make_lm(), seed, name)) for seed, name in enumerate(("one", "two"))}
    lm = make_lm()
    trained(lm, 0, "one")
    trained(lm, 1, "two")
    for name in ("one", "two", "one"):
        lm.model.set_adapter(name)
        assert torch.equal(logits(lm), alone[name])
        with adapters.merged(lm):
            torch.testing.assert_close(logits(lm), alone[name], atol=1e-5, rtol=1e-5)
    adapters.drop(lm, "one")
    lm.model.set_adapter("two")
    assert list(lm.model.peft_config) == ["two"]
    assert torch.equal(logits(lm), alone["two"])


def test_saved_adapter_comes_back_exactly_and_frozen(make_lm: Make, tmp_path: Path) -> None:
    lm = trained(make_lm())
    adapters.save(lm, tmp_path / "adapter")
    other = make_lm()
    adapters.load(other, tmp_path / "adapter", "mine")
    assert same(adapters.tensors(other, "mine"), adapters.tensors(lm))
    assert torch.equal(logits(other), logits(lm))  # dropout is off
    assert not any(value.requires_grad for value in other.model.parameters())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    adapters.save(other, tmp_path / "again", "mine")
    first, second = ((tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("adapter", "again"))
    assert first == second


def test_saved_adapter_is_what_peft_reads(make_lm: Make, tmp_path: Path) -> None:
    from peft import PeftModel

    lm = trained(make_lm())
    adapters.save(lm, tmp_path / "adapter")
    model = PeftModel.from_pretrained(make_lm().model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits(lm), atol=1e-6, rtol=0)


def test_saving_replaces_an_older_adapter_whole(make_lm: Make, tmp_path: Path) -> None:
    lm = trained(make_lm())
    adapters.save(lm, tmp_path / "adapter")
    adapters.attach(lm, SPEC, seed=9)
    adapters.save(lm, tmp_path / "adapter")
    other = make_lm()
    adapters.load(other, tmp_path / "adapter")
    assert same(adapters.tensors(other), adapters.tensors(lm))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def refused(lm: LanguageModel, folder: Path) -> str:
    with pytest.raises(RequestError) as caught:
        adapters.load(lm, folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_adapter_of_another_base_is_refused(make_lm: Make, tmp_path: Path) -> None:
    adapters.save(trained(make_lm(seed=0)), tmp_path / "adapter")
    other = make_lm(seed=1)
    message = refused(other, tmp_path / "adapter")
    assert "fingerprint 0000000000000000" in message and "0000000000000001" in message
    assert not hasattr(other.model, "peft_config")  # refused before anything was attached


@pytest.mark.parametrize("kept", [4, 300, -5])
def test_truncated_adapter_is_refused(make_lm: Make, tmp_path: Path, kept: int) -> None:
    adapters.save(trained(make_lm()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "adapter_model.safetensors" in refused(make_lm(), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file_is_named(make_lm: Make, tmp_path: Path, name: str) -> None:
    adapters.save(trained(make_lm()), tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    assert f"{name} is missing" in refused(make_lm(), tmp_path / "adapter")


@pytest.mark.parametrize("content", ["{broken", "{}", "[]"])
def test_damaged_config_is_refused(make_lm: Make, tmp_path: Path, content: str) -> None:
    adapters.save(trained(make_lm()), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refused(make_lm(), tmp_path / "adapter")


def test_weights_that_do_not_fit_their_config_are_refused(make_lm: Make, tmp_path: Path) -> None:
    adapters.save(trained(make_lm()), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 3}))
    assert "does not fit the base" in refused(make_lm(), tmp_path / "adapter")


def test_targets_that_name_no_layer_are_refused(make_lm: Make) -> None:
    with pytest.raises(RequestError, match="policy.lora.targets"):
        adapters.attach(make_lm(), LoraSpec(targets=["no_such_layer"]), seed=0)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tensor_that_two_layers_share_is_not_merged_into(target: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.lm.language_model import wrap
    from moalign.tasks.sandbox.base import make_tokenizer

    torch.manual_seed(0)
    tied = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip
    lm = wrap(tied, make_tokenizer(), "tied", "0" * 16, device="cpu")
    adapters.attach(lm, LoraSpec(r=4, alpha=8, dropout=0.0, targets=["q_proj", target]), seed=0)
    weights = adapters.tensors(lm)
    adapters.set_tensors(lm, {name: value + 0.3 for name, value in weights.items()})
    beside = logits(lm)
    with adapters.merged(lm):
        assert torch.equal(logits(lm), beside)
    assert adapters.shares_weights(lm)


@pytest.mark.parametrize(
    ("setting", "found"),
    [("use_rslora", True), ("alpha_pattern", {"v_proj": 64}), ("rank_pattern", {"v_proj": 2}), ("use_dora", True),
     ("init_lora_weights", "pissa")],
)  # fmt: skip
def test_an_adapter_of_another_strength_or_kind_is_refused(
    make_lm: Make, tmp_path: Path, setting: str, found: object
) -> None:
    adapters.save(trained(make_lm()), tmp_path / "one")
    place = tmp_path / "one" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), setting: found}))
    with pytest.raises(RequestError, match=f"adapter_config.json: found {setting}: "):
        adapters.read(make_lm(), tmp_path / "one")

"""The memory estimate against real modules: parameters, adapters, optimiser state, and what autograd keeps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.config import load
from moalign.config.recipe import LoraSpec
from moalign.lm import architecture
from moalign.methods import registry
from moalign.methods.base import Capabilities
from moalign.preflight import memory
from moalign.preflight.memory import GIB

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "llama grouped": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {},
}


def config(name: str, **more: Any) -> Any:
    import transformers as t

    if name == "gpt2":
        return t.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=48)
    kind = t.Qwen2Config if name == "qwen2" else t.LlamaConfig
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    return kind(**{**sizes, "num_attention_heads": 4, "max_position_embeddings": 48, **SMALL[name], **more})


def model(name: str, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(name, **more))


def with_adapters(base: Any, spec: LoraSpec) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: Any = spec.targets
    told = LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(base.requires_grad_(False), told)


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def sizes_of(real: Any, folder: Path) -> architecture.Architecture:
    real.save_pretrained(folder)
    sizes = architecture.of_folder(folder)
    assert sizes is not None
    return sizes


@pytest.mark.parametrize("name", SMALL)
def test_parameters_are_those_of_the_real_model(name: str, tmp_path: Path) -> None:
    real = model(name)
    sizes = sizes_of(real, tmp_path)
    by_name = real.named_parameters(remove_duplicate=False)  # a tied head has a name of its own
    assert sizes.shapes == {key: list(value.shape) for key, value in by_name}
    assert sizes.parameters == sum(p.numel() for p in real.parameters())
    groups = SMALL[name].get("num_key_value_heads", 4)
    assert (sizes.hidden, sizes.layers, sizes.key_value, sizes.vocabulary) == (32, 2, 8 * groups, 60)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Ray2333/gpt2-large-harmless-reward_model", 774_030_080 + 1280),  # the body and the head that scores
        ("Tristan/gpt2_reward_summarization", 124_439_808 + 768),
        # Of Llama-2: one more token, the head that scores, no output layer.
        ("PKU-Alignment/beaver-7b-v1.0-cost", 6_738_415_616 + 2 * 4096 - 32000 * 4096),
    ],
)
def test_known_models_have_their_published_size(name: str, count: int) -> None:
    assert architecture.KNOWN[name].parameters == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama", {"num_attention_heads": 32}),
        ("meta-llama/Llama-3.2-1B", "llama", {"num_attention_heads": 32, "tie_word_embeddings": True}),
        ("Qwen/Qwen2.5-0.5B", "qwen2", {"num_attention_heads": 14, "tie_word_embeddings": True}),
        ("smollm2-135m-instruct", "llama", {"num_attention_heads": 9, "tie_word_embeddings": True}),
    ],
)
def test_known_policies_are_those_that_the_library_builds(name: str, kind: str, more: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = architecture.KNOWN[name]
    groups = sizes.key_value * more["num_attention_heads"] // sizes.hidden
    described = {"hidden_size": sizes.hidden, "intermediate_size": sizes.inner, "vocab_size": sizes.vocabulary}
    described |= {"num_hidden_layers": sizes.layers, "num_key_value_heads": groups, **more}
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **described))
    assert sizes.parameters == real.num_parameters()
    named = {key: list(value.shape) for key, value in real.named_parameters(remove_duplicate=False)}
    assert sizes.shapes and sizes.shapes.items() <= named.items()
    spec = LoraSpec(r=8, alpha=16)
    trained, _ = with_adapters(real, spec).get_nb_trainable_parameters()
    assert architecture.adapted(sizes.shapes, spec.r, spec.targets) == trained


BART = {"d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "num_labels": 2}
BART |= {"encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
DEBERTA = {"vocab_size": 128100, "hidden_size": 1024, "intermediate_size": 4096, "num_labels": 1}
DEBERTA |= {"num_hidden_layers": 24, "num_attention_heads": 16, "type_vocab_size": 0, "position_biased_input": False}
DEBERTA |= {"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
GPT2_LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20, "num_labels": 1}
BEAVER = {"vocab_size": 32001, "hidden_size": 4096, "intermediate_size": 11008, "num_labels": 1}
BEAVER |= {"num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "described"),
    [
        ("Ray2333/gpt2-large-harmless-reward_model", "gpt2", GPT2_LARGE),
        ("Ray2333/gpt2-large-helpful-reward_model", "gpt2", GPT2_LARGE),
        ("Tristan/gpt2_reward_summarization", "gpt2", {"num_labels": 1}),
        ("PKU-Alignment/beaver-7b-v1.0-reward", "llama", BEAVER),
        ("PKU-Alignment/beaver-7b-v1.0-cost", "llama", BEAVER),
        ("mohameddhiab/humor-no-humor", "distilbert", {"num_labels": 2}),
        ("CogComp/bart-faithful-summary-detector", "bart", BART),
        ("OpenAssistant/reward-model-deberta-v3-large-v2", "deberta-v2", DEBERTA),
    ],
)
def test_known_reward_models_are_those_that_the_library_builds(name: str, kind: str, described: dict[str, Any]) -> None:
    """With the head that scores, and without the output layer of a language model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with torch.device("meta"):
        real = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **described))
    sizes = architecture.KNOWN[name]
    assert sizes.parameters == real.num_parameters()
    layers = real.config.num_hidden_layers + getattr(real.config, "decoder_layers", 0)
    assert (sizes.hidden, sizes.key_value, sizes.layers) == (real.config.hidden_size, real.config.hidden_size, layers)
    assert {sizes.hidden, sizes.inner} in [set(value.shape) for value in real.parameters()]
    assert sizes.vocabulary in (0, real.config.vocab_size)  # 0: an encoder makes no tokens


def test_a_model_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    assert memory.sizes_of("someone/some-model") is None
    model("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert architecture.of_folder(tmp_path) is None


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*\.(q_proj|down_proj)"])
def test_adapters_and_their_optimiser_are_those_of_peft(name: str, targets: list[str] | str, tmp_path: Path) -> None:
    if name == "gpt2" and targets != "all-linear":
        targets = ["c_attn"]
    spec = LoraSpec(r=3, alpha=6, dropout=0.0, targets=targets)
    base = model(name)
    sizes = sizes_of(base, tmp_path)
    real = with_adapters(base, spec)
    trained = [p for p in real.parameters() if p.requires_grad]
    count = architecture.adapted(sizes.shapes, spec.r, targets)
    assert count == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    real(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = nbytes(trained) + nbytes(p.grad for p in trained) + nbytes(moments)
    assert held == count * memory.TRAINED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_takes_what_its_tensors_take(dtype: str, tmp_path: Path) -> None:
    real = model("llama").to(getattr(torch, dtype))
    sizes = sizes_of(real, tmp_path)
    assert sizes.parameters * memory.WIDTH[dtype] == nbytes(real.parameters())


def test_the_kv_cache_takes_what_a_real_cache_takes(tmp_path: Path) -> None:
    real = model("llama grouped")
    sizes = sizes_of(real, tmp_path)
    rows, tokens = 3, 10
    with torch.no_grad():
        cache = real(input_ids=torch.randint(0, 60, (rows, tokens)), use_cache=True).past_key_values
    real_bytes = nbytes(side for layer in cache.layers for side in (layer.keys, layer.values))
    assert real_bytes == rows * tokens * 2 * sizes.layers * sizes.key_value * 4


def kept(layers: int, name: str, dtype: torch.dtype, dropout: float, autocast: bool) -> float:
    """Bytes per token that autograd keeps in a forward pass, weights left out."""
    real = with_adapters(
        model(name, num_hidden_layers=layers).to(dtype), LoraSpec(r=4, alpha=8, dropout=dropout)
    ).train()
    own = {p.untyped_storage().data_ptr() for p in real.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address is not used twice
        return tensor

    ids = torch.randint(0, 60, (4, 48))
    half = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
        real(input_ids=ids, attention_mask=torch.ones_like(ids))
    return sum(size for size, _ in seen.values()) / ids.numel()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_one_layer_keeps_what_autograd_keeps(dtype: str, autocast: bool, dropout: float, tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    three, two = (kept(layers, "llama", kind, dropout, autocast) for layers in (3, 2))
    sizes = sizes_of(model("llama"), tmp_path)
    spec = LoraSpec(r=4, alpha=8, dropout=dropout)
    expected = memory.layer_bytes(sizes, memory.WIDTH[dtype], spec, 1, autocast, mask=4)
    assert expected == pytest.approx(three - two, rel=0.05)


# -- phases --------------------------------------------------------------------------------------------------------

CARD = """\
name: tales
kind: text
description: short stories
model: meta-llama/Llama-2-7b-hf
dtype: bfloat16
objectives:
  - {name: harmless, kind: hf-classifier, model: Ray2333/gpt2-large-harmless-reward_model, dtype: bfloat16}
  - {name: helpful, kind: hf-classifier, model: Ray2333/gpt2-large-helpful-reward_model, dtype: bfloat16}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
generation: {max_prompt_tokens: 128, max_new_tokens: 128, batch_size: 32}
data: {prompts: [hello]}
"""


def estimated(tmp_path: Path, method: str, *overrides: str, needs: str = "{gpu: A100}") -> memory.Estimate:
    (tmp_path / "task.yaml").write_text(CARD)
    recipe = tmp_path / f"{method}.yaml"
    recipe.write_text(f"method: {method}\ntask: ./task.yaml\nneeds: {needs}\n")
    resolved = load.load_recipe(recipe, method, None, overrides, registry.get(method).Config)
    sizes = memory.sizes_of(str(resolved.card.model))
    assert sizes is not None
    return memory.estimate(resolved, sizes, registry.get(method).capabilities)


def test_a_7b_policy_with_two_gpt2_large_reward_models(tmp_path: Path) -> None:
    """The hand-made table of FACTS.md, section 5: 12.55 base, 2.38 adapters, 2.88 reward models, 4.00 KV cache."""
    told = estimated(tmp_path, "mo-odpo", "micro_batch=8", "batch=16", "policy.lora.dropout=0")
    assert [phase.name for phase in told.phases] == [
        "sampling the base",
        "training: rollout",
        "training: update",
        "answering",
    ]
    parts = {phase.name: phase.parts for phase in told.phases}
    update = parts["training: update"]
    assert update["base"] / GIB == pytest.approx(12.55, abs=0.01)
    assert update["adapters"] / GIB == pytest.approx(2.38, abs=0.01)
    assert update["reward models"] / GIB == pytest.approx(2.88, abs=0.01)
    assert parts["training: rollout"]["KV cache"] / GIB == pytest.approx(4.00, abs=0.01)
    # 8 rows of 256 tokens without checkpointing: FACTS measured 167 to 270 KiB a token and layer.
    assert update["activations"] / (8 * 256 * 32 * 1024) == pytest.approx(268, abs=5)
    assert told.peak.name == "training: update"


def test_all_logits_are_counted_where_they_cannot_be_made_in_chunks(tmp_path: Path) -> None:
    """With LoRA on the output layer each of 16 rows x 129 places x 32,000 words is held: 2 bytes, and 12 in float32."""
    sets = ("micro_batch=16", "batch=16", "task.generation.max_new_tokens=128")
    told = {}
    for targets in ("[q_proj]", "[q_proj, lm_head]"):
        phases = estimated(tmp_path, "mo-odpo", *sets, f"policy.lora.targets={targets}").phases
        told[targets] = next(phase.parts for phase in phases if phase.name == "training: update")
    assert told["[q_proj]"]["logits"] == 2**23 * 14
    assert told["[q_proj, lm_head]"]["logits"] == 16 * 129 * 32000 * 14
    more = (told["[q_proj, lm_head]"]["adapters"] - told["[q_proj]"]["adapters"]) / 16  # weight, gradient, two moments
    assert more == 64 * (32000 + 4096)  # the head's own adapter


def test_a_softcap_or_a_tied_head_is_read_from_the_folder(random_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "soft"
    shutil.copytree(random_base, folder)
    config = json.loads((folder / "config.json").read_text())
    plain = architecture.of_folder(folder)
    assert plain is not None and not plain.softened
    assert plain.shapes[architecture.HEAD] == [config["vocab_size"], config["hidden_size"]]
    (folder / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    capped = architecture.of_folder(folder)
    assert capped is not None and capped.softened and capped.parameters == plain.parameters


def test_a_model_that_only_the_judge_uses_is_counted_where_answers_are_judged(tmp_path: Path) -> None:
    gold = "{name: helpful, kind: hf-classifier, model: Ray2333/gpt2-large-%s-reward_model, dtype: bfloat16}"
    parts = {}
    for name in ("harmless", "helpful"):  # the first is loaded anyway, as an objective of the methods'
        override = f"task.gold_objectives=[{gold % name}]"
        parts[name] = {phase.name: phase.parts for phase in estimated(tmp_path, "mo-odpo", override).phases}
    plain = {phase.name: phase.parts for phase in estimated(tmp_path, "mo-odpo").phases}
    other = "task.gold_objectives=[{name: helpful, kind: hf-classifier, model: someone/else}]"
    assert parts["helpful"] == parts["harmless"] == plain
    assert estimated(tmp_path, "mo-odpo", other).unknown == ["someone/else"]
    third = gold.replace("dtype: bfloat16", "dtype: float32") % "helpful"  # 774 M numbers of 4 bytes
    more = {p.name: p.parts for p in estimated(tmp_path, "mo-odpo", f"task.gold_objectives=[{third}]").phases}
    assert more["training: update"] == plain["training: update"]
    added = more["answering"]["reward models"] - plain["answering"]["reward models"]
    assert added == plain["answering"]["reward models"], "as much again: two models of 2 bytes a number, one of 4"


def test_what_makes_a_phase_smaller(tmp_path: Path) -> None:
    def update(method: str, *overrides: str) -> dict[str, int]:
        phases = estimated(tmp_path, method, *overrides).phases
        return next(phase.parts for phase in phases if phase.name.endswith("update"))

    large, small = update("mo-odpo", "micro_batch=8"), update("mo-odpo", "micro_batch=4")
    assert large["activations"] == 2 * small["activations"]
    assert large["logits"] == small["logits"] == memory.AT_ONCE * (2 + 12)  # made in chunks: 129 tokens of 32,000 words
    assert (
        update("sft", "steps=1", "batch=8")["activations"]
        > update("sft", "steps=1", "batch=8", "accumulate=4")["activations"]
    )
    started = update("mo-odpo", "micro_batch=8", "reference=start")
    assert started["adapters"] - large["adapters"] == 4 * 159_907_840  # a frozen copy of the adapter
    assert update("mo-odpo", "policy.lora.r=8")["adapters"] == large["adapters"] // 8


def test_checkpointing_is_counted_where_trl_trains(tmp_path: Path) -> None:
    told = estimated(tmp_path, "ric", "online.steps=0", "offline={steps: 9, batch: 8, accumulate: 8}")
    update = next(phase.parts for phase in told.phases if phase.name == "offline: update")
    tokens, layer_inputs = 512, 32 * 4096 * 2
    assert update["activations"] > tokens * layer_inputs
    assert update["activations"] < tokens * layer_inputs + tokens * 350 * 1024  # and one layer


def parts_of(tmp_path: Path, method: str, phase: str, *overrides: str) -> dict[str, int]:
    return next(each.parts for each in estimated(tmp_path, method, *overrides).phases if each.name.endswith(phase))


def test_checkpointing_is_counted_in_the_online_engine_where_it_is_on(tmp_path: Path) -> None:
    """The inputs of 32 layers of 4,096 half-precision numbers a token, and what one layer keeps."""
    few = ("micro_batch=8", "policy.lora.dropout=0")
    plain = parts_of(tmp_path, "mo-odpo", "update", *few)["activations"]
    again = parts_of(tmp_path, "mo-odpo", "update", *few, "policy.gradient_checkpointing=true")["activations"]
    assert again == 8 * 256 * 32 * 4096 * 2 + plain // 32
    off = parts_of(tmp_path, "sft", "update", "steps=1", "policy.gradient_checkpointing=false")["activations"]
    assert off > 15 * parts_of(tmp_path, "sft", "update", "steps=1")["activations"], "trl's trainers: on by default"


def test_autocast_s_copies_of_float32_weights_are_counted_where_layers_are_not_computed_again(tmp_path: Path) -> None:
    """Of the linear layers of Llama-2-7B, 6,476,005,376 parameters, two bytes each."""
    casts = 2 * 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    few = ("steps=1", "policy.lora.dropout=0", "batch=2", "accumulate=1", "max_tokens=128")
    off = (*few, "policy.gradient_checkpointing=false")
    half, whole = (
        parts_of(tmp_path, "sft", "update", *off, f"task.dtype={dtype}")["activations"]
        for dtype in ("bfloat16", "float32")
    )
    assert half < casts < whole
    again = parts_of(tmp_path, "sft", "update", *few, "task.dtype=float32", "policy.gradient_checkpointing=true")
    assert again["activations"] == pytest.approx(2 * 128 * 32 * 4096 * 4 + (whole - casts) / 32, rel=1e-6)
    once, pairs = (
        parts_of(tmp_path, "modpo", "update", *off, "task.dtype=float32", f"share_prompts={on}")["activations"]
        for on in ("false", "true")
    )
    assert pairs == once + casts, "the prompt is a pass of its own"


def test_sampling_in_parts_and_reward_models_off_the_gpu_are_counted(tmp_path: Path) -> None:
    few = ("batch=16", "samples=2")
    plain = parts_of(tmp_path, "mo-odpo", "rollout", *few)
    part = parts_of(tmp_path, "mo-odpo", "rollout", *few, "sample_batch=8")
    assert plain["KV cache"] == 4 * part["KV cache"]
    off = parts_of(tmp_path, "mo-odpo", "rollout", *few, "sample_batch=1", "rewards.offload=true")
    assert off["reward models"] * 2 == plain["reward models"], "one of the two at a time, while it scores"
    assert "reward models" not in parts_of(tmp_path, "mo-odpo", "update", *few, "rewards.offload=true")
    whole, four = (
        parts_of(tmp_path, "sft", "answering", *more)["base"] for more in ((), ("policy.load_in_4bit=true",))
    )
    assert four / GIB == pytest.approx(3.69, abs=0.02) and whole / GIB == pytest.approx(12.55, abs=0.01)


def test_stages_of_no_steps_and_switched_off_ones_are_left_out(tmp_path: Path) -> None:
    names = [phase.name for phase in estimated(tmp_path, "sft", "steps=0").phases]
    assert names == ["sampling the base", "answering"]
    assert not any("distil" in phase.name for phase in estimated(tmp_path, "mo-odpo").phases)
    warm = estimated(tmp_path, "mo-odpo", "warm_start=hindsight")
    assert any("distil" in phase.name for phase in warm.phases)


def test_value_heads_are_counted_for_ppo(tmp_path: Path) -> None:
    update = next(p for p in estimated(tmp_path, "moc").phases if p.name == "training: update")
    assert update.parts["value heads"] == 2 * 4097 * 16


def test_a_reward_model_of_unknown_size_is_named(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(CARD.replace("Ray2333/gpt2-large-helpful-reward_model", "someone/else"))
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("method: sft\ntask: ./task.yaml\n")
    resolved = load.load_recipe(recipe, "sft", None, (), registry.get("sft").Config)
    sizes = memory.sizes_of(str(resolved.card.model))
    assert sizes is not None
    assert memory.estimate(resolved, sizes, Capabilities()).unknown == ["someone/else"]


def test_dropout_counts_where_it_is_on(tmp_path: Path) -> None:
    """Supervised training drops, pairs and the online engine do not."""
    for method, changes in (("sft", True), ("dpo-lw", False), ("mo-odpo", False)):
        some, none = (
            next(
                p
                for p in estimated(tmp_path, method, "steps=1", f"policy.lora.dropout={rate}").phases
                if "update" in p.name
            )
            for rate in (0.1, 0.0)
        )
        assert (some.parts["activations"] > none.parts["activations"]) == changes


def test_a_mixture_trains_its_control_model_and_keeps_what_that_reads(tmp_path: Path) -> None:
    update = next(p for p in estimated(tmp_path, "pcm", "micro_batch=8").phases if p.name == "training: update")
    assert update.parts["adapters"] == 2 * 2 * 4 * 159_907_840  # two experts, each by itself and in the stack
    assert update.parts["control"] == 16 * (2 * 16 * 64 * 64 + 64 * 4096)
    assert update.parts["activations"] < 8 * 256 * 2 * 16 * 1024


def test_without_a_gpu_the_estimate_is_of_the_cpu_and_a_range(tmp_path: Path) -> None:
    settings = ("steps=1", "task.dtype=float32", "policy.lora.dropout=0")
    on_gpu, on_cpu = estimated(tmp_path, "sft", *settings), estimated(tmp_path, "sft", *settings, needs="{}")
    assert (on_gpu.on_cpu, on_cpu.on_cpu) == (False, True)
    assert on_gpu.most == on_gpu.peak.total and on_cpu.most > 1.4 * on_cpu.peak.total
    update = on_cpu.peak.parts
    assert update["activations"] > 10 * on_gpu.phases[1].parts["activations"]  # no layer is computed again
    assert update["rest"] == memory.LIBRARIES
    assert " GiB on the CPU (training: update): weights 25.10" in on_cpu.sentence()
    assert estimated(tmp_path, "sft", needs="{gpu_memory_gib: 24}").on_cpu is False


def test_small_models_fold_their_adapters_while_they_sample(random_base: Path, tmp_path: Path) -> None:
    rollout = estimated(tmp_path, "mo-odpo", f"task.model={random_base}").phases[1]
    sizes = memory.sizes_of(str(random_base))
    assert sizes is not None
    assert rollout.parts["folded"] == 2 * (sizes.parameters - sizes.vocabulary * sizes.hidden)
    assert "folded" not in estimated(tmp_path, "mo-odpo").phases[1].parts
    from moalign.lm import adapters, log_probs

    assert (memory.FOLDS_BELOW, memory.AT_ONCE) == (adapters.MERGE_BELOW, log_probs.AT_ONCE)


@pytest.mark.slow
def test_the_peak_of_a_real_training_is_in_the_range(checkout: Path) -> None:
    """Ten million parameters, in a process of its own; results/bench/memory.md has three sizes and four phases."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process cannot be set back here")
    script = checkout / "results" / "bench" / "memory.py"
    command = [sys.executable, str(script), "--only", "10M/supervised"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=checkout)
    assert ended.returncode == 0, ended.stderr[-2000:]
    row = json.loads(ended.stdout.splitlines()[-1])
    assert row["least"] <= row["measured"] <= row["most"]


def test_every_member_of_an_ensemble_is_loaded(random_base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(random_base, tmp_path / "judges")
    shutil.copytree(random_base, folder / "member-1")
    spec = f"{{name: a, kind: hf-classifier, model: {folder}, members: all, label: a}}"
    plain = CARD.replace("objectives:\n", f"objectives:\n  - {spec}\n  - {spec.replace('a,', 'b,', 1)}\n")
    (tmp_path / "task.yaml").write_text(plain.replace("[0, 0]", "[0, 0, 0, 0]").replace("[-0.1, -0.1]", "[0, 0, 0, 0]"))
    models, _ = memory.reward_models(load.load_card(str(tmp_path / "task.yaml")))
    assert [spec.name for spec, _ in models if spec.model == str(folder)] == ["a", "a"]

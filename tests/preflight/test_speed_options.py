"""Memory and hours follow the options that make training faster."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moalign.config import load
from moalign.config.recipe import LoraSpec
from moalign.lm import adapters
from moalign.lm.architecture import Architecture
from moalign.lm.log_probs import token_outputs
from moalign.methods import registry
from moalign.preflight import cost, memory

HIDDEN, LAYERS, PROMPT, RESPONSE = 4096, 32, 128, 16
CARD = """\
name: tales
kind: text
description: short stories
model: meta-llama/Llama-2-7b-hf
dtype: bfloat16
objectives: [{name: words, kind: rule, rule: length}, {name: brief, kind: rule, rule: brevity}]
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
data: {prompts: [hello]}
generation: {max_prompt_tokens: 128, max_new_tokens: 16}
"""


def estimated(folder: Path, method: str, *overrides: str) -> tuple[dict[str, int], float]:
    """Return the bytes of an update by part, and the hours of training."""
    (folder / "task.yaml").write_text(CARD)
    (folder / f"{method}.yaml").write_text(f"method: {method}\ntask: ./task.yaml\nneeds: {{gpu: A100}}\n")
    able = registry.get(method).capabilities
    resolved = load.load_recipe(folder / f"{method}.yaml", method, None, overrides, registry.get(method).Config)
    sizes = memory.sizes_of(str(resolved.card.model))
    assert sizes is not None
    phases = memory.estimate(resolved, sizes, able).phases
    hours = cost.estimate(resolved, able, sizes).hours
    assert hours is not None
    return next(phase.parts for phase in phases if phase.name.endswith("update")), hours


def test_adapters_in_the_last_layers_take_their_share(tmp_path: Path) -> None:
    (whole, hours), (top, fewer) = (estimated(tmp_path, "mo-odpo", *more) for more in ((), ("policy.lora.layers=8",)))
    assert top["adapters"] == whole["adapters"] // 4
    assert top["activations"] == pytest.approx(whole["activations"] / 4)
    assert 0.4 < fewer / hours < 0.9  # sampling and the forward pass stay: of training 2 + 4 / 4 operations in 6


@pytest.mark.parametrize(("method", "together"), [("mo-odpo", 2), ("moc", 4)])
def test_a_prompt_counts_once_for_its_responses_and_their_copies_of_its_keys(
    tmp_path: Path, method: str, together: int
) -> None:
    changes = ("batch=32", "groups=8") if method == "moc" else ("batch=32",)
    given = (*changes, "samples=4", "micro_batch=8", "policy.lora.dropout=0")
    plain, shared = (estimated(tmp_path, method, *given, *more)[0] for more in ((), ("share_prompts=true",)))
    states = 8 * (PROMPT + RESPONSE) * (LAYERS + 1) * HIDDEN * 2 if method == "moc" else 0
    a_token = (plain["activations"] - states) / (8 * (PROMPT + RESPONSE))
    read = 8 // together * PROMPT + 8 * RESPONSE
    copies = 8 * PROMPT * 2 * HIDDEN * 2 * LAYERS
    assert shared["activations"] == pytest.approx(read * a_token + copies + states, rel=1e-6)
    assert shared["activations"] < plain["activations"]


def test_pairs_that_share_are_not_checkpointed(tmp_path: Path) -> None:
    plain, shared = (
        estimated(tmp_path, "dpo-lw", "batch=2", *more)[0]["activations"] for more in ((), ("share_prompts=true",))
    )
    assert shared > 5 * plain


def kept(layers: int, share: bool) -> int:
    """Bytes that autograd keeps of four pairs with prompts of 24 and responses of 13 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=80, num_hidden_layers=layers, num_attention_heads=4
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).requires_grad_(False)
    model = adapters.with_adapter(base, LoraSpec(r=4, alpha=8, dropout=0.0)).eval()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive: an address is not used twice
        return tensor

    prompts = torch.randint(0, 60, (4, 24)).repeat_interleave(2, 0)
    ids = torch.cat([prompts, torch.randint(0, 60, (8, 13))], dim=1)
    inside = torch.ones(8, 13, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_outputs(model, ids, torch.ones_like(ids), inside, share_prompts=share)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("share", [False, True])
def test_a_layer_keeps_what_autograd_keeps(share: bool) -> None:
    sizes = Architecture(1, 32, 80, 2, 32, 60)
    a_token = memory.layer_bytes(sizes, 4, LoraSpec(r=4, alpha=8, dropout=0.0), 1, autocast=False)
    read = 4 * 24 + 8 * 13 if share else 8 * 37
    expected = read * a_token + (8 * 24 * 2 * 32 * 4 if share else 0)
    assert expected == pytest.approx(kept(3, share) - kept(2, share), rel=0.02)

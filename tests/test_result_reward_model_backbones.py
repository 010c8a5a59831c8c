"""results/learned/reward_models.py: backbones that are grown or cut, and layers that are read once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "results" / "learned"
sys.path.insert(0, str(FOLDER))
import reward_models_frozen as frozen  # noqa: E402
import reward_models_training as training  # noqa: E402

sys.path.remove(str(FOLDER))

NAMES = {"part": "-", "backbone": "sandbox", "loss": "multitask", "pairs": 1000, "flipped": 0.0, "seed": 0}


@pytest.fixture(scope="session")
def three_layers(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, grown to three whose added ones do something, so that a cut shows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = training.resized(random_base, 3, tmp_path_factory.mktemp("grown") / "three")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.3)
    place = tmp_path_factory.mktemp("three")
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    return place


def logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        result: np.ndarray = AutoModelForCausalLM.from_pretrained(folder)(
            torch.tensor([[1, 9, 4, 7, 5]])
        ).logits.numpy()
    return result


def test_a_grown_model_computes_what_it_did(random_base: Path, tmp_path: Path) -> None:
    grown = training.resized(random_base, 4, tmp_path / "four")
    np.testing.assert_allclose(logits(grown), logits(random_base), atol=1e-6)
    before = training.parameters(random_base)
    per_layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert training.parameters(grown) == before + 3 * per_layer


def test_a_cut_model_is_the_first_layers_and_the_norm(three_layers: Path, tmp_path: Path) -> None:
    """A second implementation: the first layers' hidden state through the final norm and the head."""
    import torch
    from transformers import AutoModelForCausalLM

    cut = training.resized(three_layers, 2, tmp_path / "two")
    assert json.loads((cut / "config.json").read_text())["num_hidden_layers"] == 2
    whole = AutoModelForCausalLM.from_pretrained(three_layers)
    with torch.inference_mode():
        states = whole(torch.tensor([[1, 9, 4, 7, 5]]), output_hidden_states=True).hidden_states
        expected = whole.lm_head(whole.model.norm(states[2])).numpy()
    np.testing.assert_allclose(logits(cut), expected, atol=1e-5)
    assert np.abs(logits(three_layers) - expected).max() > 0.01
    assert training.resized(cut, 2, tmp_path / "none") == cut
    assert training.resized(three_layers, 2, cut) == cut  # made before


def test_another_base_has_another_backbone(random_base: Path, three_layers: Path, tmp_path: Path) -> None:
    one, other = (training.backbone_of({**NAMES, "layers": 2}, base, tmp_path) for base in (random_base, three_layers))
    assert one != other
    assert training.backbone_of({**NAMES, "layers": 2}, three_layers, tmp_path) == other


# -- frozen layers ---------------------------------------------------------------------------------------------------


def adapted(folder: Path) -> Any:
    """Return a classifier of three layers with an adapter on the last that is not 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = 0
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*\.layers\.(2)\..*_proj", init_lora_weights=False, task_type="SEQ_CLS")
    )
    return model.eval()


def test_frozen_layers_read_a_text_once_and_change_nothing(three_layers: Path, tmp_path: Path) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = adapted(three_layers)
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 0, 0], [9, 8, 7, 6, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    layers: list[int] = []
    hooks = [
        module.register_forward_hook(lambda module, *_: layers.append(module.self_attn.layer_idx))
        for module in model.modules()
        if isinstance(module, LlamaDecoderLayer)
    ]
    assert len(hooks) == 3

    def read(rows: slice, width: int) -> tuple[list[float], list[torch.Tensor]]:
        model.zero_grad()
        layers.clear()
        logits = model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width]).logits
        logits.sum().backward()
        return logits.flatten().tolist(), [
            value.grad.clone() for value in model.parameters() if value.requires_grad and value.grad is not None
        ]

    plain, gradients = read(slice(3), 5)
    assert layers == [0, 1, 2]
    with frozen.read_once(2, tmp_path):
        first, own = read(slice(3), 5)
        assert layers == [0, 1, 2] and len(list(tmp_path.glob("*.npy"))) == 3
        other, _ = read(slice(1, 3), 4)  # fewer rows, less padding: the same texts
        assert layers == [2]
    assert first == pytest.approx(plain, abs=1e-6) and other == pytest.approx(plain[1:], abs=1e-6)
    assert len(own) == len(gradients) > 10
    for mine, theirs in zip(own, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert read(slice(3), 5)[0] == plain and layers == [0, 1, 2], "afterwards all is as it was"


def test_frozen_layers_take_rows_padded_on_the_right_alone(three_layers: Path, tmp_path: Path) -> None:
    import torch

    ids, mask = torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]])
    with frozen.read_once(2, tmp_path), pytest.raises(ValueError, match="padded on the right"):
        adapted(three_layers)(input_ids=ids, attention_mask=mask)

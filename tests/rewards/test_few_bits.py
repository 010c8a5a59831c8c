"""Scorers of 4 and 8 bits: near the whole model, another identity, less memory, one message where it cannot be."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moalign.config.card import TaskCard
from moalign.config.objectives import ClassifierObjective, LmObjective
from moalign.config.recipe import PolicySpec
from moalign.lm import architecture, backends
from moalign.preflight import memory
from moalign.rewards.hf_classifier import ClassifierScorer
from moalign.rewards.lm_scorer import LmScorer
from moalign.tasks.sandbox import base

quantised = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (extra gpu)")
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1, "pad_token_id": 0,
}  # fmt: skip
PROMPTS = [f"{word} red green" for word in ("one", "two", "three", "four")]
RESPONSES = ["blue", "red red", "green blue blue", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers whose head has a bias (BERT's) and none (Llama's), and a language model."""
    import transformers as t

    tokenizer = base.make_tokenizer()
    common = {**SIZES, "vocab_size": len(tokenizer), "num_labels": 3}
    place = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in {
            "llama": t.LlamaForSequenceClassification(t.LlamaConfig(**common)),
            "bert": t.BertForSequenceClassification(t.BertConfig(**common)),
            "lm": t.LlamaForCausalLM(t.LlamaConfig(**common)),
        }.items():
            model.save_pretrained(place / name)
            tokenizer.save_pretrained(place / name)
    return place


def classifier(models: Path, name: str, **how: Any) -> ClassifierScorer:
    spec = ClassifierObjective(
        name="x", kind="hf-classifier", model=name, label=1, template="{prompt} {response}", **how
    )
    return ClassifierScorer(spec, models)


def rounded(bits: int, weight: torch.Tensor) -> torch.Tensor:
    """Return the numbers that a layer's weight stands for: of 8 bits each row in 127ths of its largest."""
    import bitsandbytes

    if bits == 4:
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return bitsandbytes.functional.dequantize_4bit(packed, state)
    unit = weight.abs().amax(1, keepdim=True) / 127
    return (weight / unit).round() * unit


@quantised
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-4), (8, 0.25)])  # 8: what comes in is rounded, too
def test_scores_are_those_of_the_rounded_weights_and_the_head_stays_whole(
    models: Path, name: str, bits: int, tolerance: float
) -> None:
    import bitsandbytes

    whole, few = classifier(models, name), classifier(models, name, **{f"load_in_{bits}bit": True})
    exact, near = (torch.tensor(scorer.score(PROMPTS, RESPONSES)) for scorer in (whole, few))
    kind = {4: bitsandbytes.nn.Linear4bit, 8: bitsandbytes.nn.Linear8bitLt}[bits]
    layers = [key for key, module in few._model.named_modules() if isinstance(module, kind)]
    assert len(layers) == {"llama": 14, "bert": 13}[name]  # 7 and 6 in each of two layers, and BERT's pooler
    assert type(few._model.get_submodule("score" if name == "llama" else "classifier")) is torch.nn.Linear
    for key in layers:
        layer = whole._model.get_submodule(key)
        layer.weight.data = rounded(bits, layer.weight.data)
    wanted = torch.tensor(whole.score(PROMPTS, RESPONSES))
    spread = float(exact.std())
    assert float((near - wanted).abs().max()) < tolerance * spread
    assert float((near - exact).abs().max()) > 1e-2 * spread, "the whole model was read"
    # Alone a text scores as it does among others, as near as the whole model's do.
    alone = [few.score([prompt], [response])[0] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    torch.testing.assert_close(torch.tensor(alone), near, rtol=2e-2, atol=2e-2)


@quantised
@pytest.mark.parametrize(("bits", "least"), [(4, 0.9), (8, 0.99)])
def test_likelihoods_of_few_bits_go_with_the_whole_models(models: Path, bits: int, least: float) -> None:
    def scores(**how: Any) -> torch.Tensor:
        spec = LmObjective(name="x", kind="lm", model="lm", score="fluency", **how)
        return torch.tensor(LmScorer(spec, models).score(PROMPTS[:3], RESPONSES[:3]))

    pair = torch.stack([scores(), scores(**{f"load_in_{bits}bit": True})])
    assert float(torch.corrcoef(pair)[0, 1]) > least and not pair[0].equal(pair[1])


def test_few_bits_are_another_identity_and_the_whole_model_keeps_its_own(models: Path) -> None:
    revisions = [
        classifier(models, "llama", **how).revision for how in ({}, *({f"load_in_{b}bit": True} for b in (4, 8)))
    ]
    assert len(set(revisions)) == 3
    spec = ClassifierObjective(name="x", kind="hf-classifier", model="m")
    assert not {"load_in_4bit", "load_in_8bit"} & set(spec.model_dump(exclude_defaults=True))
    readings = {
        ClassifierObjective(name="x", kind="hf-classifier", model="m", load_in_4bit=on).reading for on in (True, False)
    }
    assert len(readings) == 2, "one copy of the model would serve both"


def test_both_at_once_are_refused() -> None:
    with pytest.raises(ValidationError, match="load_in_4bit and load_in_8bit are both true; set one of them"):
        ClassifierObjective(name="x", kind="hf-classifier", model="m", load_in_4bit=True, load_in_8bit=True)


def card(**how: Any) -> TaskCard:
    rule = {"name": "a", "kind": "rule", "rule": "brevity"}
    few = {"name": "kind", "kind": "hf-classifier", "model": "owner/name", **how}
    return TaskCard.model_validate({
        "name": "tales", "kind": "text", "description": "", "model": "owner/name", "data": {"prompts": ["hello"]},
        "objectives": [rule, few], "gold_objectives": [few], "reference_point": [0, 0], "sensitivity_point": [0, 0],
    })  # fmt: skip


def test_without_the_package_each_objective_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    problems = backends.problems(PolicySpec(), card(load_in_8bit=True))
    assert len(problems) == 2, "the judge's, too"
    assert problems[0].startswith("objective 'kind': load_in_8bit: found true, but the package bitsandbytes is not")
    assert "bfloat16 takes 2 times as much" in problems[0]
    assert backends.problems(PolicySpec(), card()) == []
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    assert backends.problems(PolicySpec(), card(load_in_8bit=True)) == []


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_memory_model_counts_few_bits(models: Path, name: str) -> None:
    """By hand: 7 (6 and the pooler) matrices in each layer in .516 or 1 byte a number, all else in 4."""
    sizes = architecture.of_folder(models / name)
    assert sizes is not None
    inner = 2 * (4 * 64 * 64 + (3 if name == "llama" else 2) * 64 * 128)
    for how, byte in (({}, 4), ({"load_in_8bit": True}, 1), ({"load_in_4bit": True}, 0.5 + 1 / 64 + 4 / 64 / 256)):
        spec = ClassifierObjective(name="x", kind="hf-classifier", model="m", **how)
        wanted = inner * byte + (sizes.parameters - inner) * 4
        # BERT's pooler and heads are small change, counted on either side.
        assert memory._scorer(spec, sizes) == pytest.approx(wanted, abs=4 * (64 * 64 + 64 * 3))


def test_of_a_model_known_by_its_sizes_all_but_embeddings_are_taken_for_linear_layers() -> None:
    sizes = architecture.KNOWN["PKU-Alignment/beaver-7b-v1.0-reward"]
    half = ClassifierObjective(name="x", kind="hf-classifier", model="m", dtype="bfloat16")
    few = half.model_copy(update={"load_in_4bit": True})
    assert memory._scorer(half, sizes) == 2 * sizes.parameters
    embeddings = 32001 * 4096
    by_hand = (sizes.parameters - embeddings) * (0.5 + 1 / 64 + 4 / 64 / 256) + 2 * embeddings
    assert memory._scorer(few, sizes) == pytest.approx(by_hand, abs=1)

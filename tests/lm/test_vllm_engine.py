"""vLLM as sampler: versions of adapters, what it is asked, what it refuses. A stand-in answers; `make test-vllm` is real."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.config.recipe import LoraSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, vllm_engine
from moalign.lm.adapters import Adapter
from moalign.lm.language_model import LanguageModel
from moalign.lm.vllm_engine import Versions, VllmEngine

SPEC = LoraSpec(r=4, alpha=8, dropout=0.0)


def adapter(value: float) -> Adapter:
    weights = {"base_model.model.layer.lora_A.weight": torch.full((4, 3), value)}
    return Adapter(SPEC, {**weights, "base_model.model.layer.lora_B.weight": torch.full((5, 4), 2 * value)})


class StandIn:
    """Answers every prompt with the tokens 7, 8, 2; remembers what it was asked."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.asked, self.removed = settings, [], []
        self.llm_engine = types.SimpleNamespace(remove_lora=self.removed.append)

    def generate(self, prompts: list[Any], how: list[Any], lora_request: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked += zip(prompts, how, lora_request, strict=True)
        for request in lora_request:
            assert request is None or (Path(request.path) / "adapter_config.json").is_file()
        places = [{7: types.SimpleNamespace(logprob=-0.5)}, {8: types.SimpleNamespace(logprob=-1.0)}]
        output = types.SimpleNamespace(token_ids=[7, 8], logprobs=places, finish_reason="length")
        return [types.SimpleNamespace(outputs=[output]) for _ in prompts]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module vllm that holds what the engine imports."""
    vllm, lora, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    named: Any = vllm
    named.LLM, named.SamplingParams = StandIn, lambda **settings: types.SimpleNamespace(**settings)
    found: Any = request
    found.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, path=path)
    for name, module in {"vllm": vllm, "vllm.lora": lora, "vllm.lora.request": request}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: object())


def test_every_state_has_a_folder_of_its_own_and_the_same_state_is_one(tmp_path: Path) -> None:
    versions = Versions(tmp_path, "base")
    first, place = versions.publish(adapter(1.0))
    second, other = versions.publish(adapter(2.0))
    assert (first, second) == (1, 2) and place != other and place.is_dir() and other.is_dir()
    assert versions.publish(adapter(1.0)) == (first, place)
    assert versions.superseded(keep=1) == [1]
    versions.drop(1)
    assert not place.exists() and versions.superseded(keep=1) == []
    assert versions.publish(adapter(1.0))[0] == 3, "a number is never used twice: vLLM knows adapters by it"


def test_what_is_written_is_what_peft_reads(make_lm: Callable[..., LanguageModel], tmp_path: Path) -> None:
    lm = make_lm()
    adapters.attach(lm, SPEC, seed=0)
    own = Adapter(SPEC, {name: value + 0.1 for name, value in adapters.tensors(lm).items()})
    _, place = Versions(tmp_path, lm.source).publish(own)
    again = adapters.read(lm, place)
    assert again.spec == SPEC and again.weights.keys() == own.weights.keys()
    assert all(torch.equal(value, own.weights[name]) for name, value in again.weights.items())
    assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == lm.source


@pytest.mark.usefixtures("stand_in")
def test_one_call_mixes_adapters_and_the_base(tmp_path: Path) -> None:
    engine = VllmEngine("base", tmp_path, rank=4, max_tokens=32)
    one, two = engine.use(adapter(1.0)), engine.use(adapter(2.0))
    drawn = engine.sample([[1, 5], [1, 6], [1]], [11, 12, 13], [one, None, two], 8, [2], temperature=0.7)
    asked = engine.llm.asked
    assert [request and request.number for _, _, request in asked] == [1, None, 2]
    assert [text["prompt_token_ids"] for text, _, _ in asked] == [[1, 5], [1, 6], [1]]
    assert [how.seed for _, how, _ in asked] == [11, 12, 13]
    assert {(how.temperature, how.top_k, how.max_tokens) for _, how, _ in asked} == {(0.7, 0, 8)}
    assert (drawn[0].ids, drawn[0].logps, drawn[0].finished) == ([7, 8], [-0.5, -1.0], False)
    assert engine.llm.settings["max_lora_rank"] == 8 and engine.llm.settings["logprobs_mode"] == "processed_logprobs"


@pytest.mark.usefixtures("stand_in")
def test_an_old_state_is_unloaded_one_update_later(tmp_path: Path) -> None:
    """The state before stays: answers to it may still be on their way."""
    engine = VllmEngine("base", tmp_path, rank=4, max_tokens=32)
    for value in (1.0, 2.0):
        engine.use(adapter(value))
    assert engine.llm.removed == []
    engine.use(adapter(3.0))
    assert engine.llm.removed == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter-v2", "adapter-v3"]
    engine.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("stand_in")
def test_a_rank_that_it_does_not_serve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"up to rank 64; found policy\.lora\.r = 128"):
        VllmEngine("base", tmp_path, rank=128, max_tokens=32)


def test_without_vllm_one_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="vLLM is not installed"):
        VllmEngine("base", tmp_path, rank=4, max_tokens=32)

"""Sampling by vLLM, with a stand-in for it: what is asked of it, and what is made of its answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moalign.config.recipe import LoraSpec, RolloutSpec
from moalign.core.errors import RequestError
from moalign.lm import adapters, vllm_engine
from moalign.lm.generator import LazyGenerator, ModelGenerator
from moalign.lm.language_model import LanguageModel
from moalign.lm.sampler import Sampling
from moalign.lm.vllm_engine import VllmEngine

SPEC = LoraSpec(r=4, alpha=8, dropout=0.0)
LOGP = -6.0  # of every token, in vllm_stand_in.py


@pytest.fixture
def lm(make_lm: Callable[..., LanguageModel]) -> LanguageModel:
    made = make_lm()
    for seed, name in enumerate(("one", "two")):
        adapters.attach(made, SPEC, seed, name)
    return made


@pytest.fixture
def engine(vllm: list[Any]) -> Iterator[VllmEngine]:
    made = VllmEngine(RolloutSpec(engine="vllm"), lambda: Path("base"), "float32", rank=4, max_tokens=32)
    yield made
    made.close()


def folders(engine: VllmEngine) -> list[str]:
    return sorted(path.name for path in Path(engine._folder.name).iterdir())


def test_one_call_mixes_adapters_and_the_base(engine: VllmEngine, lm: LanguageModel, vllm: list[Any]) -> None:
    one, base, two = engine.serve(lm, ["one", None, "two"])
    engine.sample(lm, [[1, 5], [1, 6], [1]], [11, 12, 13], [one, base, two], 8, temperature=0.7, top_p=0.9)
    (llm,) = vllm
    (asked,) = llm.calls
    assert [request.adapter and request.adapter.number for request in asked] == [1, None, 2]
    assert [request.prompt for request in asked] == [[1, 5], [1, 6], [1]]
    assert [request.how.seed for request in asked] == [11, 12, 13]
    for request in asked:
        how = request.how
        assert (how.temperature, how.top_p, how.top_k, how.max_tokens) == (0.7, 0.9, 0, 8)
        assert how.ignore_eos and how.stop_token_ids == sorted(lm.end_ids), "the end token is one like any other"
    assert llm.settings["max_lora_rank"] == 8 and llm.settings["max_model_len"] == 32
    assert llm.settings["logprobs_mode"] == "processed_logprobs", "the temperature included"


def test_answers_are_aligned_as_the_samplers_are(engine: VllmEngine, lm: LanguageModel) -> None:
    """Prompts on the right of their columns, responses on the left; an end token belongs to its response."""
    prompts = [[1, 5, 9], [1], [1, 7]]
    drawn = engine.sample(lm, prompts, [0, 1, 2], [None] * 3, 6)
    width = drawn.response_mask.shape[1]
    for row, prompt in enumerate(prompts):
        read = drawn.attention_mask[row].bool()
        length = int(drawn.response_mask[row].sum())
        assert drawn.input_ids[row][read].tolist()[: len(prompt)] == prompt
        assert read.tolist() == [False] * (3 - len(prompt)) + [True] * (len(prompt) + length) + [False] * (
            width - length
        )
        assert drawn.input_ids[row][~read].eq(lm.pad).all()
        assert bool(drawn.finished[row]) == (int(drawn.input_ids[row][read][-1]) in lm.end_ids)
        assert drawn.logps[row].tolist() == [LOGP] * length + [0.0] * (width - length)
    assert len(set(drawn.finished.tolist())) == 2, "of both kinds"


def test_every_state_has_a_number_of_its_own_and_the_one_before_is_unloaded(
    engine: VllmEngine, lm: LanguageModel, vllm: list[Any]
) -> None:
    """vLLM knows adapters by their number and name: neither comes twice, though the adapter's name stays."""
    numbers = torch.tensor([[0.25, 0.5], [0.75, 0.5]], dtype=torch.float64)
    for _ in range(3):
        engine.rollout(lm, "one", [[1], [2]], numbers, 1.0)
    (llm,) = vllm
    asked = [[(request.adapter.number, request.adapter.name) for request in call] for call in llm.calls]
    assert asked == [[(n, f"adapter-v{n}")] * 2 for n in (1, 2, 3)]
    assert llm.removed == [1, 2] and folders(engine) == ["adapter-v3"]
    assert [request.how.seed for request in llm.calls[0]] == [2**51, 3 * 2**51], "a row's first number is its seed"
    assert {request.how.max_tokens for request in llm.calls[0]} == {2}


def test_what_is_written_is_the_adapter_as_it_is_now(engine: VllmEngine, lm: LanguageModel) -> None:
    moved = {name: value + 0.1 for name, value in adapters.tensors(lm, "one").items()}
    adapters.set_tensors(lm, moved, "one")
    engine.serve(lm, ["one"])
    place = Path(engine._folder.name) / "adapter-v1"
    again = adapters.read(lm, place)
    assert again.spec.r == 4 and again.spec.alpha == 8 and again.weights.keys() == moved.keys()
    assert all(torch.equal(value, moved[name]) for name, value in again.weights.items())
    assert json.loads((place / "adapter_config.json").read_text())["base_model_name_or_path"] == lm.source


def test_a_grid_of_adapters_that_take_turns_is_one_call(engine: VllmEngine, lm: LanguageModel, vllm: list[Any]) -> None:
    """Of a method with an adapter for each preference one is on the model at a time, and all are served at once."""
    cache: dict[str, Any] = {}
    kept = {name: adapters.tensors(lm, name) for name in ("one", "two")}
    adapters.drop(lm, "one")
    adapters.drop(lm, "two")

    def place(name: str) -> Callable[[], None]:
        return lambda: adapters.place(lm, adapters.Adapter(SPEC, kept[name]), name)

    generators = [LazyGenerator(lm, name, place(name), cache) for name in kept]
    requests = [[("how do i fix the roof today ?", 0), ("why ?", 1)], [("why ?", 1)], [("why ?", 1)]]
    moved: list[int] = []
    limits = Sampling(max_new_tokens=8, seed=3)
    made = vllm_engine.answers(engine, [*generators, ModelGenerator(lm)], requests, limits, moved.append)
    ((first, second, third, fourth),) = vllm[0].calls
    numbers = [request.adapter and request.adapter.number for request in (first, second, third, fourth)]
    assert numbers == [1, 1, 2, None] and moved == [4]
    assert second.how.seed == third.how.seed == fourth.how.seed != first.how.seed, "by the row, whoever answers"
    assert [len(part.responses) for part in made] == [2, 1, 1]
    for number, name in enumerate(kept, 1):
        written = adapters.read(lm, Path(engine._folder.name) / f"adapter-v{number}")
        assert all(torch.equal(value, kept[name][key]) for key, value in written.weights.items())
    traces = made[1].traces
    assert traces is not None and traces.logps == [LOGP * len(traces.ids[0])]
    assert made[1].responses == lm.decode([traces.ids[0]])
    assert sum(part.tokens for part in made) == sum(len(ids) for part in made for ids in part.traces.ids)  # type: ignore[union-attr]


def test_a_text_ends_at_its_first_stop_text(engine: VllmEngine, lm: LanguageModel) -> None:
    requests = [[("why ?", row) for row in range(6)]]
    (whole,) = vllm_engine.answers(engine, [ModelGenerator(lm)], requests, Sampling(max_new_tokens=8))
    word = next(text for text in whole.responses if len(text.split()) > 2).split()[1]
    (cut,) = vllm_engine.answers(engine, [ModelGenerator(lm)], requests, Sampling(max_new_tokens=8, stop=(word,)))
    assert cut.responses == [text.partition(word)[0].strip() for text in whole.responses]
    assert cut.responses != whole.responses and cut.tokens == whole.tokens


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"temperature": 0.0}])
def test_of_a_nucleus_no_log_probability_is_known(engine: VllmEngine, lm: LanguageModel, how: dict[str, float]) -> None:
    """vLLM's are those of the nucleus, and a policy's KL to base is one of whole distributions."""
    limits = Sampling(max_new_tokens=8, **how)  # type: ignore[arg-type]
    (made,) = vllm_engine.answers(engine, [ModelGenerator(lm)], [[("why ?", 0)]], limits)
    assert made.traces is not None and math.isnan(made.traces.logps[0])


def test_one_base_is_in_memory_and_comes_back_when_it_is_needed(
    engine: VllmEngine, lm: LanguageModel, vllm: list[Any]
) -> None:
    other = VllmEngine(RolloutSpec(engine="vllm"), lambda: Path("base"), "float32", rank=20, max_tokens=32)
    for each in (engine, other, engine):
        each.sample(lm, [[1]], [0], each.serve(lm, ["one"]), 4)
    assert [llm.running for llm in vllm] == [False, False, True]
    assert [llm.settings["max_lora_rank"] for llm in vllm] == [8, 32, 8]


def test_a_base_that_vllm_does_not_know_ends_in_one_message(lm: LanguageModel, vllm: list[Any]) -> None:
    engine = VllmEngine(RolloutSpec(engine="vllm"), lambda: Path("refused"), "float32", rank=4, max_tokens=32)
    with pytest.raises(RequestError) as refused:
        engine.sample(lm, [[1]], [0], [None], 4)
    assert str(refused.value) == (
        "rollout.engine: vllm does not serve refused (Model architectures ['Odd'] are not supported); take hf"
    )


def test_loading_it_leaves_the_random_numbers_alone(
    engine: VllmEngine, lm: LanguageModel, vllm: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM seeds torch's global generator; a run that is resumed loads it at another step."""
    import sys

    stand_in: Any = sys.modules["vllm"]
    make = stand_in.LLM.__init__
    monkeypatch.setattr(stand_in.LLM, "__init__", lambda self, **given: (torch.manual_seed(0), make(self, **given))[1])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    engine.sample(lm, [[1]], [0], [None], 4)
    assert torch.equal(torch.rand(3), expected)

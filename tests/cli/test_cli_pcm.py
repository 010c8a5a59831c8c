"""PCM as typed: what is wrong with experts, control model or request ends in one message, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moalign.config import find
from moalign.config.recipe import LoraSpec
from moalign.experiment.train import TrainRequest, plan, train
from moalign.lm import adapters
from moalign.methods import registry
from moalign.runs.run import Run

LORA = LoraSpec(r=4, alpha=8, dropout=0.0)
PROMPT = "how do i make soup ?"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def quick(small_task: tuple[str, ...]) -> tuple[str, ...]:
    """Settings with which pcm trains in a moment."""
    sets = {**registry.get("pcm").quick, "steps": 1, "policy.lora": LORA.model_dump(), "micro_batch": 4}
    return (*small_task, *(f"{key}={json.dumps(value)}" for key, value in sets.items()))


@pytest.fixture(scope="module")
def trained(quick: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(plan(TrainRequest("pcm", overrides=quick, results=tmp_path_factory.mktemp("pcm") / "results")))[0]


@pytest.fixture
def damaged(trained: Run, moalign: Any) -> Path:
    """The folder of a copy of the trained run, below the current folder, for a test to damage."""
    results = trained.path.parents[3]
    shutil.copytree(results, "results")
    folder = Path("results") / trained.path.relative_to(results)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "weights": {}}))  # as older versions wrote it
    return folder


@pytest.fixture
def whole(damaged: Path, trained: Run) -> Path:
    """The same with the sums of its weights in the record."""
    shutil.copy(trained.path / "run.json", damaged)
    return damaged


def sets(texts: tuple[str, ...]) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


def refused(ended: Any, *parts: str) -> None:
    """One message on stderr with all ``parts``, nothing on stdout, exit code 2."""
    assert ended.code == 2, ended.err
    assert ended.out == "" and "Traceback" not in ended.err
    (message,) = ended.errors
    for part in parts:
        assert part in message, message


def _gone(expert: Path, make_lm: Any) -> None:
    shutil.rmtree(expert)


def _without_weights(expert: Path, make_lm: Any) -> None:
    (expert / WEIGHTS).unlink()


def _cut(expert: Path, make_lm: Any) -> None:
    (expert / WEIGHTS).write_bytes((expert / WEIGHTS).read_bytes()[:-100])


def _no_json(expert: Path, make_lm: Any) -> None:
    (expert / "adapter_config.json").write_text("{")


def _other_base(expert: Path, make_lm: Any) -> None:
    lm = make_lm(seed=7)
    adapters.attach(lm, LORA, 0)
    adapters.save(lm, expert)


def _other_base_unnamed(expert: Path, make_lm: Any) -> None:
    """As other tools write it, without the fingerprint of its base."""
    _other_base(expert, make_lm)
    save_file(load_file(expert / WEIGHTS), expert / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_gone, "adapter_config.json is missing"),
        (_without_weights, f"{WEIGHTS} is missing"),
        (_cut, f"{WEIGHTS} is truncated or damaged"),
        (_no_json, "adapter_config.json is damaged"),
        (_other_base, "trained on a base with fingerprint"),
        (_other_base_unnamed, "does not fit the base"),
    ],
)
def test_an_expert_that_is_missing_damaged_or_of_another_base_is_refused(
    moalign: Any, damaged: Path, make_lm: Any, damage: Callable[[Path, Any], None], message: str
) -> None:
    damage(damaged / "adapter-expert-1", make_lm)
    commands = [("generate", str(damaged), PROMPT, "--prefs", "0.3,0.7"), ("eval", str(damaged))]
    for command in commands if damage is _gone else commands[:1]:
        refused(moalign(*command), message, *(() if damage is _other_base_unnamed else ("adapter-expert-1",)))


@pytest.mark.parametrize("name", ["control.safetensors", f"adapter-expert-1/{WEIGHTS}"])
def test_weights_that_training_did_not_write_are_refused(moalign: Any, whole: Path, name: str) -> None:
    """Damage inside the numbers, which the format cannot show: a byte of the last number of the file is another."""
    data = bytearray((whole / name).read_bytes())
    data[-2] ^= 1
    (whole / name).write_bytes(data)
    commands = (("generate", str(whole), PROMPT), ("eval", str(whole)), ("export", str(whole), "--out", "out"))
    for command in commands:
        ended = moalign(*command, "--prefs", "0.3,0.7")
        refused(ended, f"damaged: {whole / name}: its content is not what training wrote; delete {whole}")
        assert "train again: moalign train pcm --task sandbox " in ended.errors[0]
        assert "--results results" in ended.errors[0] and not Path("out").exists()


def test_a_run_that_was_moved_answers_as_before(moalign: Any, whole: Path) -> None:
    ask = ("--prefs", "0.3,0.7", "--json")
    before = json.loads(moalign("generate", str(whole), PROMPT, *ask).out)["answers"]
    shutil.move(whole, "elsewhere")
    ended = moalign("generate", "./elsewhere", PROMPT, *ask)
    assert ended.code == 0 and json.loads(ended.out)["answers"] == before
    (Path("elsewhere") / "control.safetensors").write_bytes(b"")
    refused(moalign("generate", "./elsewhere", PROMPT, *ask), "damaged: elsewhere/control.safetensors")


def test_a_control_model_of_another_number_of_experts_is_refused(moalign: Any, damaged: Path) -> None:
    file = damaged / "control.safetensors"
    save_file({**load_file(file), "head.weight": torch.zeros(3, 16), "head.bias": torch.zeros(3)}, file)
    ended = moalign("generate", str(damaged), PROMPT, "--prefs", "0.3,0.7")
    refused(ended, "control.safetensors: not the control model of 2", "head.weight is [3, 16], needed: [2, 16]")


def test_a_preference_without_an_expert_for_it_is_refused(moalign: Any, damaged: Path) -> None:
    for command in (("generate", str(damaged), PROMPT), ("eval", str(damaged))):
        refused(moalign(*command, "--prefs", "0.3,0.3,0.4"), "3 weights, but the task has 2 objectives")
        refused(moalign(*command, "--prefs-text", "be funny"), "it names no objective", "harmlessness, harmless, safe")


@pytest.mark.parametrize("method", ["pcm", "mod"])
def test_one_objective_alone_is_nothing_to_mix(moalign: Any, tmp_path: Path, method: str) -> None:
    card = tmp_path / "task.yaml"
    of_sandbox = find.find_card("sandbox").read_text()  # type: ignore[union-attr]
    second = "  - {name: harmlessness, kind: sandbox, called: [harmless, safe]}\n"
    assert second in of_sandbox
    card.write_text(of_sandbox.replace(second, "").replace("[0, 0]", "[0]").replace("[-0.1, -0.1]", "[-0.1]"))
    refused(moalign("train", method, "--task", str(card), "--no-eval"), "objectives", "at least 2")
    assert not Path("results").exists()


def test_a_control_model_with_another_tokenizer_is_refused_before_anything_is_trained(
    moalign: Any, quick: tuple[str, ...], random_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    other = shutil.copytree(random_base, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["extraordinary"])
    tokenizer.save_pretrained(other)
    of_folder = sets((*quick, f'control={{"form": "folder", "model": "{other}"}}'))
    ended = moalign("train", "pcm", "--no-eval", *of_folder)
    refused(ended, f"control.model {other}: its tokenizer is not the experts'")
    assert not list(Path("results").glob("runs/*/modpo"))


def test_a_control_model_that_is_not_there_is_a_problem_of_the_request(
    moalign: Any, quick: tuple[str, ...], random_base: Path, tmp_path: Path
) -> None:
    missing = sets(('control={"form": "folder", "model": "./gone"}',))
    message = "control.model: there is no model folder './gone'"
    refused(moalign("train", "pcm", "--no-eval", *sets(quick), *missing), message)
    assert not Path("results").exists()
    ended = moalign("check", "sandbox/pcm", *missing)
    assert ended.code == 2 and "control.model './gone': there is no such folder" in ended.err
    there = sets((f'control={{"form": "folder", "model": "{random_base}"}}',))
    assert "whole safetensors weights, content" in moalign("check", "sandbox/pcm", *there).out


@pytest.mark.parametrize("setting", ["control.lora.targets=[no_such_layer]", "control.lora.layers=99"])
def test_a_control_model_that_cannot_be_put_on_the_base_is_told_before_experts_are_trained(
    moalign: Any, setting: str
) -> None:
    ended = moalign("check", "sandbox/pcm", "--set", "control.form=adapter", "--set", setting, "--json")
    problems = json.loads(ended.out)["problems"]
    assert ended.code == 2 and any("control.lora" in problem for problem in problems), problems


def test_a_base_that_is_not_here_is_not_fetched_to_look_at_a_control_model(moalign: Any, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(200)))
    data = "task.data={prompts: {path: q.jsonl}}"
    ended = moalign("check", "hh-rlhf/pcm", "--set", "task.model=Qwen/Qwen2.5-1.5B-Instruct", "--set", data, "--json")
    problems = json.loads(ended.out)["problems"]
    assert any(text.startswith("model 'Qwen/Qwen2.5-1.5B-Instruct': not in the local hub cache") for text in problems)
    assert not any(text.startswith("task.model") for text in problems), "nobody else has looked for it"

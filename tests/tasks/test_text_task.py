"""Tasks on real text: prompts and responses from files, a pool sampled from the base, hashes by content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moalign.config.card import TaskCard
from moalign.data.records import Response
from moalign.errors import RequestError
from moalign.tasks.load import make_task
from moalign.tasks.sandbox import base, world
from moalign.tasks.task import shown
from moalign.tasks.text import TextTask

PROMPTS = world.prompts()[::20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = base.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_task(results: Path, model: Path | None, data: dict[str, Any], **more: Any) -> TextTask:
    told = {
        "name": "own", "kind": "text", "description": "a test", "model": None if model is None else str(model),
        "objectives": [
            {"name": "short", "kind": "rule", "rule": "brevity", "options": {"unit": "tokens"}},
            {"name": "varied", "kind": "rule", "rule": "regex-count", "options": {"pattern": "[aeiou]"}},
        ],
        "data": data, "splits": {"train": 0.6, "calibration": 0.2, "eval": 0.2},
        "pool": {"prompts": 6, "per_prompt": 2, "calibration_per_prompt": 8},
        "reference_point": [0, 0], "sensitivity_point": [-0.1, -0.1],
        "generation": {"max_new_tokens": 12}, **more,
    }  # fmt: skip
    task = make_task(TaskCard.model_validate(told), results)
    assert isinstance(task, TextTask)
    return task


def write_lines(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def test_a_task_without_a_model_says_how_to_give_one(tmp_path: Path) -> None:
    task = text_task(tmp_path, None, {"prompts": PROMPTS})
    with pytest.raises(RequestError, match="task own: it needs a model.*--set task.model=") as caught:
        _ = task.hash
    assert caught.value.exit_code == 2
    with pytest.raises(RequestError, match="it needs a model"):
        _ = task.language_model


def test_training_pool_is_sampled_once_from_the_base_and_kept(tmp_path: Path, model: Path) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    scored = task.scored()
    used = task.prompts["train"][:6]
    assert scored.prompts == [prompt for prompt in used for _ in range(2)]
    assert scored.raw.shape == (12, 2)
    assert [-len(response.text.split()) for response in scored.responses] == scored.raw[:, 0].tolist()
    assert scored.responses[0].text != scored.responses[1].text  # two draws, not one twice
    assert (task.folder / "samples.parquet").is_file()

    again = text_task(tmp_path, model, {"prompts": PROMPTS})
    again._sample_base = None  # type: ignore[assignment,method-assign]  # not asked for
    assert again.scored().responses == scored.responses
    other = text_task(tmp_path / "other", model, {"prompts": PROMPTS})
    assert other.scored().responses == scored.responses  # fixed by the card's seed


def test_normaliser_without_data_is_fitted_on_the_bases_own_responses(tmp_path: Path, model: Path) -> None:
    task = text_task(tmp_path, model, {"prompts": PROMPTS})
    assert task.normaliser.count == 8 * len(task.prompts["calibration"][:6])
    assert task.optimum([(0.5, 0.5)], task.eval_prompts) is None  # nobody knows it


def test_logged_responses_go_to_their_prompts_split(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": prompt, "response": "word " * (i % 5 + 1) + str(i)} for i, prompt in enumerate(PROMPTS)]
    source = write_lines(tmp_path / "responses.jsonl", rows)
    task = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source})
    scored = task.scored()
    told = {row["prompt"]: row["response"] for row in rows}
    assert scored.prompts == task.prompts["train"]
    assert scored.responses == [Response(told[prompt]) for prompt in scored.prompts]
    assert "language_model" not in vars(task)  # the data was enough
    calibration = task.prompts["calibration"]
    assert task.normaliser.count == 8 * len(calibration[:6]) + len(calibration)


def test_hash_follows_model_and_data_by_content(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    first = text_task(tmp_path, model, {"prompts": source})
    assert first.prompts.keys() == {"train", "calibration", "eval"}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = write_lines(moved / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    assert text_task(tmp_path, model, {"prompts": copy}).hash == first.hash
    longer = write_lines(moved / "prompts.jsonl", [{"prompt": prompt} for prompt in [*PROMPTS, "one more"]])
    assert text_task(tmp_path, model, {"prompts": longer}).hash != first.hash


def test_stop_text_and_marker_reach_the_policy(tmp_path: Path, model: Path) -> None:
    plain = text_task(tmp_path, model, {"prompts": PROMPTS}, template={"marker": " ?"})
    assert plain.renderer.plain("make soup") == "make soup ?"
    assert plain.renderer.preference("x", (0.25, 0.75)) == "[short 25.0% varied 75.0%] x ?"
    free = shown(plain.scored().responses)
    word = next(text.split()[0] for text in free if len(text.split()) > 1)
    stopped = text_task(tmp_path, model, {"prompts": PROMPTS}, template={"marker": " ?", "stop": [word]})
    assert stopped.hash != plain.hash
    assert shown(stopped.scored().responses) == [text.split(word)[0].strip() if word in text else text for text in free]


def test_empty_response_file_and_broken_line_are_named(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "responses.jsonl", [{"prompt": PROMPTS[0], "response": "x"}])
    with (tmp_path / "responses.jsonl").open("a") as file:
        file.write("{broken\n")
    task = text_task(tmp_path, model, {"prompts": PROMPTS, "responses": source})
    with pytest.raises(RequestError, match=r"responses\.jsonl:2"):
        task.scored()

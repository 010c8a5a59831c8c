"""Models that think before they answer, as typed: no text is trained inside a thought, and what is sampled is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

THINKER = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ '<think></think>' if m['role'] == 'assistant' else '' }}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}{% endif %}"
)
"""Opens a thought behind every prompt, which its past replies have empty, as Nemotron 3 does."""
CARD = """\
name: own
kind: text
description: a test
model: ../thinker
objectives:
  - {name: brevity, kind: rule, rule: brevity}
  - {name: detail, kind: rule, rule: length}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
data:
  prompts: {path: prompts.jsonl}
splits: {train: 0.5, calibration: 0.25, eval: 0.25}
generation: {max_new_tokens: 4}
template: {chat: true}
"""
RESPONSES = "task.data.responses={path: own/responses.jsonl}"
PAIRS = "task.data.pairs={brevity: {path: own/pairs.jsonl}, detail: {path: own/pairs.jsonl}}"
OFF = "task.template.chat_kwargs={enable_thinking: false}"
CLOSED = 'task.template.marker="</think>"'
SWITCH = "template.chat_kwargs: {enable_thinking: false} switches that off"
STEPS = ["steps=2", "batch=4"]
SCALE = "task.normaliser={brevity: {mean: 0, sd: 1, lo: -1, hi: 1}, detail: {mean: 0, sd: 1, lo: -1, hi: 1}}"


@pytest.fixture
def check(moalign: Any, tmp_path: Path, chat_folder: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    """``check("sft", *settings)``: what ``moalign check --json`` tells of a recipe on a model that thinks."""
    model = shutil.copytree(chat_folder("chatml"), tmp_path / "thinker")
    (model / "chat_template.jinja").write_text(THINKER)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "task.yaml").write_text(CARD)
    answers = [{"prompt": f"Story {i} is about", "response": f"a cat{' that sat' * (i % 5)}."} for i in range(40)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "a dog"} for row in answers]
    for name, rows in (("prompts", answers), ("responses", answers), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(method: str, *settings: str) -> dict[str, Any]:
        (folder / "own.yaml").write_text(f"method: {method}\ntask: ./task.yaml\n")
        ended = moalign("check", "own/own.yaml", "--json", *(part for text in settings for part in ("--set", text)))
        found: dict[str, Any] = json.loads(ended.out)
        return found

    return run


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sft", [*STEPS, RESPONSES]),
        ("grpo", [RESPONSES, "warm_start=hindsight", "distil.steps=2"]),
        ("modpo", [PAIRS]),
        ("dpo-soups", [PAIRS]),
    ],
)
def test_texts_that_would_be_trained_inside_a_thought_are_a_problem(
    check: Callable[..., dict[str, Any]], method: str, settings: list[str]
) -> None:
    (problem,) = check(method, *settings)["problems"]
    assert "ends a prompt inside a thought ('<think>\\n'), in which a response given as text would be" in problem
    assert SWITCH in problem
    for remedy in (OFF, CLOSED):
        found = check(method, *settings, remedy)
        assert not found["problems"] and not any(text.startswith("template: ") for text in found["notes"])


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("sft", STEPS),
        ("grpo", [RESPONSES]),
        ("pd-morl", [RESPONSES, "directions=data"]),
        ("modpo", [PAIRS, "pairs=scored"]),
        ("dpo-soups", [PAIRS, "experts.pairs=scored"]),
        ("best-of-n", [RESPONSES]),
    ],
)
def test_thoughts_in_sampled_answers_are_a_note(
    check: Callable[..., dict[str, Any]], method: str, settings: list[str]
) -> None:
    found = check(method, *settings)
    assert not found["problems"]
    (note,) = (text for text in found["notes"] if text.startswith("template: "))
    assert "a thought that is sampled there is scored with the answer" in note and SWITCH in note


def test_train_refuses_a_text_inside_a_thought_and_leaves_no_run(check: Any, moalign: Any) -> None:
    check("sft")
    settings = [*STEPS, RESPONSES, SCALE]
    given = [part for text in settings for part in ("--set", text)]
    ended = moalign("train", "sft", "--recipe", "own/own.yaml", "--no-eval", *given)
    assert ended.code == 2 and "inside a thought" in ended.err and SWITCH in ended.err
    assert not list(Path("results").glob("runs/*/*/*"))


def test_preview_tells_it(check: Any, moalign: Any) -> None:
    asked = ("preview", "--task", "own", "--json", "Story 1 is about")
    shown = json.loads(moalign(*asked).out)
    assert shown["text"].endswith("<|im_start|>assistant\n<think>\n")
    assert shown["row"]["ids"] == shown["ids"], "no row can be made of the stand-in"
    assert "is scored with the answer" in shown["notes"][0] and "would be trained" in shown["notes"][1]
    for given in (("--response", "Soup."), ("--set", RESPONSES)):
        refused = moalign(*asked, *given)
        assert refused.code == 2 and SWITCH in refused.err
    off = json.loads(moalign(*asked, "--set", RESPONSES, "--set", OFF).out)
    assert off["text"].endswith("<think></think>") and off["notes"] == []
    assert 0 < sum(off["row"]["loss"]) == len(off["row"]["ids"]) - len(off["ids"])

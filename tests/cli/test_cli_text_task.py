"""A text task on a tiny random model as typed: preferences in words, and prompts that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = {"short": "Be brief.", "varied": "Tell me all about it."}
CARD = """\
name: own
kind: text
description: a test
model: {model}
objectives:
  - {{name: short, kind: rule, rule: brevity, options: {{unit: tokens}}}}
  - {{name: varied, kind: rule, rule: regex-count, options: {{pattern: "[aeiou]"}}}}
data:
  prompts: {{path: prompts.jsonl}}
splits: {{train: 0.5, calibration: 0.25, eval: 0.25}}
pool: {{prompts: 4, per_prompt: 2, calibration_per_prompt: 4}}
grid: 2
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
template:
  words:
    short: [{{up_to: 0.5, text: Tell me all about it.}}, {{up_to: 1, text: Be brief.}}]
generation: {{max_prompt_tokens: 60, max_new_tokens: 8}}
evaluation: {{prompts: 4, samples: 1, bootstrap: 100}}
"""
LONG = "how do i make soup ? " * 30


@pytest.fixture
def card(moalign: Any) -> Path:
    """A card for a tiny random model; two of its forty prompts are longer than the limit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moalign.tasks.sandbox import base, world

    tokenizer = base.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("base")
    tokenizer.save_pretrained("base")
    folder = Path("own")
    folder.mkdir()
    (folder / "task.yaml").write_text(CARD.format(model=Path("base").resolve()))
    prompts = [*world.prompts()[:38], LONG + "why ?", LONG + "how ?"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return folder / "task.yaml"


def test_preferences_in_words_are_asked_in_one_pass_and_told(
    moalign: Any, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moalign.lm.generator import ModelGenerator

    run = json.loads(moalign("train", "prompting", "--task", str(card), "--no-eval", "--json").out)["run"]
    passes: list[list[str]] = []
    generate = ModelGenerator.generate
    monkeypatch.setattr(
        ModelGenerator, "generate", lambda self, texts, *rest: passes.append(texts) or generate(self, texts, *rest)
    )
    both = ("--prefs", "1,0", "--prefs", "0.25,0.75")
    out = moalign("generate", run, "how do i make soup ?", *both).out
    assert [sorted(texts) for texts in passes] == [
        sorted(f"[{words}] how do i make soup ?" for words in WORDS.values())
    ]
    content = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("asked ")]
    assert content == [WORDS["short"], WORDS["varied"]]
    # A method that reads no preference was not asked in these words.
    run = json.loads(moalign("train", "best-of-n", "--task", str(card), "--no-eval", "--json").out)["run"]
    assert "asked " not in moalign("generate", run, "how do i make soup ?", *both).out


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_prompts_too_long_are_told_by_train_eval_and_the_record(moalign: Any, card: Path, overlong: str) -> None:
    requested = ("train", "prompting", "--task", str(card), "--set", f"task.overlong={overlong}")
    ended = moalign(*requested)
    shown = "2 of 40 cut to" if overlong == "cut" else "2 of 40 dropped: longer than generation.max_prompt_tokens"
    assert f"prompts           {shown}" in ended.out
    content = json.loads(moalign(*requested, "--json").out)
    result = content["evaluation"]["overlong"]
    assert result["prompts"] == 40
    assert result["cut" if overlong == "cut" else "dropped"] == 2
    if overlong == "cut":
        assert result["cut_tokens"] > 2 * 120  # 30 times six tokens, of which the limit leaves less than 60
    record = json.loads((Path(content["run"]) / "run.json").read_text())
    assert record["notes"]["overlong"] == result
    assert shown in moalign("eval", content["run"]).out


def test_a_prompt_too_long_to_be_read_whole_is_told_by_generate(moalign: Any, card: Path) -> None:
    run = json.loads(moalign("train", "prompting", "--task", str(card), "--no-eval", "--json").out)["run"]
    ended = moalign("generate", run, "--prefs", "1,0", "--prefs", "0,1", LONG + "why ?", "--json")
    for (answer,) in json.loads(ended.out)["answers"]:
        assert answer["cut_tokens"] > 120
    assert ended.err.count("note: prompt 1: its first ") == 1
    ended = moalign("generate", run, "--prefs", "1,0", "how do i make soup ?", "--json")
    assert json.loads(ended.out)["answers"][0]["cut_tokens"] == 0 and "note:" not in ended.err


def test_where_nothing_is_too_long_nothing_is_said(moalign: Any, card: Path) -> None:
    requested = ("train", "prompting", "--task", str(card), "--set", "task.generation.max_prompt_tokens=400")
    ended = moalign(*requested)
    assert ended.code == 0
    assert "overlong" not in ended.out and "\nprompts " not in ended.out
    content = json.loads(moalign(*requested, "--json").out)
    assert "overlong" not in content["notes"] and "overlong" not in content["evaluation"]

"""``moalign preview`` as typed: the ids are the tokenizer's own, and everything that matters is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

CHATS = ["llama3", "gemma", "chatml", "mistral", "phi"]
QUESTION = "What should I cook tonight?"
LONG = " ".join(f"Question {number}: what should I cook?" for number in range(60))
CARD = """\
name: own
kind: text
description: a test
model: {model}
objectives:
  - {{name: brevity, kind: rule, rule: brevity}}
  - {{name: detail, kind: rule, rule: length}}
reference_point: [0, 0]
sensitivity_point: [-0.1, -0.1]
data:
  prompts: ["What should I cook tonight?", "How do I learn the guitar?"]
{data}generation: {{max_prompt_tokens: {limit}}}
template:
  chat: {chat}
{template}"""

Folder = Callable[[str], Path]
Preview = Callable[..., dict[str, Any]]


@pytest.fixture
def card(chat_folder: Folder, moalign: Any) -> Callable[..., Path]:
    """``card("gemma")``: the folder of a card for a family's model."""

    def made(name: str, chat: bool = True, limit: int = 150, data: str = "", template: str = "") -> Path:
        folder = Path("own")
        folder.mkdir(exist_ok=True)
        content = {"chat": str(chat).lower(), "limit": limit, "data": data, "template": template}
        (folder / "task.yaml").write_text(CARD.format(model=chat_folder(name), **content))
        return folder

    return made


@pytest.fixture
def preview(moalign: Any) -> Preview:
    """``preview("--task", "own")``: what ``--json`` tells."""

    def run(*arguments: str) -> dict[str, Any]:
        ended = moalign("preview", "--json", *arguments)
        assert ended.code == 0, ended.err
        content: dict[str, Any] = json.loads(ended.out)
        return content

    return run


def own_ids(folder: Path, *turns: tuple[str, str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [{"role": role, "content": text} for role, text in turns]
    ids: list[int] = tokenizer.apply_chat_template(
        content, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_the_tokenizer_s_own(card: Any, preview: Preview, chat_folder: Folder, name: str) -> None:
    card(name)
    folder = chat_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = preview("--task", "own", QUESTION)
    assert plain["ids"] == own_ids(folder, ("user", QUESTION))
    assert plain["text"] == tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert plain["tokens"] == tokenizer.convert_ids_to_tokens(plain["ids"])
    assert (plain["cut_tokens"], plain["prefs"]) == (0, None)
    requested = preview("--task", "own/task.yaml", "--prefs", "0.3,0.7", QUESTION)
    assert requested["ids"] == own_ids(folder, ("user", f"[brevity 30.0% detail 70.0%] {QUESTION}"))


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "phi"])
def test_with_a_system_prompt(card: Any, preview: Preview, chat_folder: Folder, name: str) -> None:
    card(name, template="  system: You are terse.\n")
    ids = preview("--task", "own", QUESTION)["ids"]
    assert ids == own_ids(chat_folder(name), ("system", "You are terse."), ("user", QUESTION))


@pytest.mark.parametrize("name", CHATS)
def test_an_overlong_prompt_loses_its_own_beginning(
    card: Any, preview: Preview, chat_folder: Folder, moalign: Any, name: str
) -> None:
    card(name)
    result = [preview("--task", "own", "--prefs", prefs, LONG) for prefs in ("1,0", "0,1")]
    for content, words in zip(result, ("[brevity 100.0% detail 0.0%] ", "[brevity 0.0% detail 100.0%] "), strict=True):
        assert len(content["ids"]) <= 150
        assert LONG.endswith(content["kept"]) and 0 < len(content["kept"]) < len(LONG)
        assert content["ids"] == own_ids(chat_folder(name), ("user", words + content["kept"]))
        assert content["cut_tokens"] > 0
    assert result[0]["ids"] != result[1]["ids"]
    out = moalign("preview", "--task", "own", LONG).out
    assert "tokens of the prompt, so that 150 hold it; read from:" in out


def test_a_prompt_that_the_card_drops_is_told(card: Any, moalign: Any) -> None:
    card("gemma", template="overlong: drop\n")
    out = moalign("preview", "--task", "own", LONG).out
    assert "the card leaves such prompts out (overlong: drop)" in out


@pytest.mark.parametrize("name", CHATS)
def test_the_row_ends_with_the_turn_s_end_and_its_loss_counts(
    card: Any, preview: Preview, chat_folder: Folder, chat_families: Any, name: str
) -> None:
    card(name)
    content = preview("--task", "own", "--response", "Soup.", QUESTION)
    family, tokenizer = chat_families[name], AutoTokenizer.from_pretrained(chat_folder(name))
    row, loss, size = content["row"]["ids"], content["row"]["loss"], len(content["ids"])
    assert row[:size] == content["ids"]
    assert loss == [0] * size + [1] * (len(row) - size)
    assert row[-1] == tokenizer.convert_tokens_to_ids(family.turn_end)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Soup."}]
    whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert whole[: len(row)] == row
    wanted = {family.eos, family.turn_end, *family.generation_ends}
    assert content["stop"] == {"ids": sorted(tokenizer.convert_tokens_to_ids(sorted(wanted))), "texts": []}


def test_a_plain_prompt_shows_the_begin_token_that_the_tokenizer_puts_before_it(
    card: Any, preview: Preview, chat_folder: Folder
) -> None:
    card("llama3", chat=False, template='  marker: "\\nAnswer:"\n  stop: ["\\nHuman:"]\n')
    content = preview("--task", "own", QUESTION)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder("llama3"))
    assert content["text"] == f"<|begin_of_text|>{QUESTION}\nAnswer:"
    assert content["ids"] == tokenizer(f"{QUESTION}\nAnswer:")["input_ids"]
    assert content["stop"]["texts"] == ["\nHuman:"]


def test_the_response_is_the_data_s_own_where_it_has_one(card: Any, preview: Preview) -> None:
    folder = card("chatml", data="  responses: {path: answers.jsonl}\n")
    rows = [("Why?", "No."), ("How do I learn the guitar?", "Daily."), (QUESTION, "Soup, of course")]
    text = "".join(
        json.dumps({"prompt": prompt, "response": answer, "finished": "S" not in answer}) + "\n"
        for prompt, answer in rows
    )
    (folder / "answers.jsonl").write_text(text)
    content = preview("--task", "own")  # the task's first prompt
    assert (content["prompt"], content["response"], content["response_from"]) == (QUESTION, "Soup, of course", "data")
    ended = preview("--task", "own", "How do I learn the guitar?")
    assert ended["response"] == "Daily."
    # An answer that was cut off has no end to learn.
    assert ended["row"]["ids"][-1] in ended["stop"]["ids"]
    assert content["row"]["ids"][-1] not in content["stop"]["ids"]
    assert preview("--task", "own", "What else?")["response_from"] == "stand-in"


def test_pairs_give_the_preferred_reply(card: Any, preview: Preview) -> None:
    folder = card("chatml", data="  pairs: {detail: {path: pairs.jsonl}}\n")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": QUESTION, "chosen": "Soup.", "rejected": "No."}) + "\n")
    content = preview("--task", "own")
    assert (content["response"], content["response_from"]) == ("Soup.", "data")


def test_people_see_special_tokens_and_no_control_characters(card: Any, moalign: Any) -> None:
    card("chatml")
    ended = moalign("preview", "--task", "own", "Why\x1b[2J\u202e not 猫?", "--prefs", "0.5,0.5")
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out and "\u202e" not in ended.out
    assert "Why\\x1b[2J\\u202e not 猫?" in ended.out
    assert "brevity 0.5, detail 0.5" in ended.out
    assert "[[<|im_start|>]]" in ended.out and "[[<|im_end|>]] <\n" in ended.out
    assert "a stand-in" in ended.out


def test_the_sandbox_needs_no_base_and_nothing_is_written(moalign: Any, preview: Preview, tmp_path: Path) -> None:
    from moalign.tasks.sandbox import base

    content = preview("--prefs", "0.3,0.7")
    assert content["task"] == "sandbox" and content["response_from"] == "data"
    tokenizer = base.make_tokenizer()
    text = f"[helpfulness 30.0% harmlessness 70.0%] {content['prompt']}"
    assert content["ids"] == tokenizer(text)["input_ids"]
    assert content["text"] == tokenizer.bos_token + text
    assert content["row"]["ids"][-1] == tokenizer.eos_token_id
    assert list(tmp_path.iterdir()) == []


def test_no_weights_are_read(card: Any, preview: Preview, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    card("phi")
    assert preview("--task", "own")["prompt"] == QUESTION


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "owm"], "unknown task 'owm'"),
        (["--prefs", "3,7"], "did you mean --prefs 0.3,0.7?"),
        (["--prefs", "1"], "1 weight, but the task has 2 objectives"),
        ([" "], "PROMPT: found an empty text"),
        (["--response", ""], "--response: found an empty text"),
        (["--set", "task.template.chatt=true"], "did you mean 'chat'?"),
        (["--set", "task.generation.max_prompt_tokens=8"], "8 tokens do not hold what the template writes"),
        (["--set", "task.model=null"], "it needs a model"),
    ],
)
def test_bad_requests(card: Any, moalign: Any, arguments: list[str], message: str) -> None:
    card("gemma")
    ended = moalign("preview", *([] if "--task" in arguments else ["--task", "own"]), *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.errors[0]


@pytest.mark.slow
def test_the_real_model(smollm2: Path, moalign: Any, preview: Preview) -> None:
    assert moalign("init", "own").code == 0
    content = preview("--task", "own", "--prefs", "0,1", "How do I bake bread?")
    requested = "How do I bake bread? Answer in one long sentence with many details."
    assert content["ids"] == own_ids(smollm2, ("user", requested))
    assert "Answer in one long sentence" in content["text"] and content["text"].endswith("<|im_start|>assistant\n")

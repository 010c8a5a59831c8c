"""Chat templates that let a model think, or write to channels: rows are the template's own, or refused."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moalign.config.card import TemplateSpec
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.lm.chat import Codec, training_row

SHIPPED = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
"""Chat templates of models in use, which trl has with it."""
OFF = {"enable_thinking": False}
QUESTION = "What should I cook tonight?"


def text_of(codec: Codec, ids: list[int]) -> str:
    return str(codec.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def shipped(name: str, **template: Any) -> Codec:
    """The codec of a shipped chat template and a tokenizer of single bytes, which has its tags as the models do."""
    text = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={byte: at for at, byte in enumerate(sorted(alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=sorted(set(re.findall(r"<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_turn>", text))),
    )
    made.add_tokens([AddedToken(part, special=False) for part in ("<think>", "</think>", "\n\n")])
    made.chat_template = text
    return Codec(made, TemplateSpec(chat=True, **template), source=name)


def row_and_own(codec: Codec, reply: str) -> tuple[list[int], list[int]]:
    """A training row without what ends it, and what the template itself writes, as far as the row goes."""
    prompt = codec.turns(QUESTION) + codec.template.marker
    head, tail = training_row(codec, prompt, Response(reply, finished=False), 4096)
    own = codec.tokenizer(codec.turns(QUESTION, reply), add_special_tokens=False)["input_ids"]
    return head + tail, own[: len(head + tail)]


PLAIN = ["llama3", "llama3_2", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "cohere", "lfm2"]


@pytest.mark.parametrize("name", PLAIN)
def test_a_template_without_thoughts_is_read_as_ever(name: str) -> None:
    codec = shipped(name)
    row, own = row_and_own(codec, "Soup, with salt.")
    assert row == own and text_of(codec, row).endswith("Soup, with salt.")
    assert codec.caution is None


@pytest.mark.parametrize(
    ("name", "gap"),
    [
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("glm4moe", "\n<think></think>\n"),
        ("gptoss", "<|channel|>final<|message|>"),
        ("muse_glimmer", " to=user<|message|>"),
    ],
)
def test_what_a_template_writes_before_a_reply_belongs_to_the_row(name: str, gap: str) -> None:
    codec = shipped(name)
    row, own = row_and_own(codec, "Soup, with salt.")
    assert row == own and text_of(codec, row).endswith(f"{gap}Soup, with salt.")
    assert codec.prompt_ids([codec.turns(QUESTION)])[0] == row[: -len(codec._plain_ids([f"{gap}Soup, with salt."])[0])]
    assert codec.caution is not None and repr(gap) in codec.caution


@pytest.mark.parametrize(
    ("name", "gap"), [("qwen3", "<think>\n\n</think>\n\n"), ("gptoss", "<|channel|>final<|message|>")]
)
def test_scorers_read_a_sampled_answer_without_what_the_template_writes_before_it(name: str, gap: str) -> None:
    codec = shipped(name)
    ids = codec.tokenizer(f"{gap}Soup, with salt.", add_special_tokens=False)["input_ids"]
    assert codec.decode([[*ids, *codec.ends.row], ids[-5:]]) == ["Soup, with salt.", "salt."]
    assert "".join(codec.decode([ids[:count] for count in range(len(ids) - len("Soup, with salt."))])) == ""
    thought = codec.tokenizer("<think>Salt it.</think>Soup.", add_special_tokens=False)["input_ids"]
    assert codec.decode([thought]) == ["<think>Salt it.</think>Soup."]


def test_a_thought_of_a_response_s_own_stands_where_the_template_puts_it() -> None:
    codec = shipped("qwen3")
    row, own = row_and_own(codec, "<think>\nSalt it.\n</think>\n\nSoup.")
    assert row == own
    assert text_of(codec, row).endswith("assistant\n<think>\nSalt it.\n</think>\n\nSoup.")
    assert codec.decode([row[-40:]])[0].endswith("Salt it.\n</think>\n\nSoup.")


THINKING = ["qwen3_5_think", "qwen3_6", "nemotron_3_nano", "nemotron_3_super", "deepseek_r1_distill", "deepseekv3"]


@pytest.mark.parametrize("name", THINKING)
def test_no_text_is_trained_inside_a_thought_that_the_prompt_opens(name: str) -> None:
    codec = shipped(name)
    wanted = r"template\.marker: \"</think>\\n\\n\""
    if "enable_thinking" in codec.tokenizer.chat_template:
        wanted = r"template\.chat_kwargs: {enable_thinking: false}"
    with pytest.raises(RequestError, match=rf"chat template of {name} .*'<think>\\n'.* {wanted}"):
        training_row(codec, codec.turns(QUESTION), Response("Soup."), 4096)
    assert codec.caution is not None and re.search(wanted, codec.caution)
    sampled = Response("x", tuple(codec._plain_ids(["Salt it."])[0]), finished=False)
    assert training_row(codec, codec.turns(QUESTION), sampled, 4096)[1] == list(sampled.ids or ())
    for text in ("Salt it.\n</think>\n\nSoup.", "<think>\nSalt it.\n</think>\n\nSoup."):
        _, tail = training_row(codec, codec.turns(QUESTION), Response(text, finished=False), 4096)
        assert re.fullmatch(r"Salt it\.\n?</think>\n*Soup\.", text_of(codec, tail))


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "qwen3_6", "nemotron_3_nano", "nemotron_3_super", "glm4moe"]
)
def test_with_thinking_switched_off_rows_are_the_template_s_own(name: str) -> None:
    codec = shipped(name, chat_kwargs=OFF)
    row, own = row_and_own(codec, "Soup, with salt.")
    assert row == own and codec.caution is None


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("gptoss", "<|channel|>final<|message|>"),
        ("qwen3_5_think", "\n</think>\n\n"),
        ("muse_glimmer", " to=user<|message|>"),
    ],
)
def test_a_marker_may_write_the_opening_of_a_reply_into_the_prompt(name: str, marker: str) -> None:
    codec = shipped(name, marker=marker)
    row, own = row_and_own(codec, "Soup.")
    assert row == own and codec.caution is None
    assert text_of(codec, codec.response_ids(codec.turns(QUESTION) + marker, Response("Soup."))).startswith("Soup.")


def test_a_marker_may_close_the_thought() -> None:
    codec = shipped("deepseek_r1_distill", marker="</think>\n\n")
    head, tail = training_row(codec, codec.turns(QUESTION) + codec.template.marker, Response("Soup."), 4096)
    assert text_of(codec, head + tail).endswith("<think>\n</think>\n\nSoup.<｜end▁of▁sentence｜>")
    assert codec.caution is None


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_template_that_leaves_a_turn_s_text_out_is_refused(name: str) -> None:
    codec = shipped(name)
    with pytest.raises(RequestError, match=f"the chat template of {name} leaves out the text of a reply"):
        _ = codec.ends
    assert Codec(codec.tokenizer, TemplateSpec()).ends.row == (codec.tokenizer.eos_token_id,)

"""From text to tokens: exactly the tokenizer's own ids, a prompt cut in the right place, and the right ends."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from moalign.config.card import TemplateSpec
from moalign.core.errors import RequestError
from moalign.core.records import Response
from moalign.lm import language_model
from moalign.lm.chat import Codec, Renderer, pair_row, training_row
from moalign.lm.sampler import Samples, Sampling, generate, responses

CHATS = ["llama3", "dated", "gemma", "chatml", "mistral", "phi"]
EVERY = [*CHATS, "base"]
QUESTION = "What should I cook tonight? Please answer with 2 details, naïve or not."
LONG = " ".join(f"Question {number}: what should I cook?" for number in range(60))

Folder = Callable[[str], Path]


def codec_of(folder: Path, **template: Any) -> Codec:
    return language_model.load_codec(str(folder), template=TemplateSpec(**template))


def own_ids(codec: Codec, text: str, system: str | None = None) -> list[int]:
    """The tokenizer's own ids of a chat prompt."""
    turns = [{"role": "user", "content": text}]
    if system:
        turns.insert(0, {"role": "system", "content": system})
    ids: list[int] = codec.tokenizer.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return ids


def text_of(codec: Codec, ids: list[int]) -> str:
    return str(codec.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


# -- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [QUESTION, "", " two spaces  and a\nline ", "猫は好きですか 🙂"])
@pytest.mark.parametrize("name", [name for name in CHATS if name != "dated"])
def test_a_chat_prompt_has_the_ids_of_the_tokenizer_s_own_template(chat_folder: Folder, name: str, text: str) -> None:
    codec = codec_of(chat_folder(name), chat=True)
    render = Renderer(codec.template, ("a", "b"), codec, 512)
    assert codec.prompt_ids([render.plain(text)]) == [own_ids(codec, text)]
    steered = f"[a 30.0% b 70.0%] {text}"
    assert codec.prompt_ids([render.preference(text, (0.3, 0.7))]) == [own_ids(codec, steered)]


@pytest.mark.parametrize("name", ["llama3", "chatml", "mistral", "phi"])
def test_a_system_prompt_goes_where_the_template_puts_it(chat_folder: Folder, name: str) -> None:
    system = "You are terse."
    codec = codec_of(chat_folder(name), chat=True, system=system)
    render = Renderer(codec.template, ("a", "b"), codec, 512)
    assert codec.prompt_ids([render.plain(QUESTION)]) == [own_ids(codec, QUESTION, system)]
    assert system in render.plain(QUESTION)


def test_a_template_that_refuses_a_system_prompt_says_so(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("gemma"), chat=True, system="You are terse.")
    with pytest.raises(RequestError, match=r"refuses: System role not supported; template.system: null"):
        Renderer(codec.template, ("a", "b"), codec, 512).plain(QUESTION)


def test_a_tokenizer_without_a_chat_template_says_so(chat_folder: Folder) -> None:
    with pytest.raises(RequestError, match=r"template.chat: true, but the tokenizer of .* has no chat template"):
        codec_of(chat_folder("base"), chat=True)


@pytest.mark.parametrize("name", EVERY)
def test_a_plain_prompt_has_the_ids_of_the_tokenizer_itself(chat_folder: Folder, name: str) -> None:
    codec = codec_of(chat_folder(name), marker="\nAssistant:")
    text = Renderer(codec.template, ("a", "b"), codec, 512).plain(QUESTION)
    assert codec.prompt_ids([text]) == [codec.tokenizer(f"{QUESTION}\nAssistant:")["input_ids"]]


@pytest.mark.parametrize("name", ["llama3", "gemma", "mistral"])
def test_no_prompt_begins_twice(chat_folder: Folder, name: str) -> None:
    for chat in (True, False):
        codec = codec_of(chat_folder(name), chat=chat)
        ids = codec.prompt_ids([Renderer(codec.template, ("a", "b"), codec, 512).plain(QUESTION)])[0]
        assert ids[0] == codec.tokenizer.bos_token_id
        assert ids.count(codec.tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(chat_folder: Folder) -> None:
    from tokenizers.processors import TemplateProcessing

    codec = codec_of(chat_folder("base"))
    tokenizer = codec.tokenizer
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    assert tokenizer(QUESTION)["input_ids"][-1] == tokenizer.eos_token_id
    assert codec.prompt_ids([QUESTION]) == [tokenizer(QUESTION)["input_ids"][:-1]]


# -- the day, and what else a template is given -----------------------------------------------------------------------


def test_the_day_is_the_card_s(chat_folder: Folder) -> None:
    def shown(**template: Any) -> str:
        codec = codec_of(chat_folder("dated"), chat=True, **template)
        return codec.turns(QUESTION)

    assert "Today Date: 01 Feb 2023" in shown(date="2023-02-01")
    assert "Today Date: 26 Jul 2024" in shown()
    theirs = own_ids(codec_of(chat_folder("dated"), chat=True), QUESTION)
    codec = codec_of(chat_folder("dated"), chat=True, date=datetime.date.today().isoformat())
    assert codec.prompt_ids([codec.turns(QUESTION)]) == [theirs]


def test_a_chat_template_gets_the_card_s_arguments(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("chatml"), chat=True, chat_kwargs={"enable_thinking": False})
    assert codec.turns(QUESTION).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    # The history writes no such block, so a reply stands right behind the prompt.
    ids = codec.response_ids(codec.turns(QUESTION), Response("Soup."))
    assert text_of(codec, ids) == "Soup.<|im_end|>"


# -- prompts that are too long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_only_the_user_s_text_is_cut(chat_folder: Folder, name: str, chat: bool) -> None:
    if chat and name == "base":
        pytest.skip("it has no chat template")
    codec = codec_of(chat_folder(name), chat=chat, marker="" if chat else "\nAssistant:")
    limit = 120
    render = Renderer(codec.template, ("a", "b"), codec, limit)
    whole = codec.prompt_ids([Renderer(codec.template, ("a", "b"), codec, 10_000).preference(LONG, (1, 0))])[0]
    first, second = render.preference(LONG, (1, 0)), render.preference(LONG, (0, 1))
    for rendered, weights in ((first, "a 100.0% b 0.0%"), (second, "a 0.0% b 100.0%")):
        ids = codec.prompt_ids([rendered])[0]
        assert limit - 12 <= len(ids) <= limit < len(whole)
        assert LONG.endswith(rendered.prompt) and 0 < len(rendered.prompt) < len(LONG)
        # The same text around it as around a short prompt, and the ids are the tokenizer's own of what is left.
        assert rendered == render.beside("<<>>", weights).replace("<<>>", rendered.prompt)
        assert f"[{weights}] {rendered.prompt}" in rendered
        if chat and name != "dated":
            assert ids == own_ids(codec, f"[{weights}] {rendered.prompt}")
        own = codec.tokenizer(LONG, add_special_tokens=False)["input_ids"]
        left = codec.tokenizer(rendered.prompt, add_special_tokens=False)["input_ids"]
        assert rendered.cut == len(own) - len(left) > 0
    assert codec.prompt_ids([first]) != codec.prompt_ids([second])


def test_as_much_is_kept_as_fits(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("chatml"), chat=True)
    for limit in range(60, 90):
        rendered = Renderer(codec.template, ("a", "b"), codec, limit).plain(LONG)
        starts = [s for s, _ in codec.tokenizer(LONG, return_offsets_mapping=True)["offset_mapping"]]
        more = max(start for start in starts if start < len(LONG) - len(rendered.prompt))
        assert len(codec.prompt_ids([rendered])[0]) <= limit < len(codec.prompt_ids([rendered.build(LONG[more:])])[0])


def test_a_cut_never_tears_a_character(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("llama3"), chat=True)
    text = "猫🙂" * 60
    for limit in range(40, 56):
        kept = Renderer(codec.template, ("a", "b"), codec, limit).plain(text).prompt
        assert text.endswith(kept) and kept


def test_a_limit_that_holds_no_prompt_is_refused(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("chatml"), chat=True)
    with pytest.raises(RequestError, match=r"generation.max_prompt_tokens: 8 tokens do not hold what the template"):
        Renderer(codec.template, ("a", "b"), codec, 8).plain(QUESTION)


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHATS)
def test_what_ends_a_response(chat_folder: Folder, chat_families: dict[str, Any], name: str) -> None:
    family, codec = chat_families[name], codec_of(chat_folder(name), chat=True)
    wanted = {family.eos, family.turn_end, *family.generation_ends}
    assert codec.ends.ids == set(codec.tokenizer.convert_tokens_to_ids(sorted(wanted)))
    assert text_of(codec, list(codec.ends.row)) == family.turn_end


def test_a_base_ends_with_its_end_token(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("base"))
    assert codec.ends.ids == {codec.tokenizer.eos_token_id} == set(codec.ends.row)


def test_special_tokens_may_be_stop_texts(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("llama3"), stop=["<|eot_id|>", "\nHuman:"], end="\nHuman:")
    assert codec.tokenizer.convert_tokens_to_ids("<|eot_id|>") in codec.ends.ids
    assert codec.ends.texts == ("\nHuman:",)
    assert text_of(codec, list(codec.ends.row)) == "\nHuman:"


def test_one_end_token_may_be_an_int(chat_folder: Folder, tmp_path: Path) -> None:
    folder = tmp_path / "gemma"
    shutil.copytree(chat_folder("gemma"), folder)
    file = folder / "generation_config.json"
    content = json.loads(file.read_text())
    turn_end = max(content["eos_token_id"])
    file.write_text(json.dumps({**content, "eos_token_id": turn_end}))
    assert turn_end in codec_of(folder).ends.ids
    file.unlink()
    assert codec_of(folder).ends.ids  # the model's own config, and the template, still name ends


def test_sampling_ends_at_the_turn_s_end(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("gemma"), chat=True)
    lm = language_model.load(str(chat_folder("gemma")), device="cpu", codec=codec)
    turn_end = codec.ends.row[0]
    assert turn_end != lm.eos
    render = Renderer(codec.template, ("a", "b"), codec, 512)
    made = generate(lm, [render.plain(QUESTION)] * 200, range(200), Sampling(max_new_tokens=40, temperature=1.5))
    assert made.traces is not None
    ended = [ids.tolist() for ids in made.traces.ids if turn_end in ids]
    assert ended and all(ids.index(turn_end) == len(ids) - 1 for ids in ended)
    for ids, finished in zip(made.traces.ids, made.traces.finished, strict=True):
        assert finished == (ids[-1] in codec.ends.ids)


def test_the_turn_s_end_stands_behind_a_reply_without_a_word_mark_of_its_own() -> None:
    """Llama-2-chat writes " </s>" behind a reply; alone, its tokenizer would read that as two marks of a space."""
    parts = ["<unk>", "<s>", "</s>", "▁", "▁▁", *"[]/INSThiyo.", "▁[", "▁h", "▁y"]
    merges = [("▁", "▁"), ("▁", "["), ("▁", "h"), ("▁", "y")]
    made = Tokenizer(models.BPE(vocab={part: at for at, part in enumerate(parts)}, merges=merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + "
        "' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    codec = Codec(tokenizer, TemplateSpec(chat=True))
    head, tail = training_row(codec, codec.turns("hi"), Response("yo."), 64)
    assert tokenizer.convert_ids_to_tokens(tail) == ["▁y", "o", ".", "▁", "</s>"]
    assert head + tail == tokenizer(codec.turns("hi", "yo."), add_special_tokens=False)["input_ids"]


def test_an_end_that_is_no_special_token_is_not_read_by_scorers(chat_folder: Folder) -> None:
    lm = language_model.load(str(chat_folder("base")), device="cpu")
    lm.tokenizer.add_tokens([AddedToken(part, special=False) for part in ("<|user|>", "<|end|>")])
    lm.tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    codec = Codec(lm.tokenizer, TemplateSpec(chat=True))
    end = lm.tokenizer.convert_tokens_to_ids("<|end|>")
    assert codec.ends.ids == {end, lm.eos}
    soup = lm.tokenizer(" Soup.", add_special_tokens=False)["input_ids"]
    rows = [[*soup, end], soup, [*soup, end, *soup], [end], []]
    assert codec.decode(rows) == [" Soup.", " Soup.", " Soup.<|end|> Soup.", "", ""]
    whole = torch.tensor([[*soup, end]])
    ones = torch.ones_like(whole)
    drawn = Samples(whole, ones, ones.bool(), torch.zeros(whole.shape), torch.tensor([True]))
    assert responses(replace(lm, codec=codec, end_ids=codec.ends.ids), drawn) == ["Soup."]


# -- responses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_what_was_sampled_keeps_its_ids(chat_folder: Folder, name: str) -> None:
    codec = codec_of(chat_folder(name), marker="\nAssistant:")
    lm = language_model.load(str(chat_folder(name)), device="cpu", codec=codec)
    text = Renderer(codec.template, ("a", "b"), codec, 512).plain(QUESTION)
    made = generate(lm, [text] * 8, range(8), Sampling(max_new_tokens=20))
    assert made.traces is not None
    for shown, ids, finished in zip(made.responses, made.traces.ids, made.traces.finished, strict=True):
        response = Response(shown, tuple(ids.tolist()), finished)
        assert training_row(codec, text, response, 512) == (codec.prompt_ids([text])[0], ids.tolist())


@pytest.mark.parametrize("name", EVERY)
def test_a_text_is_read_behind_its_prompt_with_its_leading_space(chat_folder: Folder, name: str) -> None:
    codec = codec_of(chat_folder(name), marker="\n\nAssistant:")
    prompt = f"\n\nHuman: {QUESTION}\n\nAssistant:"
    head, tail = training_row(codec, prompt, Response(" I would like to help."), 512)
    assert head + tail == [*codec.tokenizer(f"{prompt} I would like to help.")["input_ids"], *codec.ends.row]
    assert text_of(codec, tail).startswith(" I would") or name == "mistral"  # its decoder drops the first space


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_row_is_what_the_template_writes(chat_folder: Folder, chat_families: Any, name: str) -> None:
    codec = codec_of(chat_folder(name), chat=True)
    prompt, reply = codec.turns(QUESTION), "I would like to help."
    head, tail = training_row(codec, prompt, Response(reply), 512)
    written = codec.tokenizer(codec.turns(QUESTION, reply), add_special_tokens=False)["input_ids"]
    assert head + tail == written[: len(head + tail)]
    assert tail[-1] == codec.tokenizer.convert_tokens_to_ids(chat_families[name].turn_end)


def test_a_token_across_the_border_is_never_made(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("base"))
    merged = codec.tokenizer("assistant", add_special_tokens=False)["input_ids"]
    prompt, response = "The ass", "istant"
    head, tail = training_row(codec, prompt, Response(response, finished=False), 512)
    assert head == codec.tokenizer(prompt)["input_ids"]
    assert text_of(codec, head + tail).endswith("The assistant") and tail[0] not in merged[:1]


def test_only_what_is_finished_ends(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("chatml"), chat=True)
    prompt = codec.turns(QUESTION)
    whole, cut = (training_row(codec, prompt, Response("Soup.", finished=flag), 512)[1] for flag in (True, False))
    assert whole == [*cut, *codec.ends.row]
    sampled = Response("Soup.", tuple(cut), finished=False)
    assert training_row(codec, prompt, sampled, 512)[1] == cut


# -- rows that are too long -------------------------------------------------------------------------------------------


def test_a_pair_shares_one_cut_prompt(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("llama3"), chat=True)
    rendered = Renderer(codec.template, ("a", "b"), codec, 400).preference(LONG, (1, 0))
    short, long = Response("Soup."), Response("I would like to help you with soup, bread and cheese.")
    (head, first), (other, second) = pair_row(codec, rendered, [short, long], 150)
    assert head == other and len(first) < len(second)
    assert 150 - 8 <= len(head) + len(second) <= 150
    assert "[a 100.0% b 0.0%] " in text_of(codec, head)
    assert text_of(codec, head).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert second[-1] == codec.ends.row[-1]


def test_a_response_longer_than_the_row_has_no_ending(chat_folder: Folder) -> None:
    codec = codec_of(chat_folder("llama3"), chat=True)
    rendered = Renderer(codec.template, ("a", "b"), codec, 400).plain(QUESTION)
    head, tail = training_row(codec, rendered, Response(LONG), 100)
    assert len(head) + len(tail) <= 100
    assert not codec.ends.ids & set(tail)
    with pytest.raises(RequestError, match=r"max_tokens: 5 tokens do not hold"):
        training_row(codec, rendered, Response("Soup."), 5)


# -- preferences in words ---------------------------------------------------------------------------------------------

WORDS = {
    "brevity": [
        {"up_to": 0.3, "text": "Answer in one long sentence."},
        {"up_to": 0.7, "text": "Answer in one sentence."},
        {"up_to": 1, "text": "Answer in one short sentence."},
    ],
    "detail": [{"up_to": 0.5, "text": ""}, {"up_to": 1, "text": "Name many details."}],
}


@pytest.mark.parametrize(
    ("brevity", "content"),
    [
        (0.0, "Answer in one long sentence. Name many details."),
        (0.1 + 0.2, "Answer in one long sentence. Name many details."),
        (0.5, "Answer in one sentence."),
        (0.71, "Answer in one short sentence."),
        (1.0, "Answer in one short sentence."),
    ],
)
def test_preferences_in_words(brevity: float, content: str) -> None:
    spec = TemplateSpec.model_validate({"preference": "{prompt} {preference}", "words": WORDS})
    assert Renderer(spec, ("brevity", "detail")).preference("Why?", (brevity, 1 - brevity)) == f"Why? {content}"

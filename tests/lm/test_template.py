"""Prompts as the policy reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moalign.config.card import TemplateSpec
from moalign.lm import language_model
from moalign.lm.chat import Renderer

NAMES = ("helpfulness", "harmlessness")
Folder = Callable[[str], Path]


def test_forms_by_hand() -> None:
    renderer = Renderer(TemplateSpec(), NAMES)
    assert renderer.plain("make soup ?") == "make soup ?"
    assert renderer.preference("make soup ?", (0.3, 0.7)) == "[helpfulness 30.0% harmlessness 70.0%] make soup ?"
    assert renderer.preference("x", (0.3, 0.7), "fraction") == "[helpfulness 0.3 harmlessness 0.7] x"
    assert renderer.scores("x", (1.25, -0.31)) == "x <rm1_score> 1.2 <rm2_score> -0.3"


def test_marker_ends_every_form() -> None:
    renderer = Renderer(TemplateSpec(marker="\n\nAssistant:"), NAMES)
    for text in (renderer.plain("x"), renderer.preference("x", (1, 0)), renderer.scores("x", (1, 0))):
        assert text.endswith("\n\nAssistant:") and text.count("Assistant") == 1


HARD = ["what does {preference} mean ?", "{prompt}", "{prompt} {preference} {scores}", "{", "a {b} c", "{{prompt}}"]


@pytest.mark.parametrize("prompt", HARD)
@pytest.mark.parametrize(
    "more", [{}, {"preference": "{prompt} [{preference}]", "scores": "{scores} {prompt}", "plain": "Q: {prompt} A:"}]
)
def test_braces_in_a_prompt_stay_as_they_are(prompt: str, more: dict[str, str]) -> None:
    renderer = Renderer(TemplateSpec(**more), NAMES)
    content, tags = "helpfulness 100.0% harmlessness 0.0%", "<rm1_score> 0.5 <rm2_score> 0.0"
    assert renderer.plain(prompt) == (f"Q: {prompt} A:" if more else prompt)
    assert renderer.preference(prompt, (1, 0)) == (f"{prompt} [{content}]" if more else f"[{content}] {prompt}")
    assert renderer.scores(prompt, (0.5, 0)) == (f"{tags} {prompt}" if more else f"{prompt} {tags}")


def chat(chat_folder: Folder, name: str, **settings: Any) -> Renderer:
    template = TemplateSpec(chat=True, **settings)
    codec = language_model.load_codec(str(chat_folder(name)), template=template)
    return Renderer(template, NAMES, codec)


def test_chat_template_takes_the_rendered_prompt_as_the_user_turn(chat_folder: Folder) -> None:
    renderer = chat(chat_folder, "phi")
    assert renderer.plain("hi") == "<|user|>\nhi<|end|>\n<|assistant|>\n"
    content = "[helpfulness 0.0% harmlessness 100.0%] hi"
    assert renderer.preference("hi", (0, 1)) == f"<|user|>\n{content}<|end|>\n<|assistant|>\n"
    tagged = "{preference} <rm1_score> 0.0 <rm2_score> 1.0"
    assert renderer.scores("{preference}", (0, 1)) == f"<|user|>\n{tagged}<|end|>\n<|assistant|>\n"


def test_chat_template_with_system_turn_and_marker(chat_folder: Folder) -> None:
    renderer = chat(chat_folder, "phi", system="be kind", marker=" go")
    assert renderer.plain("hi") == "<|system|>\nbe kind<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\n go"


def test_a_chat_template_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="a chat template needs a tokenizer"):
        Renderer(TemplateSpec(chat=True), NAMES).plain("hi")

"""Prompts as the policy reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moalign.config.card import TemplateSpec
from moalign.lm.chat import Renderer
from moalign.policies.language_model import LanguageModel

NAMES = ("helpfulness", "harmlessness")
CHAT = (
    "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


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
    told, tags = "helpfulness 100.0% harmlessness 0.0%", "<rm1_score> 0.5 <rm2_score> 0.0"
    assert renderer.plain(prompt) == (f"Q: {prompt} A:" if more else prompt)
    assert renderer.preference(prompt, (1, 0)) == (f"{prompt} [{told}]" if more else f"[{told}] {prompt}")
    assert renderer.scores(prompt, (0.5, 0)) == (f"{tags} {prompt}" if more else f"{prompt} {tags}")


def chat(make_lm: Callable[..., LanguageModel], **told: Any) -> Renderer:
    tokenizer = make_lm().tokenizer
    tokenizer.chat_template = CHAT
    return Renderer(TemplateSpec(chat=True, **told), NAMES, tokenizer)


def test_chat_template_takes_the_rendered_prompt_as_the_user_turn(make_lm: Callable[..., LanguageModel]) -> None:
    renderer = chat(make_lm)
    assert renderer.plain("hi") == "<user> hi <assistant>"
    assert renderer.preference("hi", (0, 1)) == "<user> [helpfulness 0.0% harmlessness 100.0%] hi <assistant>"
    assert renderer.scores("{preference}", (0, 1)) == "<user> {preference} <rm1_score> 0.0 <rm2_score> 1.0 <assistant>"


def test_chat_template_with_system_turn_and_marker(make_lm: Callable[..., LanguageModel]) -> None:
    renderer = chat(make_lm, system="be kind", marker=" go")
    assert renderer.plain("hi") == "<system> be kind <user> hi <assistant> go"

"""``moalign preview``: what the model reads, token by token, and what it is trained on."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moalign.cli import output

if TYPE_CHECKING:
    from rich.text import Text

    from moalign.experiment.preview import Preview, Seen

SHOWN = 400
"""Tokens of a prompt that are shown; of longer ones the middle is left out."""
BEFORE = 12
"""Tokens of the prompt that are shown before the response of the training row."""


def preview(
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="The user's text; else the task's first prompt.")
    ] = None,
    task: Annotated[str, typer.Option(metavar="NAME|CARD", help="Task name, card file or its folder.")] = "sandbox",
    prefs: Annotated[
        str | None, typer.Option(metavar="W1,W2[,..]", help="The preference beside the prompt; else none.")
    ] = None,
    response: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Response of the training row; else the data's, or a stand-in.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="task.KEY=VALUE", help="Change one setting of the card.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what the model reads for a prompt, token by token, what ends its answer, and one training row.

    Only the tokenizer and the generation config are loaded; nothing is written.
    """
    from moalign.experiment import preview as workflow

    with output.working():
        seen = workflow.preview(task, prompt, prefs, response, tuple(set_ or ()))
    if as_json:
        output.as_json(seen.preview.told())
    else:
        _show(seen)


def _show(seen: Seen) -> None:
    made = seen.preview
    asked = "none: rendered plain"
    if made.prefs is not None:
        asked = ", ".join(f"{name} {weight:g}" for name, weight in zip(made.objectives, made.prefs, strict=True))
    output.pairs([("task", made.task), ("model", visible(made.model)), ("preference", asked)])
    _section(f"what the model reads ({len(made.ids)} tokens)")
    for line in made.text.split("\n"):
        _print(_marked([(visible(line), False)], "  "))
    _section("token by token; special tokens in double brackets, a dot between the others")
    _print(_tokens(seen, made.ids))
    _section("what was cut")
    output.say(f"  {_cut(made)}")
    _section("what ends a response")
    ends = "  ".join(f"{visible(text)} ({token})" for token, (text, _) in _named(seen, made.stop_ids))
    output.say(f"  token ids: {ends}")
    output.say(f"  texts: {'  '.join(visible(repr(text)) for text in made.stop_texts) or 'none'}")
    counted = sum(made.loss)
    origin = {"given": "as given", "data": "from the data", "stand-in": "a stand-in"}[made.response_from]
    _section(f"a training row ({len(made.row_ids)} tokens); the loss counts the {counted} between > and <")
    _print(_row(seen))
    output.say(f"  the response is {origin}")


def _named(seen: Seen, ids: Sequence[int]) -> list[tuple[int, tuple[str, bool]]]:
    return list(zip(ids, seen.pieces(ids), strict=True))


def _cut(made: Preview) -> str:
    if not made.cut_tokens:
        return f"nothing: at most {made.max_prompt_tokens} tokens are read"
    if made.overlong == "drop":
        return (
            f"this prompt is longer than {made.max_prompt_tokens} tokens, and the card leaves such prompts out "
            f"(overlong: drop); without that it would lose {made.cut_tokens} tokens"
        )
    kept = made.kept[:60]
    return (
        f"the first {made.cut_tokens} tokens of the prompt, so that {made.max_prompt_tokens} hold it; read from: "
        f"{visible(repr(kept))}{'...' if len(made.kept) > len(kept) else ''}"
    )


def _section(title: str) -> None:
    output.say()
    output.say(f"{title}:")


def _tokens(seen: Seen, ids: Sequence[int]) -> Text:
    if len(ids) <= SHOWN:
        return _marked(seen.pieces(ids), "  ")
    half = SHOWN // 2
    text = _marked(seen.pieces(ids[:half]), "  ")
    text.append(f" ... {len(ids) - SHOWN} more ... ", "dim")
    text.append_text(_marked(seen.pieces(ids[-half:])))
    return text


def _row(seen: Seen) -> Text:
    made = seen.preview
    first = made.loss.index(1) if 1 in made.loss else len(made.loss)
    before = made.row_ids[max(0, first - BEFORE) : first]
    text = _marked(seen.pieces(before), "  ... " if first > BEFORE else "  ", "dim")
    text.append(" > ", "bold")
    text.append_text(_marked(seen.pieces(made.row_ids[first:]), style="underline"))
    text.append(" <", "bold")
    return text


def _marked(pieces: Sequence[tuple[str, bool]], lead: str = "", style: str = "") -> Text:
    """Return tokens in one text: special ones in double brackets, a dot between two others."""
    from rich.text import Text

    text = Text(lead)
    ordinary = False
    for piece, special in pieces:
        if special:
            text.append(f"[[{visible(piece)}]]", f"bold {style}".strip())
        else:
            text.append("·" if ordinary else "", "dim")
            text.append(visible(piece), style)
        ordinary = not special
    return text


def _print(text: Text) -> None:
    output.console().print(text, soft_wrap=True)


def visible(text: str) -> str:
    r"""Return the text with everything that has no shape of its own escaped: control, format and unknown characters.

    >>> visible("a\tb\x1b[0m\u202e")
    'a\\tb\\x1b[0m\\u202e'
    """
    return "".join(
        character.encode("unicode_escape", "surrogatepass").decode("ascii")
        if unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
        else character
        for character in text
    )

"""``moalign preview``: what the model reads, token by token, and what it is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moalign.cli import output
from moalign.cli.options import CardSettings, Json
from moalign.core.text import shaped

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
    set_: CardSettings = None,
    as_json: Json = False,
) -> None:
    """Show what the model reads for a prompt, token by token, what ends its answer, and one training row.

    Only the tokenizer and the generation config are loaded; nothing is written.
    """
    from moalign.experiment import preview as workflow

    with output.working():
        seen = workflow.preview(task, prompt, prefs, response, tuple(set_ or ()))
    if as_json:
        output.as_json(seen.preview.as_dict())
    else:
        _show(seen)


def _show(seen: Seen) -> None:
    shown = seen.preview
    preference = "none: rendered plain"
    if shown.prefs is not None:
        preference = ", ".join(f"{name} {weight:g}" for name, weight in zip(shown.objectives, shown.prefs, strict=True))
    output.pairs([("task", shown.task), ("model", shaped(shown.model)), ("preference", preference)])
    _section(f"what the model reads ({len(shown.ids)} tokens)")
    for line in shown.text.split("\n"):
        _print(_marked([(shaped(line), False)], "  "))
    _section("token by token; special tokens in double brackets, a dot between the others")
    _print(_tokens(seen, shown.ids))
    _section("what was cut")
    output.line(f"  {_cut(shown)}")
    _section("what ends a response")
    pieces = zip(shown.stop_ids, seen.pieces(shown.stop_ids), strict=True)
    ends = "  ".join(f"{shaped(text)} ({token})" for token, (text, _) in pieces)
    output.line(f"  token ids: {ends}")
    output.line(f"  texts: {'  '.join(shaped(repr(text)) for text in shown.stop_texts) or 'none'}")
    in_loss = sum(shown.loss)
    origin = {"given": "as given", "data": "from the data", "stand-in": "a stand-in"}[shown.response_from]
    _section(f"a training row ({len(shown.row_ids)} tokens); the loss counts the {in_loss} between > and <")
    _print(_row(seen))
    output.line(f"  the response is {origin}")
    for text in shown.notes:
        output.note(f"note: {text}")


def _cut(shown: Preview) -> str:
    if not shown.cut_tokens:
        return f"nothing: at most {shown.max_prompt_tokens} tokens are read"
    if shown.overlong == "drop":
        return (
            f"this prompt is longer than {shown.max_prompt_tokens} tokens, and the card leaves such prompts out "
            f"(overlong: drop); without that it would lose {shown.cut_tokens} tokens"
        )
    kept = shown.kept[:60]
    return (
        f"the first {shown.cut_tokens} tokens of the prompt, so that {shown.max_prompt_tokens} hold it; read from: "
        f"{shaped(repr(kept))}{'...' if len(shown.kept) > len(kept) else ''}"
    )


def _section(title: str) -> None:
    output.line()
    output.line(f"{title}:")


def _tokens(seen: Seen, ids: Sequence[int]) -> Text:
    if len(ids) <= SHOWN:
        return _marked(seen.pieces(ids), "  ")
    half = SHOWN // 2
    text = _marked(seen.pieces(ids[:half]), "  ")
    text.append(f" ... {len(ids) - SHOWN} more ... ", "dim")
    text.append_text(_marked(seen.pieces(ids[-half:])))
    return text


def _row(seen: Seen) -> Text:
    shown = seen.preview
    first = shown.loss.index(1) if 1 in shown.loss else len(shown.loss)
    before = shown.row_ids[max(0, first - BEFORE) : first]
    text = _marked(seen.pieces(before), "  ... " if first > BEFORE else "  ", "dim")
    text.append(" > ", "bold")
    text.append_text(_marked(seen.pieces(shown.row_ids[first:]), style="underline"))
    text.append(" <", "bold")
    return text


def _marked(pieces: Sequence[tuple[str, bool]], lead: str = "", style: str = "") -> Text:
    """Return tokens in one text: special ones in double brackets, a dot between two others."""
    from rich.text import Text

    text = Text(lead)
    ordinary = False
    for piece, special in pieces:
        if special:
            text.append(f"[[{shaped(piece)}]]", f"bold {style}".strip())
        else:
            text.append("·" if ordinary else "", "dim")
            text.append(shaped(piece), style)
        ordinary = not special
    return text


def _print(text: Text) -> None:
    output.console().print(text, soft_wrap=True)

"""From a task's :class:`~moalign.config.card.DataSpec` to typed records.

Prompts come from a list in the card, from a grammar, from a source, or from a grammar and one of the
others. Responses and pairs are streamed; only the prompts are held in memory.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from moalign.config.card import DataSpec, SourceSpec
from moalign.core import errors
from moalign.core.errors import RequestError
from moalign.core.records import LoggedResponse, Pair
from moalign.data.dialogue import ASSISTANT, split_pair
from moalign.data.readers import Field, Row, check_text, missing_column, read

_OPTIONAL_PROMPT = Field("prompt", required=False, blank=False)
_DIALOGUE = [Field(name, required=False, in_place_of="prompt") for name in ("chosen", "rejected")]
_PAIR = [_OPTIONAL_PROMPT, Field("chosen"), Field("rejected")]
_GROUP = Field("group", required=False, blank=False)
GRAMMAR_LIMIT = 1_000_000
"""Prompts; a larger grammar is refused before it is generated."""


def load_prompts(spec: DataSpec, base_dir: Path | str = ".") -> list[str]:
    """Return the task's prompts in the order in which they first appear, each once.

    A source needs a field ``prompt``; a source of preference dialogues (``chosen`` and ``rejected``)
    gives the prompts of its pairs. Raises RequestError for an empty prompt (with its line or
    position), a broken grammar, or when there is no prompt at all.
    """
    prompts = list(dict.fromkeys(itertools.chain(_given(spec, base_dir), _generated(spec.prompt_grammar))))
    if not prompts:
        raise RequestError("data: no prompts; give data.prompts (a list or a source) or data.prompt_grammar")
    return prompts


def load_responses(spec: DataSpec, base_dir: Path | str = ".") -> Iterator[LoggedResponse]:
    """Stream ``data.responses``: fields prompt and response. Raises RequestError when the task has none.

    Other columns are not read, scores that people gave neither: the task's scorers score all responses alike.
    A source whose ``columns`` name ``chosen`` is read as preference pairs: both replies of a pair are responses (RiC).
    A column ``finished`` marks the responses that a limit cut off as false; without it all are finished.
    """
    if spec.responses is None:
        raise RequestError("data.responses: the task has none; give a source with the columns prompt and response")
    if "chosen" in spec.responses.columns:
        pairs = _ungrouped(spec.responses, base_dir)
        return (LoggedResponse(pair.prompt, reply) for pair in pairs for reply in (pair.chosen, pair.rejected))
    fields = [Field("prompt", blank=False), Field("response"), Field("finished", truth=True, required=False)]
    return (
        LoggedResponse(row.values["prompt"], row.values["response"], row.values["finished"] is not False)
        for row in read(spec.responses, fields, base_dir)
    )


def load_pairs(spec: DataSpec, base_dir: Path | str = ".", objective: str | None = None) -> Iterator[Pair]:
    """Stream ``data.pairs``: fields prompt, chosen, rejected, or whole dialogues in chosen and rejected.

    ``objective`` selects the pairs where they are given by objective. Raises RequestError when the task has no (such)
    pairs, the dialogues share no prompt, or both replies of a pair are the same text (with file and line).
    """
    source = spec.pairs
    if source is None:
        raise RequestError("data.pairs: the task has none; give a source with the columns prompt, chosen and rejected")
    if isinstance(source, dict):
        if objective not in source:
            raise RequestError(
                f"data.pairs: there are none for {objective or 'no objective in particular'}; "
                f"found: {', '.join(source) or 'none'}"
            )
        source = source[objective]
    return _ungrouped(source, base_dir)


def load_grouped_pairs(source: SourceSpec, base_dir: Path | str = ".") -> Iterator[tuple[str | None, Pair]]:
    """Stream the pairs of one source, each with its ``group`` (who labelled it), None where there is no such column.

    Raises RequestError as :func:`load_pairs` does.
    """
    return ((row.values["group"], _pair(row)) for row in read(source, [*_PAIR, _GROUP], base_dir))


def _ungrouped(source: SourceSpec, base_dir: Path | str) -> Iterator[Pair]:
    """Stream pairs where it does not matter who labelled them; a column ``group`` is looked at if it was named."""
    named = [_GROUP] if _GROUP.name in source.columns else []
    return (_pair(row) for row in read(source, [*_PAIR, *named], base_dir))


def _pair(row: Row) -> Pair:
    prompt, chosen, rejected = (row.values[name] for name in ("prompt", "chosen", "rejected"))
    if chosen == rejected:
        raise RequestError(f"{row.where}: chosen and rejected are the same text; a pair needs two different replies")
    if prompt is None:
        return Pair(*split_pair(chosen, rejected, row.where))
    # Some data sets give the prompt and the whole dialogues too; the prompt would be read twice.
    if prompt.endswith(ASSISTANT) and chosen.startswith(prompt) and rejected.startswith(prompt):
        return Pair(prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt))
    return Pair(prompt, chosen, rejected)


def _given(spec: DataSpec, base_dir: Path | str) -> Iterator[str]:
    if isinstance(spec.prompts, SourceSpec):
        for row in read(spec.prompts, [_OPTIONAL_PROMPT, *_DIALOGUE], base_dir):
            yield _prompt(row, spec.prompts.columns.get("prompt", "prompt"))
        return
    for position, prompt in enumerate(spec.prompts or [], start=1):
        if not prompt.strip():
            raise RequestError(f"data.prompts: prompt {position} is empty; a text is needed")
        check_text(prompt, f"data.prompts: prompt {position}")
        yield prompt


def _prompt(row: Row, column: str) -> str:
    prompt, chosen, rejected = (row.values[name] for name in ("prompt", "chosen", "rejected"))
    if prompt is not None:
        return str(prompt)
    if chosen is not None and rejected is not None:
        return split_pair(chosen, rejected, row.where)[0]
    if column in row.columns:
        raise RequestError(f"{row.where}: column {column!r} must be text; found nothing (null)")
    raise missing_column(row.where, "prompt", column, row.columns)


def _generated(grammar: Mapping[str, Sequence[str]] | None) -> Iterator[str]:
    """Yield every combination of a grammar's parts, the last part of a template changing fastest."""
    if grammar is None:
        return
    where = "data.prompt_grammar"
    templates = grammar.get("template", [])
    if not templates:
        raise RequestError(
            f"{where}: needs a list 'template' of texts with {{part}} fields; found: {', '.join(grammar) or 'nothing'}"
        )
    parts = {name: values for name, values in grammar.items() if name != "template"}
    for name in parts:
        if not name.isidentifier():
            allowed = "names of letters, digits and _ that do not begin with a digit"
            raise RequestError(f"{where}: the part {name!r} cannot be filled in; allowed: {allowed}")
    parsed = [
        _template(text, parts, f"{where}.template: text {index}") for index, text in enumerate(templates, start=1)
    ]
    used = {name for names in parsed for name in names}
    for name, values in parts.items():
        if name not in used:
            raise RequestError(
                f"{where}: the part {name!r} is in no template; write {{{name}}} in one, or leave it out"
            )
        if not values:
            raise RequestError(f"{where}.{name}: the list is empty; at least one text is needed")
    total = sum(math.prod(len(parts[name]) for name in names) for names in parsed)
    if total > GRAMMAR_LIMIT:
        raise RequestError(f"{where}: {total:,} combinations; at most {GRAMMAR_LIMIT:,} are allowed")
    for text, names in zip(templates, parsed, strict=True):
        for values in itertools.product(*(parts[name] for name in names)):
            prompt = text.format(**dict(zip(names, values, strict=True)))
            if not prompt.strip():
                raise RequestError(f"{where}: the template {text!r} gives an empty prompt")
            check_text(prompt, f"{where}: the prompt made from {text!r}")
            yield prompt


def _template(text: str, parts: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """Return the names of the parts in a template, each once, in order of appearance."""
    try:
        fields = [field for _, *field in string.Formatter().parse(text)]
    except ValueError as error:
        raise RequestError(f"{where}: {error}; write {{{{ and }}}} for braces that are text; found {text!r}") from error
    names: dict[str, None] = {}
    for name, form, conversion in fields:
        if name is None:
            continue  # text behind the last field
        if form or conversion:
            raise RequestError(f"{where}: {{{name}}} may hold a part's name and nothing else; found {text!r}")
        if name not in parts:
            raise errors.unknown("part", name, list(parts), where)
        names[name] = None
    return list(names)

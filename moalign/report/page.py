"""The comparison as one HTML page that opens offline: ranking, fronts, and each method's answers at a preference.

The page is ``assets/page.html`` with its style and script inside it and two blocks of JSON, which the script shows as
text. Generated text is hostile by assumption: inside the blocks ``<``, ``>`` and ``&`` are escaped, so that nothing can
end them; the script writes text nodes only; and a Content-Security-Policy allows this script and this style, by their
hashes, and nothing else (no other script, no request, no frame).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moalign.runs import atomic

LIMIT = 10_000_000
"""Bytes of a page; prompts are left out (and the page says so) where their answers would not fit."""
PLAIN = 6_000_000
"""Bytes of answers above which they are compressed instead of written as readable JSON."""


SCRIPTS = ("1-basics.js", "2-tables.js", "3-front.js", "4-answers.js", "5-start.js")
"""The page's script, in the order in which its parts are joined."""


@dataclass(frozen=True)
class Answers:
    """Answers of one row, from one of its runs, to the evaluation's prompts."""

    label: str
    """The row's label in the comparison."""
    preferences: Sequence[Sequence[float]]
    prompts: Sequence[str]
    responses: Sequence[Sequence[str]]
    """``[preferences][prompts]``."""
    scores: Sequence[Sequence[Sequence[float]]]
    """Raw scores ``[preferences][prompts][objectives]``."""


def page(record: Mapping[str, Any], answers: Sequence[Answers] = (), limit: int = LIMIT) -> bytes:
    """Return the page of a comparison; the same input gives the same bytes.

    Args:
        record: of a comparison (``compare.json``).
        answers: of every row that has any; all to the same prompts.
        limit: largest size of the page in bytes.
    """
    title = f"moalign: methods on {record['task']}"
    css, script = _asset("page.css"), "\n".join(_asset(name) for name in SCRIPTS)
    shown = {**record, "rows": [{**row, "curves": None} for row in record["rows"]]}  # curves are drawn in figures only
    parts = {
        "title": html.escape(title),
        "csp": _policy(css, script),
        "css": css,
        "js": script,
        "data": _json(shown),
    }
    room = limit - sum(len(part.encode()) for part in parts.values()) - len(_asset("page.html"))
    packed, block = _fitting(answers, room)
    return _filled(_asset("page.html"), {**parts, "packed": packed, "answers": block}).encode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """Fill the template's ``{{name}}`` in one pass, so that ``{{`` in a value means nothing."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match.group(1)], template)


def _policy(css: str, script: str) -> str:
    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    # Attributes cannot carry style or script either; the script sets widths and positions through the object model.
    own = f"script-src {allowed(script)}; style-src {allowed(css)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


_ESCAPES = {char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_SPECIAL = re.compile("[<>&\u2028\u2029]")


def _json(value: Any) -> str:
    """Return JSON that is inert inside a script element: none of its characters can end the block or begin a tag.

    Those that could occur only inside strings, where JSON reads their escapes back as the characters.
    """
    text = json.dumps(atomic.plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate, which a generated text can hold, becomes its escape.
    return _SPECIAL.sub(lambda match: _ESCAPES[match.group()], text).encode("utf-8", "backslashreplace").decode()


# --- answers ----------------------------------------------------------------------------------------------------


def _fitting(answers: Sequence[Answers], room: int) -> tuple[str, str]:
    """Return (encoding, block) with the answers to as many prompts as fit in ``room`` bytes."""
    prompts = len(answers[0].prompts) if answers else 0
    count = prompts
    while True:
        packed, block = _block(answers, count)
        size = len(block.encode())
        if size <= room or count <= 1:
            return packed, block
        count = max(1, min(count - 1, int(count * 0.98 * room / size)))


def _block(answers: Sequence[Answers], count: int) -> tuple[str, str]:
    text = _json(_table(answers, count))
    data = text.encode()
    if len(data) <= PLAIN:
        return "", text
    return "gzip", base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0)).decode()


def _table(answers: Sequence[Answers], count: int) -> dict[str, Any]:
    """Return the answers as the script reads them: a list of the distinct texts, and indices into it."""
    texts: dict[str, int] = {}
    rows = {
        answered.label: {
            "preferences": answered.preferences,
            "texts": [[texts.setdefault(text, len(texts)) for text in row[:count]] for row in answered.responses],
            "scores": [[[_short(value) for value in score] for score in row[:count]] for row in answered.scores],
        }
        for answered in answers
    }
    total = len(answers[0].prompts) if answers else 0
    note = "" if count == total else f"The first {count} of {total} prompts: the others would make this page too large."
    prompts = list(answers[0].prompts[:count]) if answers else []
    return {"note": note, "prompts": prompts, "rows": rows, "texts": list(texts)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")

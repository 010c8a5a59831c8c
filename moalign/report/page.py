"""The comparison as one HTML page that opens offline: ranking, fronts, and each method's answers at a preference.

The page is ``assets/page.html`` with its style, its script and two blocks of JSON inside it. Generated text is hostile
by assumption: the template escapes it; inside the blocks ``<``, ``>`` and ``&`` are escaped, so that nothing can end
them; the script writes text nodes only; and a Content-Security-Policy allows this script and this style, by their
hashes, and nothing else (no other script, no request, no frame).
"""

# The chart and its controls are a script of our own: plotly.js would do it in fewer lines of ours, but add 4.8 MB to
# every page, which is to open offline and to be sent by mail.

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moalign.report import tables
from moalign.report.record import Row, optimum_on_grid
from moalign.report.templates import asset, render
from moalign.runs import atomic

LIMIT = 10_000_000
"""Bytes of a page; prompts are left out (and the page says so) where their answers would not fit."""
PLAIN = 6_000_000
"""Bytes of answers above which they are compressed instead of written as readable JSON."""
SCRIPTS = ("1-basics.js", "2-tables.js", "3-front.js", "4-answers.js", "5-believed.js", "6-start.js")
"""The page's script, in the order in which its parts are joined."""

_PLACE = "<answers>"
"""Where the answers come to stand, once it is known how large the page is without them; no text can hold this, as
every ``<`` of a text is escaped."""
_RANKING = (
    "rank name hypervolume interval share seeds tau inner_product utility regret igd_plus spacing collapsed kl "
    "share_at_kl worst_group time tokens"
)
_COST = f"label {tables.COST} answering_rewards per_minute collapsed length distinct kl share_at_kl"


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


def page(record: Row, answers: Sequence[Answers] = (), limit: int = LIMIT) -> bytes:
    """Return the page of a comparison; the same input gives the same bytes.

    ``answers`` are of every row that has any, all to the same prompts; ``limit`` is the page's largest size in bytes.
    """
    css, script = asset("page.css"), "\n".join(asset(name) for name in SCRIPTS)
    context: dict[str, Any] = {
        **tables.of_comparison(record, _RANKING, _COST),
        "title": f"moalign: methods on {record['task']}",
        "csp": _policy(css, script),
        "css": css,
        "js": script,
        "data": _json({**record, "rows": [{**row, "curves": None} for row in record["rows"]]}),
        "record": record,
        "optimum": optimum_on_grid(record),
        "legend": tables.legend(record["rows"]),
        "answers": _PLACE,
    }

    # A generated text can hold half a surrogate pair.
    before, after = (part.encode("utf-8", "replace") for part in render("page.html", context).split(_PLACE))
    return before + _fitting(answers, limit - len(before) - len(after)) + after


def _policy(css: str, script: str) -> str:
    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    # Attributes cannot carry style or script either; the script sets widths and positions through the object model.
    own = f"script-src {allowed(script)}; style-src {allowed(css)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


_SPECIAL = re.compile("[<>&\u2028\u2029]")


def _json(value: Any) -> str:
    """Return JSON that is inert inside a script element: none of its characters can end the block or begin a tag.

    Those that could occur only inside strings, where JSON reads their escapes back as the characters.
    """
    text = json.dumps(atomic.plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate, which a generated text can hold, becomes its escape.
    escaped = _SPECIAL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
    return escaped.encode("utf-8", "backslashreplace").decode()


# --- answers ----------------------------------------------------------------------------------------------------


def _fitting(answers: Sequence[Answers], room: int) -> bytes:
    """Return the block of the answers to as many prompts as fit in ``room`` bytes."""
    count = len(answers[0].prompts) if answers else 0
    while True:
        block = _block(answers, count)
        if len(block) <= room or count <= 1:
            return block
        count = max(1, min(count - 1, int(count * 0.98 * room / len(block))))


def _block(answers: Sequence[Answers], count: int) -> bytes:
    packed, data = b"", _json(_table(answers, count)).encode()
    if len(data) > PLAIN:
        packed, data = b"gzip", base64.b64encode(gzip.compress(data, compresslevel=9, mtime=0))
    return b'<script type="application/json" id="answers" data-packed="%b">%b</script>' % (packed, data)


def _table(answers: Sequence[Answers], count: int) -> dict[str, Any]:
    """Return the answers as the script reads them: a list of the distinct texts, and indices into it."""
    texts: dict[str, int] = {}
    rows = {
        answered.label: {
            "preferences": answered.preferences,
            "texts": [[texts.setdefault(text, len(texts)) for text in row[:count]] for row in answered.responses],
            "scores": [
                [[float(f"{value:.4g}") for value in score] for score in row[:count]] for row in answered.scores
            ],
        }
        for answered in answers
    }
    total = len(answers[0].prompts) if answers else 0
    note = "" if count == total else f"The first {count} of {total} prompts: the others would make this page too large."
    prompts = list(answers[0].prompts[:count]) if answers else []
    return {"note": note, "prompts": prompts, "rows": rows, "texts": list(texts)}

"""Texts that attack whatever shows them, as a model, a data set, a card or a library's error may hold them."""

from __future__ import annotations

TEXTS = {
    "clears the screen": "a\x1b[2Jb",
    "sets the title": "\x1b]0;owned\x07",
    "rings": "a\x07b",
    "overwrites the line": "innocent\rerror: forged",
    "takes back": "wrong\b\b\b\b\bright",
    "deletes": "a\x7fb",
    "one byte that is an escape sequence": "a\x9b31mb",
    "next line": "a\x85error: forged",
    "reorders": "a\u202egnp.exe\u202c",
    "isolates": "\u2066a\u2069",
    "line separator": "a\u2028error: forged\u2029error: forged",
    "forges a line": "a\nerror: forged\nscores     helpfulness 1.000",
    "rich markup": "[red]a[/red] [link=http://evil.example]here[/link] :smile:",
    "HTML": "<script>alert(1)</script><!-- </table> &lt;b&gt;",
    "Markdown": "# a | b `c` **d** ![x](http://evil.example) ~~e~~ ```",
}
ALL = " ".join(TEXTS.values())
"""All of them in one text."""


def acting(shown: str) -> list[str]:
    """Return what of a shown text acts on a terminal; a newline and a tab do not, but a forged line does."""
    control = {chr(code) for code in (*range(32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    control |= {"\u2028", "\u2029"}
    found = sorted(set(shown) & (control - {"\n", "\t"}))
    forged = [line for line in shown.split("\n") if line.startswith(("error: forged", "scores     helpfulness 1.000"))]
    return [*map(repr, found), *forged]

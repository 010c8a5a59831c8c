"""How text that others wrote is shown: nothing in it can move a cursor, hide, reorder or add a line."""

from __future__ import annotations

import itertools
import re
import shlex
import unicodedata
from collections.abc import Iterable

PROSE = "\n\t"
"""What text of several lines keeps; everything else is one line."""

_HOSTILE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, line and paragraph separators, what reorders a line (bidirectional embeddings, overrides and
isolates), half surrogate pairs."""
_SHAPELESS = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str, keep: str = "") -> str:
    r"""Return text as a terminal may show it: characters that act on what is shown are escaped as in Python.

    Those in ``keep`` stay. Data (JSON, CSV, Parquet) is written as it is and never passes here.

    >>> visible("a\n\x1b[2J\u202eb"), visible("a\n\tb\r", PROSE)
    ('a\\n\\x1b[2J\\u202eb', 'a\n\tb\\r')
    """
    return _HOSTILE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), text)


def shaped(text: str) -> str:
    r"""Return the text with everything escaped that has no shape of its own: also format and unknown characters.

    >>> shaped("a\tb\u200d")
    'a\\tb\\u200d'
    """
    return "".join(_escape(char) if unicodedata.category(char) in _SHAPELESS else char for char in text)


def distinct(names: Iterable[str]) -> list[str]:
    """Return the names, told apart: one that was there before gets a number.

    >>> distinct(["a", "b", "a", "a"])
    ['a', 'b', 'a-2', 'a-3']
    """
    found: list[str] = []
    for name in names:
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        found.append(name if name not in found else next(other for other in numbered if other not in found))
    return found


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def command(*words: object) -> str:
    """Return a command of moalign as it is typed: what a shell would take apart is quoted.

    >>> command("eval", "my runs/ab12")
    "moalign eval 'my runs/ab12'"
    """
    return shlex.join(["moalign", *map(str, words)])

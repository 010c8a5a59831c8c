"""What a command did: it worked, it was refused well, or something escaped. Kept case by case, counted for the page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from warm import Ended

CODES = {0, 1, 2, 130, 143}
LONGEST = 2100
"""Characters of a message that a person can still read."""
RAW = {
    "Traceback (most recent call last)": "a traceback",
    "the same command with --debug shows where": "a fault that nobody meant to raise",
    "validation error": "pydantic's own words",
    "errors.pydantic.dev": "pydantic's own words",
    "Exception ignored in": "an exception that was ignored",
}
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys or reorders text by, instead of showing it; progress bars go only to a terminal."""


@dataclass(frozen=True)
class Case:
    """One thing that was tried."""

    part: str
    number: int
    outcome: str
    """worked, refused, escaped or lost."""
    what: str
    """The command, or what was done to which file."""
    why: str = ""
    """Of an escape or a loss: what was wrong. Of a refusal: the message."""
    tried: int = 1
    refused: int = 0
    """Of several inputs in one case: how many were refused well."""
    escaped: int = 0
    """Of several inputs in one case: how many kinds of escapes there were."""


class Tally:
    """The cases of one session of breaking, in a file of a line each: what was tried is not tried again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.cases = [Case(**json.loads(line)) for line in lines]

    def add(self, case: Case) -> None:
        """Keep a case."""
        self.cases.append(case)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(case)) + "\n")

    def next(self, part: str) -> int:
        """Return the number of the first case of a part that is still to be tried, or again: its line was taken out."""
        tried = self.done(part)
        return next(number for number in range(len(tried) + 1) if number not in tried)

    def done(self, part: str) -> set[int]:
        """Return the numbers of the cases of a part that were tried."""
        return {case.number for case in self.cases if case.part == part}

    def faults(self) -> list[Case]:
        """Return the cases that escaped or lost something, one of each kind; ``tried`` is how many are of its kind."""
        kinds: dict[tuple[str, str], list[Case]] = {}
        for case in self.cases:
            if case.outcome in ("escaped", "lost"):
                for why in case.why.split(" || "):
                    one = Case(case.part, case.number, case.outcome, case.what, why)
                    kinds.setdefault((case.part, kind_of(re.sub("^input ", "", why))), []).append(one)
        return [Case(**{**asdict(same[0]), "tried": len(same)}) for same in kinds.values()]

    def table(self, parts: Mapping[str, str]) -> Iterator[str]:
        """Yield the lines of the Markdown table; ``parts`` has every part in words."""
        yield "| part | tried | worked | refused well | escaped | of these tracebacks | lost |"
        yield "|---|---:|---:|---:|---:|---:|---:|"
        for part, words in parts.items():
            cases = [case for case in self.cases if case.part == part]
            lost = sum(case.outcome == "lost" for case in cases)
            escapes = [case for case in cases if case.outcome == "escaped"]
            escaped = sum(max(1, case.escaped) for case in escapes)
            tried = sum(case.tried for case in cases)
            refused = sum(case.refused + (case.outcome == "refused") for case in cases)
            raw = sum("a traceback" in case.why or "nobody meant" in case.why for case in escapes)
            worked = tried - refused - escaped - lost
            yield f"| {words} | {tried:,} | {worked:,} | {refused:,} | {escaped} | {raw} | {lost} |"


def kind_of(why: str) -> str:
    """Return a fault without what differs between two of its kind: numbers, names in quotes, paths."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", why)
    return re.sub(r"\S*/\S+", "PATH", re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "N", text))[:160]


def fault(ended: Ended) -> str:
    """Return what is wrong with the way in which a command ended; empty when it worked or was refused well."""
    if ended.stopped == "time":
        return f"still at work after {ended.seconds:.0f} s"
    text = ended.err + ended.out
    for mark, meaning in RAW.items():
        if mark in text:
            return f"{meaning}: {_last(ended.err)}"
    if ended.code < 0 and ended.stopped != "SIGKILL":
        return f"ended by signal {-ended.code} {'that it was sent, with no word' if ended.stopped else ''}"
    if ended.code >= 0 and ended.code not in CODES:
        return f"exit code {ended.code}"
    if hidden := HIDDEN.search(text):
        place = "stderr" if HIDDEN.search(ended.err) else "stdout"
        return f"the character U+{ord(hidden[0]):04X} raw on {place}"
    return _message(ended) or _object(ended)


def _message(ended: Ended) -> str:
    """Return what is wrong with the message of a command that failed."""
    if ended.code not in (1, 2):
        return ""
    if not ended.errors:
        return f"exit code {ended.code} without a message"
    after = ended.err.split("error: ", 1)[1].rstrip("\n").split("\n")[1:]
    strange = [line for line in after if not line.startswith(("error: ", "warning: ", "note: "))]
    if strange and "a command is missing" not in ended.err:
        return f"a message of more than one line: {strange[0][:200]!r}"
    longest = max(ended.errors, key=len)
    return f"a message of {len(longest)} characters: {longest[:200]}" if len(longest) > LONGEST else ""


def _object(ended: Ended) -> str:
    """Return what is wrong with ``--json``: one object where it worked, else nothing."""
    if "--json" not in ended.arguments or ended.code or {"--help", "-h", "--version"} & set(ended.arguments):
        return ""
    try:
        return "" if isinstance(json.loads(ended.out), dict) else "--json printed no object"
    except ValueError as error:
        return f"--json printed no JSON ({error}): {ended.out[:100]!r}"


def _last(text: str) -> str:
    lines = [line for line in text.strip().split("\n") if line.strip()]
    return lines[-1][:400] if lines else ""


def case_of(part: str, number: int, ended: Ended, what: str, why: str = "") -> Case:
    """Return the case of one command; ``why``: what was found wrong beside the way in which it ended."""
    if problem := fault(ended) or why:
        return Case(part, number, "escaped", what, problem)
    if ended.code in (1, 2):
        return Case(part, number, "refused", what, " / ".join(ended.errors)[:200])
    return Case(part, number, "worked", what)

"""``make break``: tries to break moalign, at random and repeatably, until the minutes are over.

    python tests/breaking --minutes 30            goes on where the last session ended
    python tests/breaking --short                 what the tests run: a little of everything
    python tests/breaking --only wrong:17         one case again
    python tests/breaking --minutes 0 --publish results/reliability.md

Exit code 1 when anything escaped or was lost.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from types import ModuleType

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import tally  # noqa: E402
import warm  # noqa: E402
from bench import Bench  # noqa: E402

PARTS = {
    "kills": ("commands killed at random, then given again", 69, 3),
    "wrong": ("wrong requests, cards and recipes", 2000, 60),
    "damage": ("damaged files of finished runs", 1000, 25),
    "loaders": ("inputs to the loaders", 950, 5),
    "hostile": ("hostile texts through every output", 200, 8),
}
"""Part: in words, cases of a whole session, cases of the short form."""


def work(bench: Bench, kept: tally.Tally, parts: list[str], minutes: float, short: bool) -> None:
    """Run cases of each part in turn until its cases or its share of the time is used up."""
    end = time.monotonic() + 60 * minutes
    for place, part in enumerate(parts):
        module = importlib.import_module(part)
        share = (end - time.monotonic()) / (len(parts) - place)
        until = time.monotonic() + share
        most = PARTS[part][2 if short else 1]
        while kept.next(part) < most and time.monotonic() < until:
            one(module, bench, kept, kept.next(part))
        print(f"{part}: {len(kept.done(part))} of {most} cases", flush=True)


def one(module: ModuleType, bench: Bench, kept: tally.Tally | None, number: int) -> None:
    """Run a case, and keep it."""
    case = module.case(bench, number)
    if kept is not None:
        kept.add(case)
    if kept is None or case.outcome in ("escaped", "lost"):
        print(f"{case.part}:{number} {case.outcome}\n    {case.what}\n    {case.why}", flush=True)


def page(kept: tally.Tally, seed: int) -> str:
    """Return the page of figures."""
    faults = kept.faults()
    lines = [
        "# Reliability: what was tried to break moalign",
        "",
        f"Made by `make break` (`tests/breaking`, seed {seed}). An escape is a traceback, another exit code than 0,",
        "1, 2, 130 and 143, an error without one clear line, something half-written, or a control character that",
        "reaches a terminal. Lost: a result that an interruption or a damage elsewhere took away or changed. Of the",
        "loaders, escapes of one kind in one batch of 500 to 2,000 inputs count once.",
        "",
        *kept.table(
            {part: f"{words} ({len(kept.done(part)):,} of {most:,} cases)" for part, (words, most, _) in PARTS.items()}
        ),
        "",
        "A case of the first part is one command killed up to three times; of the loaders it is a batch of inputs.",
        "",
    ]
    if faults:
        lines += ["## Open", "", "| case | times | what | found |", "|---|---:|---|---|"]
        cell = lambda text: tally.HIDDEN.sub("?", text[:160]).replace("|", "\\|").replace("\n", " ")  # noqa: E731
        lines += [
            f"| {case.part}:{case.number} | {case.tried} | {cell(case.what)} | {cell(case.why)} |" for case in faults
        ]
        lines += ["", f"Repeat one with `python tests/breaking --seed {seed} --only PART:NUMBER`.", ""]
    return "\n".join(lines)


def main() -> int:
    """Break things as the options say."""
    parser = argparse.ArgumentParser(description="Try to break moalign.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "build" / "breaking")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", metavar="PART:NUMBER")
    parser.add_argument("--publish", type=Path, metavar="FILE")
    given = parser.parse_args()
    bench = Bench(given.work / f"seed-{given.seed}", given.seed)
    kept = tally.Tally(bench.work / "cases.jsonl")
    if given.only or given.minutes > 0:
        warm.up()
    if given.only:
        part, number = given.only.split(":")
        one(importlib.import_module(part), bench, None, int(number))
        return 0
    work(bench, kept, given.parts.split(","), given.minutes, given.short)
    print("\n".join(kept.table({part: words for part, (words, _, _) in PARTS.items()})))
    if given.publish is not None:
        given.publish.write_text(page(kept, given.seed), encoding="utf-8")
    return int(bool(kept.faults()))


if __name__ == "__main__":
    sys.exit(main())

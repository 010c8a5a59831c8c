"""How fast the judge calculates, and how large a page becomes; called by ``bench.py`` (``--judge`` alone)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = 10_000
PUBLISHED = Path(__file__).resolve().parents[1] / "published"


def judged(repeats: int) -> dict[str, Any]:
    """Return, in this process, hypervolume over moocore's own call, and a page's size and time.

    ``hypervolume``: for 2, 3 and 4 objectives the median of our time over moocore's on the same array of 10,000
    points on a sphere, none of which dominates another (promised <= 1.1). ``page``: bytes (promised <= 10 MB) and
    seconds of the page of 10 methods, 11 preferences and 256 prompts with answers of 22 words (the sandbox's) and of
    90 (128 tokens of text).
    """
    return {
        "points": POINTS,
        "hypervolume": {str(m): _ratio(m, repeats) for m in (2, 3, 4)},
        "page": {str(words): _page(words) for words in (22, 90)},
    }


def _ratio(objectives: int, repeats: int) -> float:
    import moocore
    import numpy as np

    from moalign.pareto.hypervolume import hypervolume

    points = np.abs(np.random.default_rng(objectives).normal(size=(POINTS, objectives)))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    ref = np.zeros(objectives)
    ours, theirs = [], []
    for _ in range(repeats):  # in turns, so that what else the machine does meets both
        theirs.append(_seconds(lambda: moocore.hypervolume(points, ref=ref, maximise=True)))
        ours.append(_seconds(lambda: hypervolume(points, ref)))
    return round(statistics.median(ours) / statistics.median(theirs), 3)


def _page(words: int) -> dict[str, float]:
    import numpy as np

    from moalign.core import preferences
    from moalign.report import page

    rng = np.random.default_rng(0)
    vocabulary = ["".join(letters) for letters in rng.choice(list("abcdefghijklmnop"), (4000, 5))]
    grid = preferences.grid(2, 10)
    record = json.loads((PUBLISHED / "sandbox" / "compare.json").read_text(encoding="utf-8"))
    record["rows"], answers = record["rows"][:10], []
    for label in (row["label"] for row in record["rows"]):
        texts = [[" ".join(rng.choice(vocabulary, words)) for _ in range(256)] for _ in grid]
        scores = rng.normal(size=(len(grid), 256, 2)).tolist()
        answers.append(page.Answers(label, grid, [f"prompt {i}" for i in range(256)], texts, scores))
    content = b""

    def make() -> None:
        nonlocal content
        content = page.page(record, answers)

    seconds = _seconds(make)
    return {"bytes": len(content), "seconds": round(seconds, 2)}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

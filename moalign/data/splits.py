"""Fixed splits: which part of the data a prompt belongs to is a function of its text alone.

Nothing depends on the order or the number of prompts, so a file that grows or is shuffled keeps
every old prompt where it was. Prompts that differ only in case, white space or the way accents are
encoded count as the same prompt: they fall into the same split.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from moalign.config.card import SplitSpec
from moalign.core.errors import RequestError
from moalign.data.dialogue import shorten

SplitName = Literal["train", "calibration", "eval"]
SPLITS: tuple[SplitName, ...] = ("train", "calibration", "eval")
LEAST = {"train": 1, "calibration": 1, "eval": 2}
"""Prompts that a split needs."""
LEAKS_SHOWN = 5


def normalised(prompt: str) -> str:
    """Return the form in which prompts are compared: white space collapsed, case folded (Unicode's caseless match)."""
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", prompt).casefold())
    return " ".join(folded.split())


def split_of(prompt: str, spec: SplitSpec) -> SplitName:
    """Return the split of a prompt: sha256 of salt and normalised prompt, read as a number in [0, 1)."""
    digest = hashlib.sha256(f"{spec.salt}\0{normalised(prompt)}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < spec.train:
        return "train"
    return "calibration" if share < spec.train + spec.calibration else "eval"


def split(prompts: Iterable[str], spec: SplitSpec, home: Callable[[str], str] = str) -> dict[str, list[str]]:
    """Return the prompts of every split, in the order given; each is in the split of its ``home``, another prompt.

    Raises RequestError when a split stays empty, or eval has a single prompt, with the number of prompts in each.
    """
    parts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for prompt in prompts:
        parts[split_of(home(prompt), spec)].append(prompt)
    few = [name for name in SPLITS if len(parts[name]) < LEAST[name]]
    if few:
        counts = ", ".join(f"{name} {len(parts[name])}" for name in SPLITS)
        total = sum(len(part) for part in parts.values())
        raise RequestError(
            f"splits: too few prompts fall into {' and '.join(few)} ({total} prompts: {counts}); every split needs at "
            "least one, eval two, whose spread says how sure a result is: give more prompts, larger shares, or another "
            "splits.salt"
        )
    return parts


def check_leaks(splits: Mapping[str, Sequence[str]]) -> None:
    """Raise RequestError when one prompt is in two splits; names the prompt and both splits.

    Prompts are compared as :func:`normalised`. The first few leaks are listed, the rest counted.
    """
    home: dict[str, tuple[str, str]] = {}
    leaks: dict[tuple[str, str], str] = {}
    for name, prompts in splits.items():
        for prompt in prompts:
            key = normalised(prompt)
            first, text = home.setdefault(key, (name, prompt))
            if first != name:
                same = "" if text == prompt else f" (there as {shorten(text)})"
                places = f"the prompt {shorten(prompt)} is in {name} and in {first}{same}"
                leaks.setdefault((key, name), f"splits: {places}; a prompt may be in one split only")
    problems = list(leaks.values())
    if len(problems) > LEAKS_SHOWN:
        problems[LEAKS_SHOWN:] = [f"splits: {len(problems) - LEAKS_SHOWN} more prompts are in two splits"]
    if problems:
        raise RequestError(*problems)

"""Preference pairs for reward models: data sets (annotator groups) by name, split by a hash of the prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moalign.config.card import SourceSpec, SplitSpec
from moalign.core.errors import RequestError
from moalign.core.seeds import derive
from moalign.data import load, splits
from moalign.data.readers import stem

SHOWN = 3
"""Data sets named in a message."""


@dataclass
class PairSet:
    """The pairs of one data set or annotator group."""

    name: str
    prompts: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    chance: list[float] = field(default_factory=list)
    """The true probability that ``chosen`` is preferred, where it is known (the sandbox's annotators); else empty."""

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.prompts)

    def add(self, prompt: str, chosen: str, rejected: str, chance: float | None = None) -> None:
        """Append one pair."""
        self.prompts.append(prompt)
        self.chosen.append(chosen)
        self.rejected.append(rejected)
        if chance is not None:
            self.chance.append(chance)

    def pick(self, rows: Sequence[int]) -> PairSet:
        """Return the pairs at ``rows``, in that order."""
        prompts, chosen, rejected = (
            [column[row] for row in rows] for column in (self.prompts, self.chosen, self.rejected)
        )
        return PairSet(self.name, prompts, chosen, rejected, [self.chance[row] for row in rows if self.chance])

    def bag(self, seed: int) -> PairSet:
        """Return a bootstrap sample: as many pairs, drawn with replacement."""
        return self.pick(np.random.default_rng(seed).integers(len(self), size=len(self)).tolist())

    def split(self, spec: SplitSpec) -> dict[str, PairSet]:
        """Return the pairs of every split; which one a pair is in follows from its prompt alone."""
        rows: dict[str, list[int]] = {name: [] for name in splits.SPLITS}
        for row, prompt in enumerate(self.prompts):
            rows[splits.split_of(prompt, spec)].append(row)
        return {name: self.pick(indices) for name, indices in rows.items()}


def read(sources: Sequence[tuple[str | None, SourceSpec]], base_dir: Path | str = ".") -> list[PairSet]:
    """Read pair files: columns prompt, chosen, rejected (or whole dialogues), and optionally ``group``.

    ``sources`` are (name, file or hub data set): a row's ``group`` names its data set, else the source's name does,
    else the file's own. Relative paths begin at ``base_dir``.

    Raises RequestError for whatever is wrong with a file, with its line; both replies of a pair the same text; two
    files that would share a name that nobody gave.
    """
    sets: dict[str, PairSet] = {}
    named_by: dict[str, str] = {}  # data set -> the file whose own name it has
    for name, source in sources:
        for group, pair in load.load_grouped_pairs(source, base_dir):
            key = group or name
            if key is None:
                key = stem(source.path)
                if named_by.setdefault(key, source.path) != source.path:
                    raise RequestError(
                        f"--pairs: {named_by[key]} and {source.path} would both be named {key}; give names: NAME=FILE "
                        "(one name for both makes one data set of them)"
                    )
            sets.setdefault(key, PairSet(key)).add(pair.prompt, pair.chosen, pair.rejected)
    if not sets:
        raise RequestError("--pairs: the files hold no pairs")
    return list(sets.values())


def split_all(sets: Sequence[PairSet], spec: SplitSpec) -> dict[str, list[PairSet]]:
    """Return every data set's pairs by split.

    Raises RequestError when a data set has none in ``train`` or ``eval``.
    """
    parts = [pair_set.split(spec) for pair_set in sets]
    by_split: dict[str, list[PairSet]] = {name: [part[name] for part in parts] for name in splits.SPLITS}
    for needed in ("train", "eval"):
        empty = [pair_set.name for pair_set in by_split[needed] if not len(pair_set)]
        if not empty:
            continue
        counts = "; ".join(
            f"{pair_set.name}: " + ", ".join(f"{name} {len(part[name])}" for name in splits.SPLITS)
            for pair_set, part in list(zip(sets, parts, strict=True))[:SHOWN]
        )
        raise RequestError(
            f"pairs: the split {needed} of {', '.join(empty[:SHOWN])} is empty ({counts}); give more pairs, "
            "larger shares (--set splits={train: .., calibration: .., eval: ..}) or another splits.salt"
        )
    return by_split


def content_hash(sets: Sequence[PairSet]) -> str:
    """Return 16 hex digits over every pair in order."""
    digest = hashlib.sha256()
    for pair_set in sets:
        for row in range(len(pair_set)):
            for text in (pair_set.name, pair_set.prompts[row], pair_set.chosen[row], pair_set.rejected[row]):
                data = text.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def row_order(sizes: Sequence[int], steps: int, batch: int, parts: int, seed: int) -> NDArray[np.intp]:
    """Return the row at each position of each step, ``[steps * batch]``.

    Rows of all data sets (``sizes`` pairs each) are numbered consecutively. Each data set is read in reshuffled passes;
    each of the ``parts`` of a step holds the same number of pairs of every data set.
    """
    each = batch // (parts * len(sizes))
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    columns = []
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(derive(seed, "order", number))
        needed = steps * parts * each
        passes = [rng.permutation(size) for _ in range(-(-needed // size))]
        columns.append(offsets[number] + np.concatenate(passes)[:needed].reshape(steps * parts, each))
    return np.concatenate(columns, axis=1).reshape(-1)

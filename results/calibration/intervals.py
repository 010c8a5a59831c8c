"""How often 95 % intervals of the hypervolume hold the truth, in simulated evaluations whose truth is known.

The truth of a policy is the hypervolume of its expected scores, over all prompts of the task and all its answers; that
of a method trained with several seeds is the mean of this over all seeds that there could be; that of a pair is the
difference of two such. Scores are simulated for 11 preferences and two objectives like those measured on the task
`assistant` (28 evaluations): a part of each prompt that all preferences share (standard deviation .09) and a part of
each answer (.18, averaged over the answers), both skewed to the left (-.5), objectives correlated by -.7. Methods of a
pair share the prompts' part. Training seeds move the whole front. Resampling and intervals are those of the package
(`moalign.pareto.statistics`); only the hypervolume is computed for many sets at once.

    python results/calibration/intervals.py [--sets N] [--draws N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moalign.pareto.statistics import Resampled, interval, resample, student

HERE = Path(__file__).resolve().parent
PROMPTS = (32, 128, 512)
K = 11
_W = np.linspace(0, 1, K)
FRONTS = {
    "concave": 0.15 + 0.75 * np.stack([np.sin(_W * np.pi / 2), np.cos(_W * np.pi / 2)], axis=1),
    "lower concave": 0.12 + 0.75 * np.stack([np.sin(_W * np.pi / 2), np.cos(_W * np.pi / 2)], axis=1),
    "linear": np.stack([0.2 + 0.6 * _W, 0.8 - 0.6 * _W], axis=1),
    "narrow": np.stack([0.5 + 0.1 * _W, 0.6 - 0.1 * _W], axis=1),
    "five policies": np.stack([0.2 + 0.6 * np.round(4 * _W) / 4, 0.8 - 0.6 * np.round(4 * _W) / 4], axis=1),
    "one policy": np.full((K, 2), 0.5),
}
_MIX = np.linalg.cholesky(np.array([[1.0, -0.7], [-0.7, 1.0]])).astype(np.float32).T


@dataclass(frozen=True)
class Cell:
    """One kind of evaluation: a front, or two whose difference is taken, and how it is measured."""

    front: str
    against: str | None = None
    prompts: int = 128
    seeds: int = 1
    between: float = 0.0
    """Standard deviation by which a training seed moves each objective of its front."""
    answers: int = 4

    def truth(self) -> float:
        """Return the number that the interval should hold."""
        shifts = np.random.default_rng(1).normal(0, self.between, (100_000 if self.between else 1, 1, 2))
        value, *other = (hypervolume(FRONTS[name] + shifts).mean() for name in (self.front, self.against) if name)
        return float(value - sum(other))


def hypervolume(points: np.ndarray) -> np.ndarray:
    """Return the areas ``[...]`` between fronts of points ``[..., k, 2]`` and the reference point (0, 0)."""
    pairs = np.maximum(points, 0).reshape(-1, *points.shape[-2:])
    order = np.argsort(-pairs[..., 0], axis=-1)
    x, y = np.moveaxis(pairs[np.arange(len(pairs))[:, None], order], -1, 0)
    steps = -np.diff(x, axis=-1, append=0)
    return np.asarray((steps * np.maximum.accumulate(y, axis=-1)).sum(axis=-1).reshape(points.shape[:-2]))


def _noise(rng: np.random.Generator, scale: float, *shape: int) -> np.ndarray:
    """Return noise ``[*shape, 2]`` of mean 0: a gamma's, of skewness -.5."""
    return (4 - rng.standard_gamma(16, size=(*shape, 2), dtype=np.float32) / 4) * np.float32(scale) @ _MIX


def simulate(cell: Cell, sets: int, draws: int) -> Iterator[Resampled]:
    """Yield the resampled hypervolumes, or differences, of ``sets`` evaluations in all: ``observed [seeds, some]``."""
    n, seeds = cell.prompts, cell.seeds
    names = [cell.front] if cell.against is None else [cell.front, cell.against]
    # Own streams for the sets and for the resampling, which the package starts from a seed.
    rng = np.random.default_rng([n, seeds, *map(ord, "".join(names))])
    size = max(1, 100 // (seeds * len(names)))
    for start in range(0, sets, size):
        some = min(size, sets - start)
        shared = _noise(rng, 0.09, n, some, 1)
        both = []
        for name in names:
            tables = []
            for _ in range(seeds):
                seed = rng.normal(0, cell.between, (some, 1, 2)).astype(np.float32)
                answers = _noise(rng, 0.18 / cell.answers**0.5, n, some, K)
                tables.append((FRONTS[name].astype(np.float32) + seed + shared + answers).reshape(n, -1, 2))
            means = resample(tables, draws, seed=start)
            areas = [hypervolume(values.reshape(-1, seeds, some, K, 2)) for values in (means.observed, means.draws)]
            both.append(Resampled(areas[0][0], areas[1], n))
        yield both[0] if len(both) == 1 else both[0] - both[1]


def percentile(part: Resampled, seed: int) -> np.ndarray:
    """Return the interval ``[2, sets]`` that the package had before: percentiles of resampled prompts and seeds."""
    plain = part.draws[: len(part.draws) // 2]
    draws, seeds = plain.shape[:2]
    centre = drawn = plain.mean(axis=1)
    if seeds > 1:
        picks = np.random.default_rng(seed).integers(seeds, size=(draws, seeds))
        drawn = plain[np.arange(draws)[:, None], picks].mean(axis=1)
        drawn = centre + (seeds / (seeds - 1)) ** 0.5 * student(0.95, seeds) / 1.959964 * (drawn - centre)
    return np.asarray(np.quantile(drawn, [0.025, 0.975], axis=0))


def coverage(cell: Cell, sets: int, draws: int) -> dict[str, float]:
    """Return the share of ``sets`` whose interval held the truth: ``before``, ``now``, and on which side it missed."""
    truth = cell.truth()
    parts = list(simulate(cell, sets, draws))
    before = np.concatenate([percentile(part, seed) for seed, part in enumerate(parts)], axis=1)
    low, high = np.concatenate([interval(part) for part in parts], axis=1)
    return {
        "before": float(((before[0] <= truth) & (truth <= before[1])).mean()),
        "now": float(((low <= truth) & (truth <= high)).mean()),
        "below": float((truth < low).mean()),
        "above": float((high < truth).mean()),
        "width": float((high - low).mean() / (before[1] - before[0]).mean()),
    }


PAIRS = (("concave", "lower concave"), ("concave", "linear"), ("linear", "linear"))
TABLES = {
    "Single evaluations": [Cell(front, None, n) for front in ("concave", "linear") for n in PROMPTS],
    "Paired differences": [Cell(a, b, n) for a, b in PAIRS for n in PROMPTS],
    "Over training seeds": [
        Cell(front, None, n, seeds, between)
        for seeds in (3, 5)
        for front, between in (("concave", 0.0), ("concave", 0.02), ("linear", 0.02))
        for n in PROMPTS
    ],
    "Paired differences over training seeds": [
        Cell("concave", "lower concave", n, seeds, 0.02) for seeds in (3, 5) for n in PROMPTS
    ],
    "Where noise makes the front": [
        Cell(front, None, n) for front in ("narrow", "five policies", "one policy") for n in PROMPTS
    ],
}
HARD = (
    "Preferences that the policy hardly heeds, or not at all: their points differ by less than their noise, which "
    "spreads them into a front that is not there. Nothing estimates that spread without error: of a policy that heeds "
    "no preference nine intervals in ten hold the truth, not 95 %."
)


def row(cell: Cell, sets: int, draws: int) -> str:
    """Simulate a cell and return its row of the table."""
    found = coverage(cell, sets, draws)
    name = cell.front if cell.against is None else f"{cell.front} - {cell.against}"
    shares = " | ".join(f"{100 * found[key]:.1f}" for key in ("before", "now", "below", "above"))
    return f"| {name} | {cell.prompts} | {cell.seeds} | {cell.between:g} | {shares} | {found['width']:.2f} |"


def main() -> None:
    """Simulate every cell and write ``intervals.md``."""
    parser = argparse.ArgumentParser(description="coverage of the hypervolume's intervals, by simulation")
    parser.add_argument("--sets", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=400)
    options = parser.parse_args()
    started = time.monotonic()
    head = (
        "| front | prompts | seeds | between seeds | before, % | now, % | truth below, % | truth above, % | width |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    )
    about = (__doc__ or "").split("\n\n")
    error = 100 * (0.95 * 0.05 / options.sets) ** 0.5
    pages = [
        f"# {about[0]}",
        f"    python results/calibration/intervals.py --sets {options.sets} --draws {options.draws}",
        about[1],
        f"{options.sets} sets in each row (standard error {error:.1f} points), {options.draws} resamples. *Before*: "
        "percentiles, as the package had them, of the half that is not mirrored (with more resamples they cover up to "
        "a point more: last table). *Width*: the interval's over that of percentiles.",
    ]
    for title, cells in TABLES.items():
        rows = []
        for cell in cells:
            rows.append(row(cell, options.sets, options.draws))
            print(rows[-1], flush=True)
        pages += [f"## {title}", *([HARD] if title.startswith("Where") else []), "\n".join([head, *rows])]
    draws = [row(Cell("linear"), options.sets, count).replace("linear", f"{count} resamples") for count in (100, 1000)]
    pages += ["## How many resamples", "A linear front, one seed.", "\n".join([head.replace("front", ""), *draws])]
    (HERE / "intervals.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

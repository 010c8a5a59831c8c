"""Is `assistant` a trade-off? Corners of the base's own answers, best of four, with no method in between.

The pool holds eight answers to each of 96 training questions: two draws of four. For every preference the best of each
draw by w.z is kept; intervals are over questions, 95 %, 2,000 resamples. Reads the pool that any run on the task makes:

    python results/published/assistant/corners.py results
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moalign.config.load import load_card
from moalign.tasks.load import make_task


def main(results: Path) -> None:
    """Print mean and interval width of both objectives at each preference of the grid."""
    task = make_task(load_card("assistant", []), results)
    scored, panel = task.scored(), task.panel.with_normaliser(task.normaliser)
    z, unit = panel.z(scored.raw), panel.unit(scored.raw)
    answers: dict[str, list[int]] = {}
    for row, prompt in enumerate(scored.prompts):
        answers.setdefault(prompt, []).append(row)
    draws = np.array(list(answers.values())).reshape(len(answers), 2, -1)
    rng = np.random.default_rng(0)
    for preference in task.grid:
        best = (z @ np.array(preference))[draws].argmax(axis=2)
        means = unit[np.take_along_axis(draws, best[..., None], axis=2)[..., 0]].mean(axis=1)
        resampled = means[rng.integers(len(means), size=(2000, len(means)))].mean(axis=1)
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
        columns = zip(task.names, means.mean(axis=0), high - low, strict=True)
        print(preference, *(f"{name} {mean:.3f} (width {width:.3f})" for name, mean, width in columns))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))

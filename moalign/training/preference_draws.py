"""How the preferences of a rollout are drawn, and those of a distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moalign.core.preferences import dirichlet, on_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

Draw = Callable[[np.random.Generator, int], "NDArray[np.float64]"]
"""``(rng, count)`` -> preferences ``[count, objectives]``."""


def independent(
    given: Sequence[Sequence[float]] | None, objectives: int, alpha: float, resolution: int | None = None
) -> Draw:
    """Return a draw of one preference per prompt: of the given vectors (``--prefs``), else Dirichlet(alpha * 1).

    With ``resolution`` draws are moved to multiples of ``1 / resolution``. A model that reads its preference digit by
    digit cannot tell 20.0% from its neighbours when it never read it: a Dirichlet draw is never round and never a
    corner, while people and grids ask for round numbers and corners.
    """
    if given:
        vectors = np.asarray(given, dtype=np.float64)
        return lambda rng, count: vectors[rng.integers(len(vectors), size=count)]
    if resolution is None:
        return lambda rng, count: dirichlet(rng, objectives, count, alpha)
    return lambda rng, count: on_grid(dirichlet(rng, objectives, count, alpha), resolution)


def grouped(vectors: Sequence[Sequence[float]], groups: int) -> Draw:
    """Return a draw of ``groups`` different ones of some vectors, each for an equal part of the prompts."""
    every = np.asarray(vectors, dtype=np.float64)

    def draw(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        size = min(groups, len(every), count)
        chosen = rng.choice(len(every), size=size, replace=False)
        drawn: NDArray[np.float64] = every[chosen[np.arange(count) * size // count]]
        return drawn

    return draw

"""NSGA-II over a box of numbers, one generation at a time. Larger is better in every objective.

Source: Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", by pymoo: non-dominated
sorting, crowding distance, simulated binary crossover and polynomial mutation with pymoo's own settings. pymoo
minimises; its sign is decided here. pymoo draws from a generator of the search's own, so that a search is fixed by its
start, its seed and the values it was told: :meth:`Search.replay` goes on where another left off, with nothing else of
it kept.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from moalign.core.arrays import Matrix
from moalign.core.errors import WorkError
from moalign.core.preferences import grid
from moalign.pareto.front import check_points


class Search:
    """A population that is asked for what to evaluate and told what that is worth."""

    def __init__(self, start: Matrix, low: float, high: float, objectives: int, seed: int) -> None:
        """Begin with ``start`` ``[population, variables]``, each number within ``low`` and ``high``."""
        nsga2 = import_module("pymoo.algorithms.moo.nsga2")
        never = import_module("pymoo.core.termination").NoTermination()
        self._problem = import_module("pymoo.core.problem").Problem(
            n_var=start.shape[1], n_obj=objectives, xl=low, xu=high
        )
        self._nsga2: Any = nsga2.NSGA2(pop_size=len(start), sampling=start.copy())
        self._nsga2.setup(self._problem, termination=never, seed=seed)
        self._asked: Any = None

    def ask(self) -> Matrix:
        """Return the next generation ``[population, variables]``; it must be told before the next is asked for."""
        self._asked = self._nsga2.ask()
        return np.array(self._asked.get("X"), dtype=np.float64)

    def tell(self, values: Matrix) -> None:
        """Take what the generation asked for last is worth, ``[population, objectives]``, all finite."""
        static = import_module("pymoo.problems.static").StaticProblem
        evaluator = import_module("pymoo.core.evaluator").Evaluator()
        evaluator.eval(static(self._problem, F=-check_points(values, "values of a generation")), self._asked)
        self._nsga2.tell(infills=self._asked)

    def replay(self, points: Matrix, values: Matrix) -> None:
        """Go through generations that were evaluated before, ``[evaluations, ...]`` in their order.

        Raises WorkError when this search asks for other points: another version of pymoo, say.
        """
        done = 0
        while done < len(points):
            asked = self.ask()
            part = slice(done, done + len(asked))
            if not np.array_equal(asked, points[part]):
                raise WorkError(
                    f"the search asks for other points than those evaluated before (from number {done + 1} on): it was "
                    "begun by another version of pymoo or numpy; go on with that one, or train from the start"
                )
            self.tell(values[part])
            done += len(asked)


def lattice_and_random(population: int, experts: int, groups: int, low: float, high: float, seed: int) -> Matrix:
    """Return a start for weights of ``experts`` in ``groups``, ``[population, groups * experts]``.

    Up to half of it is the finest even grid of the simplex that fits, alike in all groups (rewarded soups' own models,
    the experts among them); the others are uniform in the box.
    """
    steps = 1
    while experts > 1 and len(grid(experts, steps + 1)) <= population // 2:
        steps += 1
    even = np.tile(np.asarray(grid(experts, steps)), (1, groups))[:population]
    rng = np.random.default_rng(seed)
    return np.concatenate([even, rng.uniform(low, high, size=(population - len(even), groups * experts))])

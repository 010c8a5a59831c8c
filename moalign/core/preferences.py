"""The preference vector: parse, check, grids, random draws, text form.

A preference ``w`` is a point of the simplex: one non-negative weight per objective, in the task's
order, summing to 1. Vectors are plain tuples of float; arrays are ``[preferences, objectives]``.
numpy and pymoo are imported where they are needed, so that messages and the command line's help do without them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING

from moalign.core.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

Preference = tuple[float, ...]

MOST_OBJECTIVES = 31
"""As many as the hypervolume library (moocore) takes."""
TOLERANCE = 1e-6
"""How far the sum of a preference may be from 1 (command-line contract)."""

ON_GRID = 1e-12
"""A weight this near to a fraction counts as that fraction: far above rounding errors, far below random draws."""

FINEST = 1000
"""Most steps of a grid."""

MOST_SPREAD = 200
"""Most points of a grid that is no even one."""


def validate(weights: Sequence[float], objectives: Sequence[str], where: str = "--prefs") -> Preference:
    """Return ``weights``, one for each of the task's ``objectives`` in their order, as a preference.

    Raises RequestError that begins with ``where``, the option or the place in a file.
    """
    shown = ",".join(f"{w:g}" for w in weights)
    if len(weights) != len(objectives):
        raise RequestError(
            f"{where} {shown}: {len(weights)} weight{'s' if len(weights) != 1 else ''}, but the task "
            f"has {len(objectives)} objectives ({', '.join(objectives)}); give one weight each"
        )
    for weight, name in zip(weights, objectives, strict=True):
        if not math.isfinite(weight):
            raise RequestError(f"{where} {shown}: the weight of {name} is {weight}; a finite number is needed")
        if weight < 0:
            raise RequestError(f"{where} {shown}: the weight of {name} is negative; allowed: 0 to 1")
    total = sum(weights)  # not fsum, which raises when the sum overflows
    if abs(total - 1.0) > TOLERANCE:
        option = "--prefs " if where == "--prefs" else ""
        hint = _normalised_form(weights, total, option)
        raise RequestError(f"{where} {shown}: the weights sum to {total:.10g}, not 1{hint}")
    return tuple(float(w) + 0.0 for w in weights)  # -0 is 0: one preference, one run


def _normalised_form(weights: Sequence[float], total: float, option: str) -> str:
    if total <= 0:
        return "; at least one weight must be positive"
    if not math.isfinite(total):
        return "; give weights between 0 and 1"
    # Printed with enough digits to be accepted when pasted back; what rounding leaves goes to the largest.
    parts = [round(w / total, 8) for w in weights]
    largest = parts.index(max(parts))
    parts[largest] = round(parts[largest] + 1.0 - math.fsum(parts), 8)
    return f"; did you mean {option}" + ",".join(f"{part:.10g}" for part in parts) + "?"


class Words(str):
    """A preference in words (``--prefs-text``): :func:`parse` reads it as :func:`from_words` does."""


def parse(text: str, objectives: Sequence[str] | Mapping[str, Sequence[str]], where: str = "--prefs") -> Preference:
    """Parse ``"0.3,0.7"``, or :class:`Words`, into a checked preference; ``objectives`` may say what names each.

    >>> parse("0.3,0.7", ["helpfulness", "harmlessness"])
    (0.3, 0.7)
    """
    if isinstance(text, Words):
        return from_words(
            text, objectives if isinstance(objectives, Mapping) else {name: [name] for name in objectives}
        )
    objectives = list(objectives)
    weights = []
    for part in text.split(","):
        try:
            weights.append(float(part if "_" not in part else "no number"))  # Python's 0_1 is more often a slip
        except ValueError:
            raise RequestError(
                f"{where} {text}: {part.strip()!r} is not a number; give {len(objectives)} "
                f"weights that sum to 1, like {example(len(objectives))}"
            ) from None
    return validate(weights, objectives, where)


def from_words(text: str, words: Mapping[str, Sequence[str]]) -> Preference:
    """Return equal weights for the objectives that a text names, 0 for the others (``--prefs-text``).

    ``words``: objective -> what names it, read as :func:`words_in` does. RequestError when nothing is named.

    >>> from_words("Helpful and funny", {"help": ["helpful"], "harmless": ["harmless"], "humor": ["humor", "funny"]})
    (0.5, 0.0, 0.5)
    """
    in_text = words_in(text)
    words = {name: [word for word in of_objective if words_in(word)] for name, of_objective in words.items()}
    named = [any(words_in(word) <= in_text for word in of_objective) for of_objective in words.values()]
    if not any(named):
        listed = "; ".join(f"{name}: {', '.join(of_objective)}" for name, of_objective in words.items())
        nearest = did_you_mean(text.strip().lower(), [word for of_objective in words.values() for word in of_objective])
        raise RequestError(f"--prefs-text {text!r}: it names no objective{nearest}; words that do, {listed}")
    return tuple(1.0 / sum(named) if is_named else 0.0 for is_named in named)


def words_in(text: str) -> set[str]:
    """Return the words of a text in lower case, without punctuation: ``Not dull!`` has ``not`` and ``dull``."""
    return set(re.findall(r"-*\w[\w-]*", text.lower()))


def required(text: str | None, objectives: Sequence[str] | Mapping[str, Sequence[str]]) -> Preference:
    """Parse what ``--prefs`` was given; raises RequestError with an example when it was not given at all."""
    if text is None:
        raise RequestError(
            f"--prefs is missing: one weight for each of {', '.join(objectives)}, "
            f"like --prefs {example(len(objectives))}"
        )
    return parse(text, objectives)


def example(objectives: int) -> str:
    """Return a valid preference of the given length as text, for messages."""
    return {1: "1", 3: "0.2,0.1,0.7"}.get(objectives, "0.3,0.7" + ",0" * (objectives - 2))


def served_example(served: Sequence[Sequence[float]], objectives: int) -> str:
    """Return a preference as ``--prefs`` takes it, for the next command: one of those that a run is known to serve.

    >>> served_example([(0.0, 1.0), (1 / 3, 2 / 3), (1.0, 0.0)], 2), served_example([], 2)
    ('0.33333333,0.66666667', '0.3,0.7')
    """
    texts = [typed(preference) for preference in served]
    shown = example(objectives)
    return shown if shown in texts or not texts else texts[len(texts) // 2]


def grid(objectives: int, steps: int) -> list[Preference]:
    """Return the Das-Dennis grid with ``steps`` divisions, from (0,..,1) to (1,..,0).

    For two objectives and 10 steps this is the field's 11-point grid. Corners are included.
    """
    if objectives < 1 or steps < 1:
        raise RequestError(f"a preference grid needs at least 1 objective and 1 step; found {objectives} and {steps}")
    if objectives <= 2:
        return [(1.0,)] if objectives == 1 else [(count / steps, (steps - count) / steps) for count in range(steps + 1)]
    return _reference_directions("das-dennis", objectives, n_partitions=steps)


def grid_of(objectives: int, points: int) -> list[Preference]:
    """Return a grid of exactly ``points`` vectors (``--grid N``): a Das-Dennis grid where one has that many.

    For two objectives every N >= 2 has one, for three only 3, 6, 10, 15, 21, ..., and the more objectives, the further
    they are apart (four: 4, 10, 20, 35; six: 6, 21, 56). Between them, from four objectives on, the points are spread
    by their Riesz energy (corners included) and rounded to multiples of 1/1000. Raises what :func:`require_grid` does.
    """
    steps = require_grid(objectives, points)
    return list(_spread(objectives, points)) if steps is None else grid(objectives, steps)


def require_grid(objectives: int, points: int, where: str = "--grid") -> int | None:
    """Return the steps of the even grid of exactly ``points`` vectors, None where a spread one takes its place.

    Raises RequestError, which begins with ``where`` and names the nearest sizes, where there is neither.
    """
    sizes = [math.comb(steps + objectives - 1, objectives - 1) for steps in range(1, FINEST + 1)]
    if points in sizes:
        return sizes.index(points) + 1
    if objectives > 3 and objectives < points <= MOST_SPREAD:
        return None
    if points > sizes[-1]:
        raise RequestError(f"{where} {points}: at most {sizes[-1]} points over {objectives} objectives")
    larger = next(index for index, size in enumerate(sizes) if size > points)
    near = " or ".join(str(size) for size in sizes[max(0, larger - 1) : larger + 1])
    raise RequestError(
        f"{where} {points}: no even grid over {objectives} objectives has {points} points; nearest: {near}"
    )


@functools.cache
def _spread(objectives: int, points: int) -> tuple[Preference, ...]:
    directions = _reference_directions("energy", objectives, n_points=points, seed=0)
    # Rounded, so that the last bits of pymoo's optimiser do not make another run of it.
    return tuple(sorted(map(tuple, on_grid(directions, FINEST).tolist())))


def _reference_directions(kind: str, objectives: int, **size: int) -> list[Preference]:
    pymoo = import_module("pymoo.util.ref_dirs")  # takes half a second
    return [tuple(point) for point in pymoo.get_reference_directions(kind, objectives, **size).tolist()]


def corner(objectives: int, index: int) -> Preference:
    """Return the one-hot preference for objective ``index``."""
    return tuple(1.0 if i == index else 0.0 for i in range(objectives))


def same(left: Sequence[float], right: Sequence[float]) -> bool:
    """Return whether two vectors are the same preference (0.1 + 0.2 is 0.3)."""
    return len(left) == len(right) and all(abs(a - b) <= TOLERANCE for a, b in zip(left, right, strict=True))


def dirichlet(rng: np.random.Generator, objectives: int, count: int, alpha: float = 1.0) -> np.ndarray:
    """Draw ``count`` preferences from Dirichlet(alpha * 1); float array ``[count, objectives]``."""
    return rng.dirichlet([alpha] * objectives, size=count)


def on_grid(weights: Sequence[Preference] | np.ndarray, steps: int) -> np.ndarray:
    """Move preferences ``[count, objectives]`` to the even grid of ``steps`` steps; they still sum to 1.

    By largest remainders: every weight becomes one of the two multiples of ``1 / steps`` beside it.
    """
    import numpy as np

    scaled = np.asarray(weights, dtype=np.float64) * steps
    below = np.floor(scaled)
    missing = np.rint(steps - below.sum(axis=1)).astype(np.int64)
    rank = np.argsort(np.argsort(below - scaled, axis=1, kind="stable"), axis=1)
    return np.asarray((below + (rank < missing[:, None])) / steps)


def to_text(weights: Sequence[float], objectives: Sequence[str], style: str = "percent") -> str:
    """Return a preference as the text that a policy reads.

    ``percent``: ``helpfulness 30.0% harmlessness 70.0%`` (MO-ODPO: percentages, one decimal);
    ``fraction``: ``helpfulness 0.3 harmlessness 0.7`` (MOC: one decimal). Where one decimal would merge points of a
    grid, as many are written as keep them distinct (:func:`decimals`); random draws keep one.
    """
    places = decimals(weights)
    if style == "percent":
        return " ".join(
            f"{name} {100 * w:.{max(1, places - 2)}f}%" for name, w in zip(objectives, weights, strict=True)
        )
    return " ".join(f"{name} {w:.{places}f}" for name, w in zip(objectives, weights, strict=True))


def decimals(weights: Sequence[float]) -> int:
    """Return how many decimals keep a vector distinct from all others of its grid: 1 to 4, the same for every weight.

    A weight with up to three decimals is written in full. Any other fraction k / q gets at least two decimals (1/3 is
    not 0.3), and as many as two such fractions, at least ``1 / q^2`` apart, need to differ. Grids of up to 1,000 steps
    are recognised from the weights alone; a random draw is on none.
    """
    return max((_decimals(weight) for weight in weights), default=1)


def _decimals(weight: float) -> int:
    def lies_on(value: float) -> bool:
        return abs(weight - value) < ON_GRID

    for places in (1, 2, 3):
        if lies_on(round(weight, places)):
            return places
    near = Fraction(weight).limit_denominator(FINEST)
    if lies_on(float(near)):
        return next((places for places in (2, 3) if near.denominator**2 < 10**places), 4)
    return 4 if lies_on(round(weight, 4)) else 1


def label(weights: Sequence[float]) -> str:
    """Return a short label such as ``0.3,0.7`` for tables, files and figures."""
    return ",".join(f"{w:.4g}" for w in weights)


def typed(weights: Sequence[float]) -> str:
    """Return the short text that ``--prefs`` reads as :func:`same` preference again.

    >>> typed((1 / 3, 2 / 3)), parse(typed((1 / 3, 1 / 3, 1 / 3)), ["a", "b", "c"])
    ('0.33333333,0.66666667', (0.33333333, 0.33333333, 0.33333333))
    """
    return ",".join(f"{w:.8g}" for w in weights)

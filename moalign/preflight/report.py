"""What a preflight looked at, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moalign.core.errors import RequestError


class Line(NamedTuple):
    """One thing that was looked at."""

    what: str
    """Empty: more about the line before."""
    found: str


@dataclass
class Preflight:
    """What was checked and what is wrong."""

    recipe: Path
    """The file that is checked: a recipe, or a card."""
    checked: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not wrong but worth knowing, and what could not be checked."""
    problems: list[str] = field(default_factory=list)
    """Each once, with file and line or option."""
    memory: dict[str, Any] = field(default_factory=dict)
    """See :meth:`moalign.preflight.memory.Estimate.as_dict`."""
    cost: dict[str, Any] = field(default_factory=dict)
    """Upper bounds of training: :class:`moalign.preflight.cost.CostBounds`."""
    cards: list[dict[str, Any]] = field(default_factory=list)
    """For cards of several sizes, the settings with which the recipe fits."""
    of_card: bool = False
    """The file is a card."""

    def add(self, what: str, found: str) -> None:
        """Add a line on something that was checked."""
        self.checked.append(Line(what, found))

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Turn a RequestError of the block into problems."""
        try:
            yield
        except RequestError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]

    def look(self, what: str, action: Callable[[], str]) -> bool:
        """Run one check: its text becomes a line, its RequestError becomes problems; returns whether it passed."""
        with self.collecting():
            self.add(what, action())
            return True
        return False

    def as_dict(self) -> dict[str, Any]:
        """Return everything for ``--json``."""
        return {
            "recipe": None if self.of_card else str(self.recipe),
            "card": str(self.recipe) if self.of_card else None,
            "ok": not self.problems,
            "checked": [line._asdict() for line in self.checked],
            "memory": self.memory,
            "cost": self.cost,
            "cards": self.cards,
            "notes": self.notes,
            "problems": self.problems,
        }

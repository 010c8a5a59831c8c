"""Who labelled a task's pairs: users, the groups that they fall into, and what an answer is worth to each group."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from moalign.core.errors import RequestError

if TYPE_CHECKING:
    from moalign.config.card import TaskCard
    from moalign.core.arrays import Matrix
    from moalign.reward_models.pairs import PairSet


class WithUsers:
    """What a task knows of its users."""

    card: TaskCard

    def pair_sets(self) -> list[PairSet]:
        """See :meth:`moalign.tasks.task.Task.pair_sets`."""
        raise NotImplementedError

    def labelled_by_user(self) -> list[PairSet]:
        """Return the labelled pairs over all splits, one data set per user: ``group`` in the rows of a file.

        Raises RequestError where the card names no pairs.
        """
        if self.card.data is None or self.card.data.pairs is None:
            raise RequestError(
                f"task {self.card.name}: its card has no data.pairs; needed: pairs whose field group says which user "
                "labelled them"
            )
        return self.pair_sets()

    @functools.cached_property
    def users(self) -> list[PairSet]:
        """The training split's pairs of every user who has some there; names say nothing of groups."""
        parts = [pairs.split(self.card.splits)["train"] for pairs in self.labelled_by_user()]
        return [part for part in parts if len(part)]

    @property
    def group_of_user(self) -> dict[str, str] | None:
        """The group of every user by name, where it is known: to judge what was found, not to learn from."""
        return None

    @property
    def user_groups(self) -> list[str] | None:
        """The names of the groups that answers are judged for; None: the task knows of none."""
        return None

    def group_utilities(self, raw: Matrix) -> Matrix:
        """Return what mean raw rewards ``[..., objectives]`` are worth to each of :attr:`user_groups`,
        ``[..., groups]``."""
        raise NotImplementedError

    def require_groups(self, count: int, setting: str) -> None:
        """Raise RequestError where users cannot fall into ``count`` groups, which ``setting`` asks for."""
        known = self.group_of_user
        most, what = len(self.users), "users label the pairs of its training split"
        if known is not None and len(set(known.values())) < most:
            most, what = len(set(known.values())), "groups of users label its pairs"
        if count > most:
            allowed = "1" if most == 1 else f"1 to {most}"
            raise RequestError(f"{setting}: found {count}; allowed: {allowed}, as task {self.card.name}: {most} {what}")

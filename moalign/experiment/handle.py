"""Finished runs as Python callers hold them: found by name, with their record, evaluation, answers and policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from moalign.core import preferences
from moalign.core.errors import RequestError
from moalign.core.preferences import Preference, label
from moalign.core.progress import Progress, silent
from moalign.core.text import command
from moalign.evaluation import evaluate
from moalign.evaluation.result import EvalResult
from moalign.experiment.arguments import Vector, vector_text
from moalign.experiment.generate import checked, infer
from moalign.experiment.train import context_of, damaged
from moalign.methods import registry
from moalign.methods.base import Method, policies_of
from moalign.runs.record import RunRecord
from moalign.runs.run import Run
from moalign.runs.store import RunStore, results_of
from moalign.training.job import RunContext

if TYPE_CHECKING:
    import pandas as pd

    from moalign.policies.policy import Policy


class SteeredPolicy:
    """A run's policy for one preference: it answers prompts."""

    def __init__(self, policy: Policy, context: RunContext, preference: Preference) -> None:
        self.preference = preference
        self._policy = policy
        self._context = context

    def __repr__(self) -> str:
        return f"SteeredPolicy({self._context.run.record.method} at {label(self.preference)})"

    def respond(
        self, prompts: str | Sequence[str], *, temperature: float | None = None, seed: int | None = None
    ) -> list[str]:
        """Return one response for each prompt, in order.

        Args:
            prompts: bare prompts, without preference or chat template; a single text is one prompt.
            temperature: of sampling; None: the task card's. 0 is greedy.
            seed: of sampling; None: the evaluation's.

        Raises:
            RequestError: an empty prompt, or none at all.
        """
        task = self._context.task
        sampling = task.sampling(task.card.evaluation.seed if seed is None else seed, temperature)
        return self._policy.respond(checked(prompts), sampling)


class RunHandle(Run):
    """A run in its folder. What a policy needs (task, base model) is loaded at its first use and kept."""

    def __init__(self, path: Path, record: RunRecord, results: Path = Path("results"), reused: bool = False) -> None:
        """Hold the run in the folder ``path``.

        ``results`` is its results folder, unless it lies in one: its scores belong to the normaliser there.
        """
        super().__init__(path, record)
        self.results = results_of(path, results)
        self.reused = reused
        """Whether :func:`moalign.train` found it finished and trained nothing."""
        self._opened: tuple[Method, RunContext] | None = None

    @classmethod
    def find(cls, name: str | None, results: Path) -> RunHandle:
        """Return the run of a name (:meth:`RunStore.find`); None: the one that finished last."""
        store = RunStore(results)
        run = store.newest_finished() if name is None else store.find(name)
        return cls(run.path, run.record, results)

    def __repr__(self) -> str:
        return f"RunHandle({self.record.method} on {self.record.task}, seed {self.record.seed}, {str(self.path)!r})"

    @property
    def objectives(self) -> tuple[str, ...]:
        """The names of the task's objectives, in the order of preferences and scores."""
        with damaged(self):
            return tuple(objective["name"] for objective in self.record.recipe["card"]["objectives"])

    @property
    def evaluation(self) -> EvalResult | None:
        """The stored evaluation on the task's grid (or the preferences trained on, where only those are served).

        None: it was not evaluated yet; see :func:`moalign.evaluate`. Raises RequestError when the file is damaged.
        """
        path = self.path / f"{self._files()[0]}.json"
        if not path.is_file():
            return None
        result = EvalResult.load(path)
        return result if result.card_hash == self.record.card_hash else None  # of another card it is not this run's

    def to_frame(self) -> pd.DataFrame:
        """Return the answers of the stored evaluation, one row a response.

        Columns: ``prompt``, ``preference`` (as text, like ``0.3,0.7``), ``response``, ``finished`` (False: a limit cut
        it off), and for each objective its raw score, larger is better. Rows are in the order of the preferences.

        Raises:
            RequestError: the run was not evaluated, or the table of its answers is missing or damaged.
        """
        if self.evaluation is None:
            first = command("eval", self.path)
            raise RequestError(f"run {self.path}: it has no evaluation; evaluate it first: {first}")
        return self.read_table(self._files()[1]).drop(columns="ids", errors="ignore")

    def policy(self, prefs: Vector) -> SteeredPolicy:
        """Return the policy for a preference: one weight per objective, non-negative, summing to 1.

        Raises:
            RequestError: the run is not finished, a wrong preference, or one that its method cannot serve.
        """
        method, context = self.opened()
        asked = preferences.parse(vector_text(prefs), context.task.names)
        (preference,) = evaluate.preferences_for(method, context, [asked])
        return SteeredPolicy(policies_of(method, context, [preference])[0], context, preference)

    def infer(self, user: str | Path, progress: Progress = silent) -> Preference:
        """Return the preference that the pairs of one user show: a file with prompt, chosen and rejected.

        Raises:
            RequestError: the run is not finished, its method reads no preference off pairs, or a fault in the file.
        """
        return infer(*self.opened(progress), Path(user), progress)

    def opened(self, progress: Progress = silent) -> tuple[Method, RunContext]:
        """Return the method and the context of the finished run, made once.

        Raises RequestError when the run is not finished, or when its base model or data have changed since.
        """
        if self._opened is None:
            self._opened = self.open(progress)
        return self._opened

    def open(self, progress: Progress = silent) -> tuple[Method, RunContext]:
        """Return the same anew: for one use, so that no model stays in memory after it."""
        return context_of(self, self.results, progress)

    def _files(self) -> tuple[str, str]:
        """Return the names (without suffix) of the run's own evaluation and of its answers."""
        with damaged(self):
            card = self.record.recipe["card"]
            grid = preferences.grid_of(len(card["objectives"]), card["grid"])
        steerable = registry.get(self.record.method).capabilities.steerable
        trained = [tuple(row) for row in self.record.preferences or grid]
        return evaluate.names_on(grid, grid if steerable else trained)


class Best(NamedTuple):
    """The run of a comparison that was chosen to answer."""

    run: RunHandle
    rank: int
    """The rank of its entry, 1 is best."""
    entries: int
    """How many entries the comparison has."""
